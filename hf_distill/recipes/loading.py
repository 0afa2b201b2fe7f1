"""Recipes: from a YAML file, a profile and overrides to stages in the order in which they run.

```yaml
name: two-steps
variables: {data: ???, encoder: sentence-transformers/all-MiniLM-L6-v2}
defaults:
  train: {data: "${data}", num_train_epochs: 1}
stages:
  ranker: {verb: train, model: "${encoder}", kind: cross_encoder}
  figures: {verb: evaluate, data: "${data}", model: [bm25, "${ranker}"]}
profiles:
  small: {stages: {ranker: {max_steps: 100}}}
```

`${name}` is a variable or the result of another stage. Profile and overrides are merged over the file by one rule:
mappings are merged field by field, everything else is replaced, and `null` takes a stage or field away.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..hub.manifest import HIDDEN, without_secrets
from ..settings import parse_yaml
from .kinds import StageKind, kind_of, nearest


MUST_BE_SET = "???"
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z][\w-]*")
_SECTIONS = ("name", "summary", "card", "variables", "defaults", "stages", "profiles")
_OF_A_PROFILE = ("extends", "summary", "card", "variables", "defaults", "stages")
# Keys of a stage that are the graph's; every other one is a field of the verb.
_OF_THE_GRAPH = ("verb", "launch", "after")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        name: Its name.
        kind: What it is.
        settings: Fields of the verb, variables filled in; results of stages still stand as `${stage}`.
        needs: The stages whose results it reads, or that it must follow.
        launch: The launch configuration that its processes are started with; None for one process.
    """

    name: str
    kind: StageKind
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    launch: str | None = None

    def filled(self, folder_of: Any) -> dict[str, Any]:
        """The settings with every `${stage}` replaced by `folder_of(stage)`."""
        return {name: _fill(value, lambda stage: str(folder_of(stage))) for name, value in self.settings.items()}

    def stages_in(self, value: Any) -> list[str]:
        """The stages that a setting names."""
        return [name for text in _texts(value) for name in _REFERENCE.findall(text)]


@dataclass(frozen=True)
class Recipe:
    """A recipe whose profile and overrides are merged in.

    Attributes:
        name: For titles and folders.
        summary: What it does.
        origin: The file.
        profile: The chosen profile, or None.
        stages: By name, in the order in which they run.
        variables: With their values.
        card: The stage whose model card tells of all stages; None for none.
        overrides: As they were given.
    """

    name: str
    summary: str
    origin: Path
    profile: str | None
    stages: dict[str, Stage]
    variables: dict[str, Any]
    card: str | None = None
    overrides: tuple[str, ...] = field(default=())

    def part(self, first: str | None, last: str | None) -> list[str]:
        """The names of the stages from `first` to `last`, both included, in running order."""
        names = list(self.stages)
        for flag, name in (("--from", first), ("--until", last)):
            if name is not None and name not in names:
                raise InputError(f"the recipe has no stage {name!r}", where=flag, cure=nearest(name, names))
        begin = names.index(first) if first is not None else 0
        end = names.index(last) if last is not None else len(names) - 1
        if end < begin:
            raise InputError(f"stage {last!r} comes before {first!r}", where="--until", cure="Exchange the two")
        return names[begin : end + 1]


def recipe_folders() -> list[Path]:
    """Where recipes are looked for by name: this checkout, then the installation."""
    checkout = Path(__file__).parents[2] / "run_scripts" / "recipes"
    return [checkout, Path(sysconfig.get_path("data")) / "share" / "hf_distill" / "recipes"]


def recipe_path(name: str | os.PathLike) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        InputError: If there is none, naming those that come with the package.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped: dict[str, Path] = {}
    for folder in recipe_folders():
        for file in sorted(folder.glob("*.yaml")):
            shipped.setdefault(file.stem, file)
    if str(name).removesuffix(".yaml") in shipped:
        return shipped[str(name).removesuffix(".yaml")]
    raise InputError(
        f"there is no recipe {str(name)!r}, neither as a file nor in the package",
        where="recipe",
        cure=nearest(str(name), shipped),
    )


