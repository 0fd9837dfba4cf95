"""HTML that escapes what is put into it, unless it is HTML already."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final

Child = object
_VOID: Final = frozenset({"br", "col", "meta", "input", "rect", "line", "path", "circle", "polyline"})


class Html(str):
    """Markup; everything else is text."""

    __slots__ = ()


def tag(name: str, *children: Child, **attributes: object) -> Html:
    """An element. None and False leave out a child or an attribute, True makes it bare; class_ is `class`."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.rstrip("_").replace("_", "-")
        parts.append(f" {shown}" if value is True else f' {shown}="{_escaped(value)}"')
    if name in _VOID:
        return Html("".join((*parts, "/>" if name not in ("br", "col", "meta", "input") else ">")))
    return Html("".join((*parts, ">", join(children), f"</{name}>")))


def join(children: Iterable[Child]) -> Html:
    """Children one after the other; what is no HTML is escaped, control characters are replaced."""
    return Html("".join(_child(one) for one in children if one is not None and one is not False))


def _child(child: Child) -> str:
    return child if isinstance(child, Html) else _escaped(child)


def _escaped(value: object) -> str:
    text = str(value)
    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return escape(text)
