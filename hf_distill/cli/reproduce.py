"""`hf-distill reproduce`: the command that made a result, what has changed since, and whether the same comes out."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import get_logger, print_table
from ..errors import InputError
from ..settings import NOT_OF_THE_RUN, option
from .parsing import Verb, leading_words, parse, require


logger = get_logger(__name__)

# Options of the first run that a repetition must not have: where it wrote, what it published, what it took as done.
_NOT_REPEATED = frozenset(
    "output_dir cache_dir push_to_hub push_to resume_from_checkpoint overwrite pull_from from_stage".split()
)
# Options that name models, and those whose values may have their own `@revision`.
_MODELS = frozenset("model teacher student filter_teacher mine_with rerank twin".split())
_PINNED = _MODELS | {"input"}
# A manifest may come from somebody else: what sends something away is not run because it says so.
_NEVER_RUN = ("push", "reproduce")
_LAUNCH = re.compile(r"--launch \w+(:\d+)?")
# Figures of the machine, not of the result.
_TIMES = ("seconds", "passages_per_second")
# Files that hold nothing but what was made: no times, no names of folders.
_CONTENT = (".parquet", ".jsonl", ".tsv", ".ciff", "comparison.json")


@dataclass
class ReproduceOptions:
    """Which run, and what to do about it."""

    _argument_group_name = "reproduction"

    target: str | None = option(
        None, "An output folder, its run_manifest.json, or a Hub repository, also repo@revision (may stand first)."
    )
    run: bool = option(False, "Run the command in a fresh folder and compare the results; else it is only printed.")
    output_dir: str | None = option(None, "That folder. Default: outputs/NAME-again, after the original's name.")
    replace: list[str] | None = option(
        None, "Where folders are now that have moved, as recorded=present, for example my_data=/data/my_data."
    )
    force: bool = option(False, "Go on although data or weights differ.")
    reuse_cache: bool = option(False, "Take cached embeddings and scores, instead of making them anew.")


def run(options: ReproduceOptions) -> None:
    """Checks what the run had read, prints the command, and with `--run` runs it and compares."""
    require("reproduce", target=(options.target, "an output folder, a manifest, or a Hub repository"))
    manifest, name = read_manifest(options.target)
    if not manifest.get("arguments"):
        raise InputError(
            "its manifest does not say by what command it was made",
            where=options.target,
            cure="It was made in Python or by an older version; the manifest's settings say what was done",
        )
    moved = _moved(options.replace or [])
    again = Path(options.output_dir or Path("outputs") / f"{name}-again")
    if again.exists() and (not again.is_dir() or any(again.iterdir())):
        raise InputError("is not empty", where=str(again), cure="Name a fresh folder with --output_dir")
    words = _words(manifest, moved, again)
    _pin_defaults(manifest, words)
    command = _command(manifest, words)
    notes = list(_other_machine(manifest))
    problems = [problem for source in manifest.get("sources", ()) for problem in check_source(source, manifest, moved)]
    for note in notes:
        logger.warning("differs: %s", note)
    for problem in problems:
        logger.error("changed: %s", problem)
    sys.stdout.write(shlex.join(["hf-distill", *command]) + "\n")
    sys.stdout.flush()
    if problems and not options.force:
        raise InputError(
            f"what the run had read is not what it was ({len(problems)} differences, named above)",
            where=options.target,
            cure="Bring back what it was, say where it is now with --replace recorded=present, or add --force",
        )
    if not problems:
        logger.info("data, models and revisions are those of the run")
    if options.run:
        _run_again(command, again, options.reuse_cache)
        compare_results(manifest, read_manifest(str(again))[0])


def read_manifest(target: str) -> tuple[dict[str, Any], str]:
    """The manifest of a folder, a file or a Hub repository, and the last part of its name.

    Raises:
        InputError: If there is none.
    """
    from ..files import read_json
    from ..hub.manifest import MANIFEST

    path = Path(target)
    if path.is_dir() or path.is_file():
        file = path / MANIFEST if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"there is no {MANIFEST}", where=target, cure="Give the output folder of a run")
        name = file.resolve().parent.name
    else:
        file, name = _fetch(target, MANIFEST), target.partition("@")[0].rpartition("/")[2]
    try:
        manifest = read_json(file)
    except ValueError as error:
        raise InputError(f"not JSON ({error})", where=str(file), cure="Give the folder of a complete run") from None
    if not isinstance(manifest, dict):
        raise InputError("no manifest of a run", where=str(file), cure="Give the folder of a run")
    return manifest, name


def _fetch(target: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    from ..hub.client import attempt, check_repo_id, explain, split_revision

    repo, revision = split_revision(target)
    if target.startswith((".", "/", "~")) or target.count("/") > 1:
        raise InputError("there is no such folder", where=target, cure="Check the path, or give a Hub id you/name")
    check_repo_id(repo, "target")
    for kind in ("model", "dataset"):

        def ask(kind: str = kind) -> str:
            return hf_hub_download(repo, name, repo_type=kind, revision=revision)

        try:
            # Offline, waiting would not help.
            return Path(ask() if HF_HUB_OFFLINE else attempt(ask, f"reading the manifest of {target}"))
        except LocalEntryNotFoundError as error:  # neither reached nor kept here
            raise _unreached(target, explain(error)) from error
        except RepositoryNotFoundError as error:
            if kind == "dataset":
                raise _unreached(target, explain(error)) from error
        except EntryNotFoundError:
            raise InputError(f"there is no {name} in it", where=target, cure="Give a repository of a run") from None
        except Exception as error:
            raise _unreached(target, explain(error)) from error
    raise AssertionError("the last kind returns or raises")


def _unreached(target: str, reason: str) -> InputError:
    return InputError(
        f"no such folder here, and the Hub did not give its manifest: {reason}",
        where=target,
        cure="Check the path, the name, the revision and your login",
    )


# ---- The command ----
def _moved(replacements: list[str]) -> dict[str, str]:
    moved = {}
    for text in replacements:
        before, equals, now = text.partition("=")
        if not equals or not before or not now:
            raise InputError(f"{text!r} does not say from where to where", where="--replace", cure="Write old=new")
        moved[_plain(before)] = now
    return moved


def _plain(name: str) -> str:
    """`folder/` and `./folder` are `folder`, as the manifest has it."""
    return os.path.normpath(name) if "/" in name else name


def _now(value: str, moved: Mapping[str, str]) -> str:
    """What a value names now; of `name=value` (`corpus=FILE`, or `--set data=FOLDER` of a recipe) the value counts."""
    name, equals, named = value.partition("=")
    if equals and _plain(named) in moved:
        return f"{name}={moved[_plain(named)]}"
    return moved.get(_plain(value), value)


def _at_commit(value: str, commits: Mapping[str, str]) -> str:
    """`user/name` or `user/name@revision`, perhaps behind `role=`, with the commit that was read."""
    role, equals, named = value.rpartition("=")
    repo = named.partition("@")[0]
    commit = commits.get(named, commits.get(repo))
    return value if commit is None else f"{role}{equals}{repo}@{commit}"


def _words(manifest: Mapping[str, Any], moved: Mapping[str, str], output_dir: Path) -> dict[str, list[str]]:
    """The options of the run by name, with revisions pinned, names replaced, and another output folder."""
    from ..hub.manifest import HIDDEN, REVISIONS

    options: dict[str, list[str]] = {}
    name = ""
    for word in manifest["arguments"][1:]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            options[name] = [value] if equals else []  # what comes later wins, as it did
        elif name:
            options[name].append(word)
    kept = {
        name: [_now(value, moved) for value in values]
        for name, values in options.items()
        if HIDDEN not in values and name not in _NOT_REPEATED and not name.startswith("hub_")
    }
    allowed = _field_names(manifest["arguments"][0])
    for name in [name for name in kept if name in {*REVISIONS, *_PINNED}]:
        commits = {
            source["name"]: source["revision"]
            for source in manifest.get("sources", ())
            if source["revision"] and (source["kind"] == "model") == (name in _MODELS)
        }
        (first, *more), revision_option = kept[name] or [""], REVISIONS.get(name)
        if first in commits and not more and "@" not in first and revision_option in allowed:
            kept[revision_option] = [commits[first]]
        elif name in _PINNED:
            kept[name] = [_at_commit(value, commits) for value in kept[name]]
    return {**kept, "output_dir": [str(output_dir)]}


def _field_names(verb: str) -> set[str]:
    from dataclasses import fields

    return {field.name for cls in _verb(verb).options for field in fields(cls)}


def _verb(name: str) -> Verb:
    from .main import VERBS

    if name not in VERBS or name in _NEVER_RUN:
        raise InputError(
            f"the verb {name!r} cannot be repeated in this version", where="manifest", cure="Use the version it names"
        )
    return importlib.import_module(f"hf_distill.cli.{name}").VERB


def _flat(words: Mapping[str, list[str]]) -> list[str]:
    return [word for name, values in words.items() for word in (f"--{name}", *values)]


def _pin_defaults(manifest: Mapping[str, Any], words: dict[str, list[str]]) -> None:
    """Writes out settings whose default is another one by now, here or in transformers."""
    from ..hub.manifest import REVISIONS, config_of

    now = config_of(parse(_verb(manifest["arguments"][0]), _flat(words)))
    for name, before in manifest.get("config", {}).items():
        if name in NOT_OF_THE_RUN or name in words or name not in now or now[name] == before:
            continue
        if isinstance(before, (str, int, float)) and name not in REVISIONS.values():
            logger.warning(
                "differs: the default of --%s is %r by now and was %r; it is written out", name, now[name], before
            )
            words[name] = [str(before)]


def _command(manifest: Mapping[str, Any], words: Mapping[str, list[str]]) -> list[str]:
    launch, processes = manifest.get("launch") or {}, int(manifest.get("world_size") or 1)
    typed = str(launch.get("typed") or "").split() if _LAUNCH.fullmatch(str(launch.get("typed"))) else []
    if not typed and processes > 1:
        typed = ["--launch", f"{'cpu' if str(launch.get('device', 'cpu')) == 'cpu' else 'multi_gpu'}:{processes}"]
    return [*typed, manifest["arguments"][0], *_flat(words)]


def _run_again(command: list[str], folder: Path, reuse_cache: bool) -> None:
    logger.info("running it in %s", folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # With the cache of the first run, its embeddings, scores and rows would only be compared with themselves.
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=folder.parent) as cache:
        environment = os.environ if reuse_cache else {**os.environ, "HF_DISTILL_CACHE": cache}
        done = subprocess.run([sys.executable, "-m", "hf_distill", *command], env=environment)
    if done.returncode:
        raise InputError(f"the command ended with code {done.returncode}", where=str(folder), cure="See above")


# ---- What has changed ----
def _other_machine(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What differs between then and now and may change the last digits."""
    from ..hub.manifest import code_version, hardware, versions

    before, now = manifest.get("versions", {}), versions()
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name) or 'not there'} and is {now.get(name) or 'not there'}"
    commit = code_version()
    if manifest.get("code") != commit:
        yield f"the code was {manifest.get('code') or 'no checkout'} and is {commit or 'no checkout'}"
    before, now = manifest.get("hardware", {}), hardware()
    for name in ("processor", "threads", "gpus"):
        if before.get(name) != now.get(name):
            yield f"{name}: {before.get(name)} then, {now.get(name)} now"


