"""Statements that change a table while it is read and written.

Brief ones need a lock that keeps others out. Who waits for such a lock has everybody else wait behind it, so
each attempt stands in the queue for a moment only, and is repeated with growing pauses. Indexes are built
concurrently: that takes as long as it takes, and nobody waits for it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from b2s.db import Connection
from b2s.errors import DatabaseError
from b2s.render import plural
from b2s.watermarkcolumn import Step, Table

QUEUE_MS: Final = 100
"""How long one attempt may stand in the queue for a lock, and others behind it."""
_SHORTEST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
_AGAIN: Final = "try again later, or for longer: --lock-timeout 1min"

_IN_THE_WAY: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
    psycopg.errors.DeadlockDetected,
)

_HOLDERS: Final = """
select l.pid, a.usename, a.application_name, a.state,
       to_char(coalesce(x.prepared, a.xact_start), 'YYYY-MM-DD HH24:MI:SS'), x.gid,
       coalesce(a.pid is not null and a.usesysid is null, false)
  from pg_locks l
  left join pg_stat_activity a on a.pid = l.pid
  left join pg_locks t on l.pid is null and t.pid is null and t.locktype = 'transactionid'
                      and t.virtualtransaction = l.virtualtransaction
  left join pg_prepared_xacts x on x.transaction = t.transactionid
 where l.locktype = 'relation' and l.granted and l.pid is distinct from pg_backend_pid()
   and l.database = (select oid from pg_database where datname = current_database())
   and (l.relation = any (%(tables)s::oid[])
        or l.relation in (select indexrelid from pg_index where indrelid = any (%(tables)s::oid[])))
 order by coalesce(x.prepared, a.xact_start), l.pid"""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was executed."""

    step: Step
    duration_ms: float
    attempts: int


@dataclass(frozen=True, slots=True)
class _Holder:
    """Somebody who has the table locked."""

    pid: int | None
    user: str | None
    application: str | None
    state: str | None
    since: str | None
    prepared: str | None
    is_autovacuum: bool


def script(steps: Sequence[Step]) -> Iterator[str]:
    """The steps for psql."""
    yield "-- For psql -v ON_ERROR_STOP=1. A transaction that gets no lock in time is to be sent again."
    for step in steps:
        yield f"-- {step.purpose}"
        yield f"set lock_timeout = '{QUEUE_MS}ms';" if step.is_brief else "set lock_timeout = 0;"
        yield from ["begin;"] if step.is_brief else []
        yield from (f"{statement};" for statement in step.statements)
        yield from ["commit;"] if step.is_brief else []


def execute(
    connection: Connection,
    table: Table,
    steps: Sequence[Step],
    *,
    patience_ms: int,
    report: Callable[[Done], None],
) -> list[Done]:
    """Executes the steps, and reports each when it is done.

    Raises DatabaseError when a lock cannot be had within patience_ms; what was done stays, and the next call
    goes on from there.
    """
    done = []
    for step in steps:
        started = time.monotonic()
        attempts = _alter(connection, table, step, patience_ms) if step.is_brief else _build(connection, step)
        done.append(Done(step, (time.monotonic() - started) * 1000, attempts))
        report(done[-1])
    return done


def _build(connection: Connection, step: Step) -> int:
    """Waits for the transactions that are open now, however long, and nobody waits for it."""
    connection.execute("set lock_timeout = 0")
    connection.execute("set statement_timeout = 0")
    try:
        for statement in step.statements:
            connection.execute(statement.encode())
    except psycopg.Error as error:
        raise DatabaseError(
            f"{step.purpose}: {error.diag.message_primary or error}",
            "run the same command again: it removes the unfinished index and goes on from there",
            sqlstate=error.sqlstate,
        ) from error
    return 1


def _alter(connection: Connection, table: Table, step: Step, patience_ms: int) -> int:
    deadline = time.monotonic() + patience_ms / 1000
    pause, queue_ms, attempts = _SHORTEST_PAUSE, QUEUE_MS, 0
    while True:
        attempts += 1
        try:
            _attempt(connection, table, step, queue_ms)
        except _IN_THE_WAY:
            holders = _holders(connection, table)
        else:
            return attempts
        if time.monotonic() > deadline:
            raise _refusal(table, holders, patience_ms)
        # An autovacuum gives way, but only to who has waited for it as long as deadlock_timeout.
        is_patient = holders and all(holder.is_autovacuum for holder in holders)
        queue_ms = QUEUE_MS + _deadlock_timeout_ms(connection) if is_patient else QUEUE_MS
        time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that two of them do not meet again
        pause = min(_LONGEST_PAUSE, pause * 2)


def _attempt(connection: Connection, table: Table, step: Step, queue_ms: int) -> None:
    """The locks of many partitions, each had in time, must not add up to a long wait either."""
    limit_ms = queue_ms + 1000 + 20 * len(table.members)
    with connection.transaction():
        connection.execute(f"set local lock_timeout = {queue_ms}".encode())
        connection.execute(f"set local statement_timeout = {limit_ms}".encode())
        for statement in step.statements:
            connection.execute(statement.encode())


def _holders(connection: Connection, table: Table) -> list[_Holder]:
    """Who has the table, a part of it or an index of it locked, the oldest transaction first."""
    tables = [member.oid for member in table.members]
    return [_Holder(*row) for row in connection.execute(_HOLDERS.encode(), {"tables": tables})]


def _deadlock_timeout_ms(connection: Connection) -> int:
    query = "select setting::int from pg_settings where name = 'deadlock_timeout'"
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def _refusal(table: Table, holders: Sequence[_Holder], patience_ms: int) -> DatabaseError:
    """Why there was no lock; the oldest transaction is the one to look at."""
    head = f"{table.root.name} is in use, there was no lock on it within {patience_ms / 1000:g} s"
    if not holders:
        return DatabaseError(f"{head}: sessions that come and go left no gap", _AGAIN, sqlstate="55P03")
    first, *others = holders
    since = f"since {first.since}" if first.since else "since a moment that is hidden"
    if first.prepared is not None:
        who, end = f"prepared transaction {first.prepared}", f"rollback prepared '{first.prepared}'"
    else:
        named = ", ".join(filter(None, (first.user, first.application, first.state)))
        who, end = f"backend {first.pid} ({named})", f"select pg_terminate_backend({first.pid})"
    count = len({(other.pid, other.prepared) for other in others} - {(first.pid, first.prepared)})
    more = f", and so have {plural(count, 'other')}" if count > 1 else ", and so has 1 other" if count else ""
    return DatabaseError(
        f"{head}: {who} has one, in a transaction {since}{more}", f"{_AGAIN}; or: {end}", sqlstate="55P03"
    )
