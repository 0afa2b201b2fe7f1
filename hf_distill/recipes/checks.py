"""Everything about a recipe that can be wrong is found before its first stage starts.

What needs heavy imports runs in a process of its own, so that the one that waits for stages stays small.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json
from ..hub.client import split_revision
from .kinds import ANYTHING, COLLECTION, MODEL, ROWS, RUN
from .loading import Recipe, Stage
from .records import Workspace


# Values of model fields that are no models' names.
_WORDS = ("bm25", "auto", "teacher", "student")
_HUB_SECONDS = 6.0
_MINED = ("sources", "ranks", "retriever_scores")


def check_graph(recipe: Recipe, names: Sequence[str], workspace: Workspace, available: Sequence[str] = ()) -> None:
    """Checks fields that must be given, the sorts of results that stages read, files and columns, without imports.

    Args:
        recipe: The recipe.
        names: The stages that will be run.
        workspace: Where the results of the others are.
        available: Stages whose results will be there although they are not.
    """
    for name in names:
        stage = recipe.stages[name]
        for group in stage.kind.required:
            if not any(field in stage.settings for field in group):
                raise InputError(
                    f"{stage.kind.verb} still needs {' or '.join(group)}",
                    where=_where(recipe, stage),
                    cure=f"Add it; hf-distill {stage.kind.verb} --help says what it is",
                )
        for field, sort in stage.kind.inputs.items():
            for value in _values(stage.settings.get(field)):
                _check_value(recipe, stage, field, sort, value)
        _check_columns(recipe, stage)
        for other in stage.needs:
            record = workspace.record(other)
            there = workspace.has_result(recipe.stages[other]) or (record is not None and record.remote is not None)
            if other not in names and not there and other not in available:
                raise InputError(
                    f"needs the result of stage {other!r}, which is not there",
                    where=_where(recipe, stage),
                    cure=f"Run {other!r} too: begin with --from {other}",
                )


def _where(recipe: Recipe, stage: Stage, field: str | None = None) -> str:
    place = f"recipe {recipe.origin.name}, stage {stage.name!r}"
    return place if field is None else f"{place}, field {field!r}"


def _values(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str)]


def _check_value(recipe: Recipe, stage: Stage, field: str, sort: str, value: str) -> None:
    for other in stage.stages_in(value):
        result = recipe.stages[other].kind.result
        suits = ANYTHING in (sort, result) or result == sort or value != f"${{{other}}}"
        if result is None or not suits:
            raise InputError(
                f"stage {other!r} leaves {result or 'nothing'}, where {sort} is needed",
                where=_where(recipe, stage, field),
                cure=f"Name a stage that leaves {sort}",
            )
    if stage.stages_in(value) or value in _WORDS:
        return
    path = Path(value).expanduser()
    looks_like_path = value.startswith((".", "/", "~")) or value.count("/") > 1 or value.endswith((".trec", ".yaml"))
    if looks_like_path and not path.exists():
        raise InputError(
            f"there is no file or folder {value}", where=_where(recipe, stage, field), cure="Mend the path"
        )
    if sort == RUN and not path.is_file():
        raise InputError(f"there is no file {value}", where=_where(recipe, stage, field), cure="Name a TREC file")


def columns_of(recipe: Recipe, value: Any) -> set[str] | None:
    """The columns of a row set that a field names, as far as they can be known before it is made; None if not."""
    if not isinstance(value, str):
        return None
    named = [stage for stage in recipe.stages.values() if value == f"${{{stage.name}}}"]
    if not named:
        try:
            return set(read_json(Path(value) / "metadata.json").get("columns", [])) or None
        except (OSError, ValueError):
            return None
    stage = named[0]
    if stage.kind.verb == "mine":
        return {*_MINED, *(["scores"] if "filter_teacher" in stage.settings else [])}
    columns = columns_of(recipe, stage.settings.get("rows"))
    if stage.kind.verb == "score" and columns is not None:
        columns = {*columns, stage.settings.get("column", "scores")}
    return columns


def _check_columns(recipe: Recipe, stage: Stage) -> None:
    columns = columns_of(recipe, stage.settings.get("rows"))
    if columns is None:
        return
    asked = [
        (field, value.removeprefix("column:"))
        for field in ("teacher", "teacher_column")
        for value in _values(stage.settings.get(field))
        if value.startswith("column:") or field == "teacher_column"
    ]
    for field, column in asked:
        if column not in columns:
            raise InputError(
                f"the rows will have no column {column!r}",
                where=_where(recipe, stage, field),
                cure=f"They will have {', '.join(sorted(columns))}; a stage of verb score adds one",
            )


def check_fields(place: str, verb: str, settings: Mapping[str, Any]) -> None:
    """Checks names and values of a stage's fields as its command will; imports what the command imports."""
    from ..cli.parsing import parse_settings

    parse_settings(importlib.import_module(f"hf_distill.cli.{verb}").VERB, settings, place)


def check_stages(stages: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """`check_fields` of several: place, verb and settings of each."""
    for place, verb, settings in stages:
        check_fields(place, verb, settings)


def fields_to_check(recipe: Recipe, names: Sequence[str], workspace: Workspace) -> list[tuple[str, str, dict]]:
    """What `check_stages` wants to know about stages."""
    return [
        (_where(recipe, recipe.stages[name]), recipe.stages[name].kind.verb, command_settings(recipe, name, workspace))
        for name in names
    ]


def command_settings(recipe: Recipe, name: str, workspace: Workspace) -> dict[str, Any]:
    """The fields of a stage's command, the results of other stages as paths."""
    stage = recipe.stages[name]
    settings = stage.filled(workspace.result)
    if stage.kind.output is not None:
        settings[stage.kind.output] = str(workspace.result(name))
    return settings


def check_ids(recipe: Recipe, names: Sequence[str]) -> None:
    """Asks the Hub (or its cache) for every model and collection that is no folder."""
    for name in names:
        stage = recipe.stages[name]
        for field, sort in stage.kind.inputs.items():
            for value in _values(stage.settings.get(field)):
                if stage.stages_in(value) or value in _WORDS or ":" in value or Path(value).expanduser().exists():
                    continue
                revision = stage.settings.get(f"{field}_revision")
                if sort == MODEL:
                    repo, at = split_revision(value)
                    _check_id(repo, at or revision, sort, _where(recipe, stage, field))
                elif sort == COLLECTION:
                    _check_id(value, revision, sort, _where(recipe, stage, field))
                elif sort == ROWS and stage.settings.get("data"):
                    continue  # a row set's name in the collection, which is looked at when that is opened


def _check_id(name: str, revision: str | None, sort: str, where: str) -> None:
    from huggingface_hub import HfApi, constants, errors

    if sort == MODEL:
        from ..models.source import find_model, split_kind

        name = split_kind(name)[1]
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    try:
        if not constants.HF_HUB_OFFLINE:
            ask = HfApi().model_info if sort == MODEL else HfApi().dataset_info
            try:
                ask(name, revision=revision, timeout=_HUB_SECONDS)
                return
            except absent as error:
                raise InputError(" ".join(str(error).split())[:200], cure="Mend the name, or log in") from error
            except Exception:  # the Hub does not answer: what is here already must do
                pass
        if sort == MODEL:
            find_model(name, revision)
        else:
            from ..data import load_collection

            load_collection(name, revision=revision)
    except InputError as error:
        raise InputError(error.problem, where=where, cure=error.cure) from error
