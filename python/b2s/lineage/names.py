"""Names of relations: as SQL writes them, and in parts."""

from __future__ import annotations

import re
from typing import Final

_PART: Final = re.compile(r'"((?:[^"]|"")+)"|([^."]+)')


def parts_of(relation: str) -> list[str]:
    """The parts of a qualified name without their quotes: `silver."Odd.Name"` is silver, Odd.Name."""
    return [
        quoted.replace('""', '"') if quoted else plain for quoted, plain in _PART.findall(relation)
    ]
