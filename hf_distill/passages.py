"""A passage is one string: how the title and the text of a document become it, for everybody who reads documents."""

from __future__ import annotations

import functools
import string

from .errors import InputError


DEFAULT_TEMPLATE = "{title} {text}"


@functools.lru_cache(maxsize=64)
def check_template(template: str) -> str:
    """Returns `template` if `{title}` and `{text}` are its only fields and `{text}` is there, else `InputError`."""
    cure = f"A template such as {DEFAULT_TEMPLATE!r} or '{{title}}[SEP]{{text}}' has {{text}} and perhaps {{title}}"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise InputError(f"{template!r} is not a template ({error})", where="passage template", cure=cure) from None
    if "text" not in fields or fields - {"title", "text"}:
        raise InputError(f"{template!r} has the fields {sorted(fields)}", where="passage template", cure=cure)
    return template


def render_passage(title: str | None, text: str, template: str = DEFAULT_TEMPLATE) -> str:
    """The one string that stands for a passage in training, encoding, scoring and export.

    Args:
        title: The title; `None` and `""` are the same.
        text: The text.
        template: Where they go; see `check_template`.

    Returns:
        The filled template without blanks at its ends, so that a passage without a title begins with its text.
    """
    return check_template(template).format(title=title or "", text=text).strip()
