"""Comments that say why a finding is none: `-- b2s: ignore[B401] reason`, `ignore-next[..]`,
`ignore-file[..]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from b2s.lint.sources import Source

_COMMENT: Final = re.compile(
    r"--[ \t]*b2s:[ \t]*(?P<what>ignore(?:-next|-file)?)(?:\[(?P<codes>[^\]\n]*)\])?(?P<reason>[^\n]*)"
)
_CODE: Final = re.compile(r"^B\d{3}$")


@dataclass(slots=True)
class Suppression:
    """One comment: the codes it silences, on which line (None: in the whole file), and those that it did
    silence.
    """

    offset: int
    codes: tuple[str, ...]
    line: int | None
    reason: str
    used: set[str] = field(default_factory=set)

    def silences(self, code: str, line: int) -> bool:
        """Whether it silences a finding; if so it has been of use."""
        if code not in self.codes or (self.line is not None and self.line != line):
            return False
        self.used.add(code)
        return True


def find(source: Source) -> Iterator[Suppression]:
    """The suppressions of a source, malformed ones included."""
    for match in _COMMENT.finditer(source.text):
        line, column = source.place(match.start())
        is_alone = not source.line(line)[: column - 1].strip()
        codes = tuple(code.strip() for code in (match["codes"] or "").split(",") if code.strip())
        target = _next_code_line(source, line) if is_alone or match["what"] == "ignore-next" else line
        reason = match["reason"].strip(" :,-\t")
        yield Suppression(match.start(), codes, None if match["what"] == "ignore-file" else target, reason)


def _next_code_line(source: Source, line: int) -> int:
    """The next line that holds more than a comment."""
    last, _ = source.place(len(source.text))
    number = line + 1
    while number <= last and (
        not source.line(number).strip() or source.line(number).lstrip().startswith("--")
    ):
        number += 1
    return number


def mistakes(suppression: Suppression, known: set[str]) -> Iterator[str]:
    """What is wrong with a suppression itself."""
    if not suppression.codes:
        yield "names no rule: write -- b2s: ignore[B401] and why"
    for code in suppression.codes:
        if not _CODE.match(code) or code not in known:
            yield f"names {code}, which is no rule"
    if suppression.codes and not suppression.reason:
        yield "gives no reason"
