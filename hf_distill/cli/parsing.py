"""From a YAML file and flags to option objects; a flag wins over the file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import time
import typing
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError, InputError
from ..settings import parse_yaml


# How long another process than the main one waits before it speaks of bad input.
_PATIENCE_SECONDS = 10.0
_CONFIG = {"metavar": "FILE.yaml", "help": "A YAML file with any of these fields; flags win."}
# The exit code of a run that is complete on this machine but not on the Hub.
NOT_PUSHED = 3


@dataclass(frozen=True)
class Verb:
    """One thing that `hf-distill` does.

    Args:
        name: As it is typed.
        summary: One line for `--help`.
        options: Option classes without heavy imports, for `--help`.
        arguments: Makes the classes that are parsed in a run; it may import heavily.
        run: Does the work, given an instance of each class of `arguments`.
        example: A command line for `--help`.
        words: Brings what was typed into the form `--field value`, for a verb that takes more than that.
    """

    name: str
    summary: str
    options: tuple[type, ...]
    run: Callable[..., Any]
    arguments: Callable[[], tuple[type, ...]] | None = None
    example: str = ""
    words: Callable[[Sequence[str]], list[str]] | None = None


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Shows defaults that say something, and each flag in one spelling."""

    def _get_help_string(self, action: Any) -> str | None:
        if action.default in (None, SUPPRESS) or "efault" in (action.help or "") or not action.option_strings:
            return action.help
        return f"{action.help} Default: %(default)s."

    def _format_action_invocation(self, action: Any) -> str:
        metavar = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar or "VALUE"
        return f"{action.option_strings[0]} {metavar}" if action.nargs != 0 else ", ".join(action.option_strings)

    def add_argument(self, action: Any) -> None:
        # The parser adds a `--no_...` twin to every switch; `--switch false` says the same.
        if not any(name.startswith("--no_") and action.nargs == 0 for name in action.option_strings):
            super().add_argument(action)


def _help(verb: Verb) -> str:
    """What the parser of `verb.options` would print, without the second that importing it takes."""
    parser = ArgumentParser(**_presentation(verb))
    for cls in verb.options:
        group = parser.add_argument_group(cls._argument_group_name) if hasattr(cls, "_argument_group_name") else parser
        for one in dataclasses.fields(cls):
            shown = {"choices": one.metadata.get("choices"), "help": one.metadata.get("help"), "default": one.default}
            group.add_argument(f"--{one.name}", **shown)
    parser.add_argument("--config", **_CONFIG)
    return parser.format_help()


def _presentation(verb: Verb) -> dict[str, Any]:
    epilog = f"example:\n  {verb.example}\n" if verb.example else ""
    if verb.arguments is not None:
        epilog += (
            "\nAll other fields of TrainingArguments are flags too, such as --max_steps, --bf16 and\n"
            "--per_device_train_batch_size; --help_all lists them.\n"
        )
    return {
        "prog": f"hf-distill {verb.name}",
        "usage": f"hf-distill {verb.name} [--config FILE.yaml] [--field value ...]",
        "description": verb.summary,
        "epilog": epilog,
        "formatter_class": _HelpFormatter,
        "allow_abbrev": False,
    }


def _parser(verb: Verb, classes: Sequence[type]):
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str):
            flag, _, problem = message.removeprefix("argument ").partition(": ")
            where = flag.partition("/")[0] if problem and message.startswith("argument ") else None
            raise InputError(problem if where else message, where=where, cure=f"See hf-distill {verb.name} --help")

    parser = Parser(classes, **_presentation(verb))
    parser.add_argument("--config", **_CONFIG)
    return parser


def parse(verb: Verb, argv: Sequence[str]) -> list[Any]:
    """Parses the command line of a verb.

    Returns:
        An instance of each class of `verb.arguments` (or `verb.options`).

    Raises:
        InputError: For an unknown field or a value that does not fit, naming the file or flag.
    """
    argv = list(argv) if verb.words is None else verb.words(argv)
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(_help(verb))
        raise SystemExit(0)
    classes = verb.arguments() if verb.arguments is not None else verb.options
    parser = _parser(verb, classes)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    config = _take_config(argv)
    fields = _fields(classes)
    from_file = _flags_of_file(config, fields) if config is not None else []
    _check_flags(argv, fields)
    try:
        parser.parse_known_args(from_file)
    except InputError as error:
        raise _found_in(str(config), error) from None
    return _parsed(verb, parser, [*from_file, *argv])


def expanded(verb: Verb, argv: Sequence[str]) -> list[str]:
    """The command line of a verb with the fields of its `--config` file as flags in front of it."""
    words = list(argv) if verb.words is None else verb.words(argv)
    config = _take_config(words)
    if config is None:
        return words
    return [*_flags_of_file(config, _fields(verb.arguments() if verb.arguments else verb.options)), *words]


