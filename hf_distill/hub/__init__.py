"""The way to the Hub and back, and what is told about a run: manifest and cards."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "cards": ["write_model_card"],
        "manifest": ["hardware", "run_manifest", "without_secrets"],
        "push": ["Pushed", "Target", "push_folder"],
    },
)