def load_recipe(origin: str | os.PathLike, profile: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        origin: A file, or the name of a recipe that comes with the package.
        profile: Which of its profiles.
        overrides: Each `variable=value`, `stage.field=value` or `defaults.verb.field=value`, the value as YAML.

    Raises:
        InputError: For anything malformed or unknown, an unknown stage or a cycle; the message names the place.
    """
    path = recipe_path(origin)
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    where = f"recipe {path.name}"
    _check_sections(content, _SECTIONS, where)
    for layer in _layers(content, profile, where):
        content = merged(content, layer)
    for override in overrides:
        content = merged(content, _override(override, content))
    sections = _stage_sections(content, where)
    variables = _variables(content.get("variables") or {}, sections, where)
    stages = {
        name: _stage(name, section, content.get("defaults") or {}, variables, sections, where)
        for name, section in sections.items()
    }
    return Recipe(
        name=str(content.get("name") or path.stem),
        summary=" ".join(str(content.get("summary") or "").split()),
        origin=path,
        profile=profile,
        stages=_in_order(stages, where),
        variables=variables,
        card=_card(content.get("card"), stages, where),
        overrides=tuple(overrides),
    )


def merged(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings field by field, everything else replaced."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    return {**base, **{name: merged(base.get(name), value) for name, value in over.items()}}


# ---- reading ----


def _check_sections(content: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(content, Mapping):
        raise InputError("must be a mapping", where=where, cure="Write for example 'stages: {name: {verb: train}}'")
    for name in content:
        if name not in known:
            raise InputError(f"unknown section {name!r}", where=where, cure=nearest(str(name), known))


def _layers(content: Mapping[str, Any], profile: str | None, where: str) -> list[Mapping[str, Any]]:
    """The profile and those it extends, the farthest first."""
    profiles = content.get("profiles") or {}
    layers: list[Mapping[str, Any]] = []
    seen: list[str] = []
    while profile is not None:
        if profile not in profiles:
            raise InputError(f"{where} has no profile {profile!r}", cure=nearest(profile, profiles))
        if profile in seen:
            raise InputError(f"the profiles {', '.join(seen)} extend each other in a circle", where=where)
        layer = profiles[profile] or {}
        _check_sections(layer, _OF_A_PROFILE, f"{where}, profile {profile!r}")
        seen.append(profile)
        layers.insert(0, {name: value for name, value in layer.items() if name != "extends"})
        profile = layer.get("extends")
    return layers


def _override(text: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """`stage.field=value` as a mapping to lay over the recipe."""
    path, equals, value = text.partition("=")
    words = path.strip().split(".")
    stages, variables = content.get("stages") or {}, content.get("variables") or {}
    if not equals or not all(words):
        raise InputError(f"{text!r} is no override", where="--set", cure="Write variable=value or stage.field=value")
    if len(words) == 1 and words[0] in variables:
        words = ["variables", *words]
    elif len(words) == 2 and words[0] in stages:
        words = ["stages", *words]
    elif not (len(words) == 3 and words[0] == "defaults"):
        known = list(variables) if len(words) == 1 else [f"{name}.{words[-1]}" for name in stages]
        what = "variable" if len(words) == 1 else "stage"
        raise InputError(f"{path!r} names no {what} of the recipe", where="--set", cure=nearest(path, known))
    result: Any = parse_yaml(value, f"--set {path}")
    for word in reversed(words):
        result = {word: result}
    return result


# ---- filling in ----


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for one in value.values() for text in _texts(one)]
    return [text for one in value for text in _texts(one)] if isinstance(value, list) else []


def _fill(value: Any, look_up: Any) -> Any:
    """`value` with every `${name}` replaced by `look_up(name)`; a text that is nothing else keeps the value's type."""
    if isinstance(value, Mapping):
        return {name: _fill(one, look_up) for name, one in value.items()}
    if isinstance(value, list):
        filled = []
        for one in value:
            # A variable that is a list stands for its entries, one without a value for none.
            result = _fill(one, look_up)
            is_list = isinstance(result, list) and not isinstance(one, list)
            filled += result if is_list else [] if result is None else [result]
        return filled
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        return look_up(whole[1])
    return _REFERENCE.sub(lambda match: str(look_up(match[1])), value)


def _variables(variables: Mapping[str, Any], stages: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The variables, those in their values filled in; stages stay as `${stage}`."""
    done: dict[str, Any] = {}

    def value_of(name: str, path: tuple[str, ...]) -> Any:
        if name in path:
            raise InputError(f"the variables {' -> '.join([*path, name])} stand for each other", where=where)
        if name in stages or name not in variables:
            # A stage that is not there is an error only where the variable is used.
            return f"${{{name}}}"
        if name not in done:
            done[name] = _fill(variables[name], lambda other: value_of(other, (*path, name)))
        return done[name]

    return {name: value_of(name, ()) for name in variables}


def _stage_sections(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    stages = content.get("stages")
    stages = {name: one for name, one in stages.items() if one is not None} if isinstance(stages, Mapping) else {}
    if not stages:
        raise InputError("there are no stages", where=where, cure="Write for example 'stages: {name: {verb: train}}'")
    for name in stages:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} is no name for a stage",
                where=where,
                cure="Use letters, digits, '-' and '_', a letter first",
            )
        if name in (content.get("variables") or {}):
            raise InputError(f"{name!r} is both a variable and a stage", where=where, cure="Rename one of the two")
    return stages


def _stage(
    name: str,
    section: Any,
    defaults: Mapping[str, Any],
    variables: Mapping[str, Any],
    stages: Mapping[str, Any],
    where: str,
) -> Stage:
    where = f"{where}, stage {name!r}"
    if not isinstance(section, Mapping) or "verb" not in section:
        raise InputError("names no verb", where=where, cure="Write for example 'verb: train' and the verb's fields")
    kind = kind_of(section["verb"], where)
    section = merged(defaults.get(kind.verb) or {}, section)

    def look_up(reference: str) -> Any:
        if reference in variables:
            if variables[reference] == MUST_BE_SET:
                raise InputError(
                    f"the variable {reference!r} has no value yet", where=where, cure=f"Add --set {reference}=..."
                )
            return variables[reference]
        if reference in stages:
            return f"${{{reference}}}"
        raise InputError(
            f"there is neither a stage nor a variable {reference!r}",
            where=where,
            cure=nearest(reference, [*stages, *variables]),
        )

    settings = {
        str(field_name).replace("-", "_"): _fill(value, look_up)
        for field_name, value in section.items()
        if field_name not in _OF_THE_GRAPH
    }
    settings = {field_name: value for field_name, value in settings.items() if value is not None}
    if kind.output in settings:
        raise InputError("says where its result goes", where=f"{where}, {kind.output}", cure="The recipe decides that")
    secret = next((one for one, value in without_secrets(settings).items() if value == HIDDEN), None)
    if secret is not None:
        # Settings go into records and the report.
        cure = "Take it out, and log in with `hf auth login` or set HF_TOKEN"
        raise InputError("a secret, which no recipe may hold", where=f"{where}, {secret}", cure=cure)
    named = [reference for text in _texts(settings) for reference in _REFERENCE.findall(text)]
    for other in named:
        if other not in stages:  # by way of a variable
            raise InputError(f"there is no stage {other!r}", where=where, cure=nearest(other, stages))
    after = section.get("after") or []
    after = [after] if isinstance(after, str) else list(after)
    for other in after:
        if other not in stages:
            raise InputError(f"there is no stage {other!r}", where=f"{where}, after", cure=nearest(other, stages))
    launch = _fill(section.get("launch"), look_up)
    return Stage(name, kind, settings, tuple(dict.fromkeys([*named, *after])), launch)


def _card(name: Any, stages: Mapping[str, Stage], where: str) -> str | None:
    if name is not None and name not in stages:
        raise InputError(f"there is no stage {name!r}", where=f"{where}, card", cure=nearest(str(name), stages))
    return name


def _in_order(stages: dict[str, Stage], where: str) -> dict[str, Stage]:
    """The stages so that each follows those it needs, otherwise in the order of the file."""
    ordered: dict[str, Stage] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise InputError(f"the stages wait for each other: {circle}", where=where, cure="Break the circle")
        if name in ordered:
            return
        for other in stages[name].needs:
            visit(other, (*path, name))
        ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered
