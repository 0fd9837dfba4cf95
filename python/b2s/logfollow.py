"""Events of runs as they happen: what the tables hold, read again whenever something may have been added.

Events become visible with the commit of their transaction, in another order than they happened in, so what
was shown is remembered and not the time up to which everything was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from b2s.db import Connection
from b2s.output import documents

Event = dict[str, Any]

EVENTS: Final = """
select * from etl.run_events e where e.run_id = any (%(run_ids)s::bigint[])
 order by e.at, e.event like '%%started' desc, e.order_index, e.attempt, e.log_id"""
_GOING_ON: Final = "select r.run_id from etl.runs r where r.status = 'running' order by r.run_id"
_NEWER: Final = "select r.run_id from etl.runs r where r.run_id > %s order by r.run_id"
_NEWEST: Final = "select coalesce(max(r.run_id), 0) from etl.runs r"
_ENDED: Final = """
select r.run_id from etl.runs r where r.run_id = any (%s::bigint[]) and r.ended_at is not null"""
_KEY: Final = ("event", "order_index", "procedure", "attempt", "log_id")
"""What an event is known by. Not its time: the start of a step is noted again when it is executed."""
_LOOKED_EVERY: Final = 2.0
_SETTLES_IN: Final = 0.2


class Follower:
    """The events of one run until it has ended, or of everything that goes on and is to come."""

    def __init__(self, run_id: int | None) -> None:
        self._run_id = run_id
        self._watched: dict[int, set[tuple[Any, ...]]] = {} if run_id is None else {run_id: set()}
        self._newest: int | None = None

    def follow(self, connection: Connection) -> Iterator[Event]:
        """Yields each event once, also when called again with another connection. Ends with the run."""
        connection.execute("listen etl")
        while True:
            ended = self._look(connection)
            yield from self._news(connection)
            for run_id in ended:
                del self._watched[run_id]
            if self._run_id is not None and not self._watched:
                return
            if any(connection.notifies(timeout=_LOOKED_EVERY, stop_after=1)):
                # Much is announced at once: look when that has settled.
                time.sleep(_SETTLES_IN)

    def _look(self, connection: Connection) -> list[int]:
        """Watches runs that began; returns those that have ended, whose events are all there by now."""
        if self._run_id is None:
            if self._newest is None:
                self._newest = _first(connection, _NEWEST)
                begun = connection.execute(_GOING_ON).fetchall()
            else:
                begun = connection.execute(_NEWER, [self._newest]).fetchall()
            for (run_id,) in begun:
                self._watched.setdefault(run_id, set())
                self._newest = max(self._newest, run_id)
        watched = list(self._watched)
        return [run_id for (run_id,) in connection.execute(_ENDED, [watched]).fetchall()]

    def _news(self, connection: Connection) -> Iterator[Event]:
        for event in documents(connection, EVENTS, {"run_ids": list(self._watched)}):
            seen = self._watched[event["run_id"]]
            key = tuple(event[name] for name in _KEY)
            if key not in seen:
                seen.add(key)
                yield event


def _first(connection: Connection, query: str) -> int:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None  # noqa: S101 - an aggregate has a row
    value: int = row[0]
    return value