def check_source(source: Mapping[str, Any], manifest: Mapping[str, Any], moved: Mapping[str, str]) -> Iterator[str]:
    """What is no longer as it was about one thing that the run had read, in words."""
    name = moved.get(_plain(source["name"]), source["name"])
    # A commit names a state of the repository; of what was moved only the content counts.
    revision = source.get("revision") if name == source["name"] else None
    label = f"{source['kind']} {name}" + (f" at {revision}" if revision else "")
    try:
        before, now = _CHECKS[source["kind"]](name, revision, source, manifest, moved)
    except InputError as error:
        yield f"{label}: {error}"
        return
    for part in sorted({*before, *now}):
        if before.get(part) != now.get(part):
            state = "differs" if part in before and part in now else "is gone" if part in before else "is new"
            yield f"{label}: {part} {state}"


def _model(name: str, revision: str | None, source: Mapping[str, Any], *_: Any) -> tuple[dict, dict]:
    from ..hub.client import split_revision
    from ..models.source import find_model, model_files

    if revision is not None:
        name = split_revision(name)[0]
    return source["files"], model_files(find_model(name, revision).folder)


def _data(name: str, revision: str | None, source: Mapping[str, Any], *_: Any) -> tuple[dict, dict]:
    from ..data import load_collection
    from ..data.sources import commit_of

    if "fingerprints" not in source:
        return {"the commit": source.get("revision")}, {"the commit": commit_of(name, source.get("revision"))}
    return source["fingerprints"], load_collection(name, revision=revision).fingerprints


