"""How long to wait before the next try, and how to hear what a session says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import psycopg

from b2s.errors import DatabaseError

_PROGRESS: Final = "PT200"
_BEYOND_PATIENCE: Final = ("28", "3D", "3F", "42")


def is_beyond_patience(error: DatabaseError) -> bool:
    """Whether somebody has to do something: who may, which database, what is installed."""
    return (error.sqlstate or "")[:2] in _BEYOND_PATIENCE


def backoff(first: float = 0.25, most: float = 30.0) -> Iterator[float]:
    """Seconds to wait before each further try: doubled up to a limit, shortened by up to half at random."""
    import random  # a run that ends at once does not need it

    delay = first
    while True:
        yield delay * random.uniform(0.5, 1)  # noqa: S311 - spreads load, keeps no secret
        delay = min(2 * delay, most)


def event_in(notice: psycopg.errors.Diagnostic) -> dict[str, Any] | None:
    """The event of a run that a notice carries, or None: then it is a message for people."""
    if notice.sqlstate != _PROGRESS or not notice.message_detail:
        return None
    event: dict[str, Any] = json.loads(notice.message_detail)
    return event