def parse_settings(verb: Verb, settings: Mapping[str, Any], where: str) -> list[Any]:
    """Parses the settings of a verb as `parse` does those of a file.

    Raises:
        InputError: For an unknown field or a value that does not fit, naming `where` and the field.
    """
    classes = verb.arguments() if verb.arguments is not None else verb.options
    try:
        return _parsed(verb, _parser(verb, classes), _flags(settings, _fields(classes), where))
    except InputError as error:
        raise _found_in(where, error) from error


def _found_in(where: str, error: InputError) -> InputError:
    """The error of a parser that was given settings as flags, with the place where they stand."""
    if error.where is None:
        place = where
    else:
        place = f"{where}, field {error.where[2:]!r}" if error.where.startswith("--") else error.where
    return InputError(error.problem, where=place, cure=error.cure)


def _fields(classes: Sequence[type]) -> dict[str, dataclasses.Field]:
    return {field.name: field for cls in classes for field in dataclasses.fields(cls) if field.init}


def _parsed(verb: Verb, parser: Any, words: Sequence[str]) -> list[Any]:
    try:
        *parsed, _, stray = parser.parse_args_into_dataclasses(
            list(words), look_for_args_file=False, return_remaining_strings=True
        )
    except InputError:
        raise
    except (ValueError, ImportError) as error:
        # TrainingArguments refuses some options together, and some without a library.
        raise InputError(" ".join(str(error).split()), cure=f"See hf-distill {verb.name} --help_all") from error
    if stray:
        raise InputError(
            f"{' '.join(stray)!r} belongs to no field",
            where="command line",
            cure=f"Write --field value; see hf-distill {verb.name} --help",
        )
    return parsed


def leading_words(field: str) -> Callable[[Sequence[str]], list[str]]:
    """For `Verb.words`: what stands before the first flag belongs to `field`."""

    def words(argv: Sequence[str]) -> list[str]:
        argv = list(argv)
        first = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
        return [*([f"--{field}", *argv[:first]] if first else []), *argv[first:]]

    return words


def _take_config(argv: list[str]) -> Path | None:
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            path = Path(argv[position + 1])
            del argv[position : position + 2]
        elif word.startswith("--config="):
            path = Path(word.partition("=")[2])
            del argv[position]
        else:
            continue
        if not path.is_file():
            raise InputError(f"there is no file {path}", where="--config", cure="Give the path of a YAML file")
        return path
    return None


def _unknown(name: str, known: Sequence[str], where: str) -> InputError:
    close = difflib.get_close_matches(name, known, n=3)
    cure = f"Did you mean {' or '.join(close)}" if close else "See --help and --help_all for the fields"
    return InputError(f"unknown field {name!r}", where=where, cure=cure)


def _check_flags(argv: Sequence[str], fields: dict[str, Any]) -> None:
    for word in argv:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            if name not in fields and name.removeprefix("no_") not in fields:
                raise _unknown(name, list(fields), "command line")


def _flags_of_file(path: Path, fields: dict[str, Any]) -> list[str]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}", where=str(path), cure="Save it as UTF-8") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        cure = "Write lines such as 'learning_rate: 2e-5'"
        raise InputError("must map fields to values", where=str(path), cure=cure)
    return _flags(content, fields, str(path))


def _flags(content: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], where: str) -> list[str]:
    flags = []
    for name, value in content.items():
        name = str(name).replace("-", "_")
        if name not in fields:
            raise _unknown(name, list(fields), f"{where}, field {name!r}")
        flags += _flag(name, value, fields[name])
    return flags


def _flag(name: str, value: Any, field: dataclasses.Field) -> list[str]:
    if value is None:
        return []
    is_list = "list[" in str(field.type) and not isinstance(field.type, type)
    is_list = is_list or typing.get_origin(field.type) is list
    if isinstance(value, list) and is_list:
        return [f"--{name}", *map(str, value)]
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, (dict, list)):
        return [f"--{name}={json.dumps(value)}"]
    return [f"--{name}={value}"]


def require(verb: str, **what: tuple[Any, str]) -> None:
    """Raises [`InputError`] that lists everything a verb still needs.

    Args:
        verb: For the message.
        what: For each field its value, and what it is.
    """
    missing = [f"--{name} ({text})" for name, (value, text) in what.items() if value is None]
    if missing:
        raise InputError(f"hf-distill {verb} still needs {', '.join(missing)}", cure=f"See hf-distill {verb} --help")


def exit_with(error: InputError | HubError, code: int = 2) -> typing.NoReturn:
    """Prints one sentence on standard error and ends the process with a code: 2 for bad input.

    Several processes mostly meet the same bad input. The main one speaks, and the launcher ends the others before they
    do; what the main one has not met is said by the process that has.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(_PATIENCE_SECONDS)
    sys.stderr.write(f"error{f' in process {rank}' if rank else ''}: {error}\n")
    raise SystemExit(code)
