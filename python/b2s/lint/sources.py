"""Where SQL comes from, and where in it something stands."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from b2s.errors import UsageError

_HIDDEN: Final = "."


@dataclass(slots=True)
class Source:
    """A text with a name."""

    path: str
    text: str
    is_database: bool = False
    _starts: list[int] = field(default_factory=list)

    def place(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both from 1."""
        if not self._starts:
            self._starts = line_starts(self.text)
        offset = max(0, min(offset, len(self.text)))
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def offset(self, number: int) -> int:
        """The offset at which a line begins, from 1."""
        self.place(0)
        return self._starts[max(1, min(number, len(self._starts))) - 1]

    def line(self, number: int) -> str:
        """The text of a line, from 1."""
        lines = self.text.split("\n")
        return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else ""


def line_starts(text: str) -> list[int]:
    """The offset at which each line begins."""
    return [0, *(index + 1 for index, character in enumerate(text) if character == "\n")]


def read_files(paths: Iterable[str]) -> list[Source]:
    """The .sql files that paths name, or hold when they are folders, in order. Raises UsageError for none."""
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = (one for one in path.rglob("*.sql") if one.is_file())
            kept = [one for one in inside if not _is_hidden(one.relative_to(path))]
            if not kept:
                raise UsageError(f"{path} holds no .sql file", "name the files or the folder of your SQL")
            found.update(dict.fromkeys(sorted(kept)))
        elif path.exists():
            found[path] = None
        else:
            raise UsageError(f"{path} does not exist", "name the files or the folder of your SQL")
    return [Source(path.as_posix(), _text(path)) for path in found]


def _text(path: Path) -> str:
    """The text of a file; what is no UTF-8 or cannot stand in SQL becomes the replacement character."""
    data = path.read_bytes()
    return data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\0", "\ufffd")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(_HIDDEN) for part in path.parts)