def _rows(
    name: str, revision: str | None, source: Mapping[str, Any], manifest: Mapping[str, Any], moved: Mapping[str, str]
) -> tuple[dict, dict]:
    from . import row_sets, steps
    from .options import CollectionOptions

    data = next((one for one in manifest["sources"] if one["kind"] == "data"), None)
    if data is None:
        raise InputError("it is not known for which collection they are", where="manifest", cure="Use --force")
    place = moved.get(_plain(data["name"]), data["name"])
    opened = steps.Data.open(CollectionOptions(place, data["revision"] if place == data["name"] else None))
    rows = row_sets.named_rows(opened, name, revision)
    return {"the content": source["fingerprint"]}, {"the content": rows.fingerprint}


def _file(name: str, revision: str | None, source: Mapping[str, Any], *_: Any) -> tuple[dict, dict]:
    from ..data.sources import content_hash

    return {"the content": source["fingerprint"]}, {"the content": content_hash(Path(name))}


def _folder(name: str, revision: str | None, source: Mapping[str, Any], *_: Any) -> tuple[dict, dict]:
    from ..data.sources import folder_hashes

    if not Path(name).is_dir():
        raise InputError("there is no such folder", where=name, cure="Say where it is with --replace")
    return source["files"], folder_hashes(Path(name))


