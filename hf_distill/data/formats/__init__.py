"""Foreign formats: MS MARCO's files, Tevatron's JSON lines, lists of negatives, runs, pickled scores."""

from __future__ import annotations

from ...lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "conversion": ["Conversion", "convert"],
        "opening": ["FORMATS", "open_collection", "open_inputs", "open_rows"],
        "source": ["FormatSource", "Input"],
        "pickles": ["read_pickled_items"],
    },
)
