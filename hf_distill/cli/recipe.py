"""`hf-distill recipe`: a YAML file of stages, run in order, skipped where done, resumed where cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..provenance import note_source
from ..settings import option
from .parsing import Verb, require


_SHORT = {"--from": "--from_stage", "--until": "--until_stage"}


@dataclass
class RecipeOptions:
    """Which recipe, and how much of it."""

    _argument_group_name = "recipe"

    recipe: str | None = option(
        None, "A YAML file, or the name of a recipe that comes with the package. May stand first, without the flag."
    )
    profile: str | None = option(None, "One of the recipe's profiles, for example small.")
    set: list[str] | None = option(
        None, "Overrides: variable=value or stage.field=value, the value as YAML; the flag may be repeated."
    )
    from_stage: str | None = option(None, "Begin with this stage; those before it must be done. Short: --from.")
    until_stage: str | None = option(None, "End with this stage. Short: --until.")
    dry_run: bool = option(False, "Check everything, print the plan with its estimate, and stop.")
    output_dir: str | None = option(None, "Folder of the run. Default: outputs/NAME-PROFILE.")
    push_to: str | None = option(
        None, "Push every finished stage to a branch of this Hub repository; rows and figures to a dataset so named."
    )
    pull_from: str | None = option(None, "Take finished stages from this Hub repository instead of doing them.")


def _words(argv: Sequence[str]) -> list[str]:
    """`FILE --set a=1 --set b=2 --from x` in the form that the parser of options understands."""
    words: list[str] = []
    overrides: list[str] = []
    position = 0
    argv = list(argv)
    while position < len(argv):
        word = argv[position]
        name, equals, value = word.partition("=")
        if name == "--set":
            overrides += [value] if equals else []
            position += 1
            while position < len(argv) and not argv[position].startswith("--"):
                overrides.append(argv[position])
                position += 1
            continue
        if position == 0 and not word.startswith("-"):
            words += ["--recipe", word]
        else:
            words.append(_SHORT.get(name, name) + equals + value)
        position += 1
    return [*words, *(["--set", *overrides] if overrides else [])]


def run(options: RecipeOptions) -> None:
    """Loads the recipe and runs it, or prints its plan."""
    require("recipe", recipe=(options.recipe, "a YAML file, or the name of a recipe that comes with the package"))
    from ..files import file_fingerprint
    from ..recipes import RecipeRun, load_recipe

    recipe = load_recipe(options.recipe, options.profile, options.set or ())
    if Path(options.recipe).is_file():  # else it came with the package
        note_source("file", recipe.origin, lambda: {"fingerprint": file_fingerprint(recipe.origin)})
    folder = options.output_dir or f"outputs/{recipe.name}" + (f"-{recipe.profile}" if recipe.profile else "")
    job = RecipeRun(recipe, folder, push_to=options.push_to, pull_from=options.pull_from)
    if options.dry_run:
        job.show_plan(options.from_stage, options.until_stage)
    else:
        job.run(options.from_stage, options.until_stage)


VERB = Verb(
    "recipe",
    "Run a YAML file of stages in order: what is done is skipped, what was cut off goes on.",
    (RecipeOptions,),
    run,
    example="hf-distill recipe prod --profile small --set data=my_collection --dry-run",
    words=_words,
)
