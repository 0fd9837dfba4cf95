"""Text for people: tables that fit the terminal, colours that can be turned off, durations and dates.

Nothing here knows what is shown. Text that comes from a database passes `visible`, so that it cannot steer
the terminal that shows it.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TextIO

_COLOURS: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_NARROWEST: Final = 12
_GAP: Final = "  "
STATUS_COLOURS: Final = {
    "succeeded": "green", "running": "cyan", "completed_with_warnings": "yellow", "retrying": "yellow",
    "skipped": "yellow", "queued": "dim", "pending": "dim", "rolled_back": "yellow", "failed": "red",
    "cancelled": "red", "abandoned": "red", "ok": "green", "hint": "cyan", "warn": "yellow",
    "fail": "red",
}  # fmt: skip
"""How each status of a run, step, refresh or check is shown."""


@dataclass(frozen=True, slots=True)
class Style:
    """What a stream can show: colours or none, and how many columns (None: not a terminal, no limit)."""

    is_coloured: bool = False
    width: int | None = None

    @classmethod
    def of(cls, stream: TextIO | None) -> Style:
        """The style of a stream. NO_COLOR (any value), TERM=dumb and what is no terminal turn colours off."""
        if stream is None or stream.closed or not stream.isatty():
            return cls()
        has_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        return cls(has_colours, max(40, shutil.get_terminal_size().columns))

    def paint(self, text: str, colour: str) -> str:
        """The text in a colour (bold, dim, red, green, yellow, cyan), or as it is where there are none."""
        if not self.is_coloured or colour not in _COLOURS:
            return text
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"

    def status(self, status: str) -> str:
        """A status in its colour."""
        return self.paint(status, STATUS_COLOURS.get(status, ""))


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. One that may wrap gives way on a narrow terminal; an empty one is left out."""

    title: str
    is_number: bool = False
    may_wrap: bool = False
    width: int = 0


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], style: Style) -> list[str]:
    """The lines of a table: a title row, then one or more for each of `rows`. None is shown as nothing."""
    texts = [["" if cell is None else visible(str(cell)) for cell in row] for row in rows]
    shown = [index for index in range(len(columns)) if any(row[index] for row in texts)]
    if not shown:
        return []
    layout = [
        replace(columns[index], width=max(len(columns[index].title), *(len(row[index]) for row in texts)))
        for index in shown
    ]
    layout = _fitted(layout, style.width)
    lines = [style.paint(_line(layout, [column.title for column in layout], style, is_title=True), "bold")]
    for row in texts:
        cells = [_wrapped(row[index], column) for index, column in zip(shown, layout, strict=True)]
        lines += [
            _line(layout, [cell[part] if part < len(cell) else "" for cell in cells], style)
            for part in range(max(len(cell) for cell in cells))
        ]
    return lines


def _fitted(layout: list[Column], width: int | None) -> list[Column]:
    """Takes the excess from the widest columns that may wrap, a column at a time, none below its minimum."""
    if width is None:
        return layout
    excess = sum(column.width for column in layout) + len(_GAP) * (len(layout) - 1) - width
    while excess > 0:
        candidates = [
            index for index, column in enumerate(layout) if column.may_wrap and column.width > _NARROWEST
        ]
        if not candidates:
            break
        widest = max(candidates, key=lambda index: layout[index].width)
        layout[widest] = replace(layout[widest], width=layout[widest].width - 1)
        excess -= 1
    return layout


def _wrapped(text: str, column: Column) -> list[str]:
    if len(text) <= column.width:
        return [text]
    return textwrap.wrap(text, column.width, break_on_hyphens=False) or [""]


def _line(layout: Sequence[Column], cells: Sequence[str], style: Style, *, is_title: bool = False) -> str:
    parts = []
    for column, cell in zip(layout, cells, strict=True):
        padded = cell.rjust(column.width) if column.is_number else cell.ljust(column.width)
        is_status = not is_title and cell in STATUS_COLOURS
        parts.append(padded.replace(cell, style.status(cell), 1) if is_status else padded)
    return _GAP.join(parts).rstrip()


def visible(text: str) -> str:
    """The text on one line, with control characters replaced."""
    if text.isprintable():
        return text
    return "".join(_shown(char) for char in text)


def visible_lines(text: str) -> list[str]:
    """The lines of a text, with control characters replaced."""
    return [visible(line.expandtabs(4)) for line in text.splitlines()]


def _shown(char: str) -> str:
    if char in "\n\t\r":
        return " "
    return "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char


def duration(milliseconds: float | None) -> str:
    """`45 ms`, `2.3 s`, `3 min 12 s`, `2 h 05 min`; nothing for None."""
    if milliseconds is None:
        return ""
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(text: str | None) -> str:
    """A timestamp of the database without its fraction: `2026-11-21 07:20:11`."""
    return "" if text is None else text[:19].replace("T", " ")


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun if count == 1 else plural_noun or noun + 's'}"
