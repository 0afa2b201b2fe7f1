"""Teachers: live or cached, one or several, behind one interface."""

from __future__ import annotations

from ..lazy import attach


__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "base": ["Teacher"],
        "cached": ["CachedEmbeddings", "CachedScores", "check_column"],
        "live": ["Anchor", "JointTeacher", "LiveTeacher"],
    },
)
