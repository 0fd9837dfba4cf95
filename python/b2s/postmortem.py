"""What else the database knows about a run that did not succeed: places, blockers, later changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import psycopg

from b2s.db import Connection
from b2s.output import documents

_FRAME: Final = re.compile(r"^PL/pgSQL function (?P<routine>.+) line (?P<line>\d+) at ", re.MULTILINE)
_MOST_PLACES: Final = 3
_AROUND: Final = 1
_MORE: Final = """
select p.order_index, p.attempt, p.worker_pid, p.blocked_by, p.timed_out_at,
       p.settings->'search_path' as search_path
  from etl.procedure_runs p where p.run_id = %(run_id)s and p.started_at is not null"""
_CHANGED: Final = """
select s.order_index, bool_or(s.definition <> etl._definition(p))
  from etl.procedure_runs s join etl.procedures p using (procedure_id)
 where s.run_id = %s group by s.order_index"""
_ROUTINE: Final = "select p.prosrc from pg_catalog.pg_proc p where p.oid = to_regprocedure(%s)"
_RESUMED: Final = "select max(r.run_id) from etl.runs r where r.parent_run_id = %s and r.kind = 'run'"


def enrich(connection: Connection, run: dict[str, Any]) -> dict[str, Any]:
    """The document of etl.get_run with more: of each attempt `worker_pid`, `blocked_by`, `timed_out_at`,
    `is_changed` and `places`; of the run `resumed_as`, the run that has taken it up.
    """
    run_id = run["run_id"]
    known = {
        (one["order_index"], one["attempt"]): one for one in documents(connection, _MORE, {"run_id": run_id})
    }
    changed = _changed(connection, run_id)
    steps = []
    for step in run["steps"] or []:
        more = dict(known.get((step["order_index"], step["attempt"]), {}))
        path = more.pop("search_path", None)
        steps.append(
            {
                **more,
                **step,
                "is_changed": changed.get(step["order_index"]),
                "places": list(_places(connection, step["error_context"] or "", path or [])),
            }
        )
    row = connection.execute(_RESUMED, [run_id]).fetchone()
    return {**run, "steps": steps, "resumed_as": row[0] if row else None}


def _changed(connection: Connection, run_id: int) -> dict[int, bool | None]:
    """Whether the routine of a step, or the way it is called, has changed since; None: not to be seen."""
    try:
        return dict(connection.execute(_CHANGED, [run_id]).fetchall())
    except psycopg.errors.InsufficientPrivilege:
        return {}


def _places(connection: Connection, context: str, search_path: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Where the error came from, innermost first: routine, line, and the lines there as they are now."""
    frames = [(found["routine"], int(found["line"])) for found in _FRAME.finditer(context)]
    for routine, line in [one for one in frames if not one[0].startswith("etl.")][:_MOST_PLACES]:
        source = _source(connection, routine, search_path)
        if source is None:
            continue
        lines = source.split("\n")
        first = max(1, line - _AROUND)
        shown = {str(first + offset): text for offset, text in enumerate(lines[first - 1 : line + _AROUND])}
        yield {"routine": routine, "line": line, "source": shown}


def _source(connection: Connection, routine: str, search_path: Sequence[str]) -> str | None:
    """The body of a routine that an error names as a step with this search_path sees it."""
    path = ", ".join(["pg_catalog", *(f'"{one.replace(chr(34), 2 * chr(34))}"' for one in search_path)])
    try:
        with connection.transaction():
            connection.execute("select set_config('search_path', %s, true)", [path])
            row = connection.execute(_ROUTINE, [routine]).fetchone()
    except psycopg.Error:
        return None  # it is gone, or its schema may not be used
    return row[0] if row else None
