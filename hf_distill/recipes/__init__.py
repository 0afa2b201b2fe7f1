"""The stage graph: a YAML file of named stages that is run in order, skips what is done and resumes what is not."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "kinds": ["KINDS", "StageKind", "register_kind"],
        "loading": ["Recipe", "Stage", "load_recipe", "recipe_path"],
        "runner": ["RecipeRun"],
    },
)