_CHECKS = {"model": _model, "data": _data, "rows": _rows, "file": _file, "folder": _folder}


# ---- What came of it ----
def compare_results(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Prints whether figures, weights and rows are equal; ends with code 1 if they are not."""
    found = list(_results(before, now))
    if not found:
        raise InputError(
            "its manifest holds no result to compare", where="reproduce", cure="Compare the files yourself"
        )
    rows = [(name, a, b, "equal" if a == b else "DIFFERENT") for name, a, b in found]
    print_table("The same again?", ["result", "original", "again", ""], rows)
    different = [name for name, a, b, _ in rows if a != b]
    if different:
        logger.error("%d of %d results differ from the original's", len(different), len(rows))
        raise SystemExit(1)
    logger.info("all %d results are equal", len(rows))


def _results(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    places = {"weights": ("models", "student", "weights"), "rows": ("data", "rows", "fingerprint")}
    for stage, made in _mapping(before, "data", "stages").items():
        places |= {f"{stage}: {name}": ("data", "stages", stage, name) for name in made if name != "verb"}
    found = 0
    for name, place in places.items():
        values = [_at(manifest, place) for manifest in (before, now)]
        if any(values):
            found += 1
            yield name, *values
    for dataset, systems in _mapping(before, "metrics").items():
        for system, values in systems.items():
            for measure, value in values.items():
                if measure not in _TIMES:
                    found += 1
                    yield f"{dataset} {system} {measure}", value, _at(now, ("metrics", dataset, system, measure))
    if not found:  # a collection, an index for another engine
        for name, facts in _mapping(before, "artefacts").items():
            if name.endswith(_CONTENT):
                yield name, *(one and one[:16] for one in (facts["sha256"], _at(now, ("artefacts", name, "sha256"))))


def _mapping(manifest: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    value = _at(manifest, keys)
    return value if isinstance(value, Mapping) else {}


def _at(value: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


VERB = Verb(
    "reproduce",
    "Print the command that made a model or data set, or run it again, and say what differs.",
    (ReproduceOptions,),
    run,
    example="hf-distill reproduce outputs/student\n  hf-distill reproduce you/student@main --run --output_dir again",
    words=leading_words("target"),
)
