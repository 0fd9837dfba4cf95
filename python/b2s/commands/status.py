"""b2s status: what is going on, and how things stand."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.db import Connection
    from b2s.render import Style

_LAST_RUNS: Final = """
select distinct on (h.pipeline) h.*,
       (select count(distinct s.order_index) from etl.step_history s
         where s.run_id = h.run_id and s.status not in ('pending', 'running', 'retrying')) as ended_steps,
       (select count(distinct l.pid) from pg_catalog.pg_locks l join etl.runs r on r.run_id = h.run_id
         where h.status = 'running' and l.locktype = 'advisory' and l.classid = 6435444 and l.granted
           and l.objid = etl._lock_key(r)::oid and l.objsubid = 2
           and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
       ) as workers
  from etl.run_history h
 where h.kind = 'run' and h.status <> 'queued'
 order by h.pipeline, h.status = 'running' desc, h.run_id desc"""
_QUEUED: Final = """
select h.pipeline, h.run_id, h.requested_by, h.submitted_at from etl.run_history h
 where h.status = 'queued' order by h.pipeline, h.run_id"""
_BACKFILLS: Final = """
select * from etl.backfill_progress b where b.status = 'running' order by b.pipeline, b.run_id"""
_HEALTH: Final = """
select h.*,
       case when h.is_late
            then extract(epoch from clock_timestamp() - coalesce(h.complete_at, h.last_success_at)) * 1000
                 - h.freshness_ms end as late_ms
  from etl.procedure_health h order by h.pipeline, h.type, h.procedure"""
_HORIZON: Final = (
    "select s.horizon, s.held_back_by from etl.metrics_server s where s.held_back_by is not null"
)
_FREEZE: Final = "select * from etl.full_refresh_freezes f order by f.freeze_id desc limit 1"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s status."""
    parser.add_argument(
        "-w",
        "--watch",
        nargs="?",
        const="2s",
        metavar="TIME",
        help="show it again every so often (2s), until Ctrl-C",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prints the last run of each pipeline, what an active one is at, each procedure's health, the freeze."""
    from b2s.db import connect
    from b2s.output import print_json, print_lines, style

    if arguments.watch:
        from b2s.watch import watch

        return watch(arguments.dsn, arguments.watch, _read, _lines, is_json=arguments.json)
    with connect(arguments.dsn) as connection:
        found = _read(connection)
    if arguments.json:
        print_json(found)
    else:
        print_lines(_lines(found, style()))
    return 0


def _read(connection: Connection) -> dict[str, Any]:
    """Everything that is shown, for programs."""
    from b2s.activity import ACTIVE
    from b2s.output import documents

    runs = documents(connection, _LAST_RUNS)
    for run in runs:
        is_active = run["status"] == "running"
        run["running_steps"] = documents(connection, ACTIVE, {"run_id": run["run_id"]}) if is_active else None
    freezes = documents(connection, _FREEZE)
    horizons = documents(connection, _HORIZON)
    return {
        "runs": runs,
        "queued": documents(connection, _QUEUED),
        "backfills": documents(connection, _BACKFILLS),
        "procedures": documents(connection, _HEALTH),
        "full_refresh_freeze": freezes[0] if freezes else None,
        "held_back": horizons[0] if horizons else None,
    }


def _lines(found: Mapping[str, Any], look: Style) -> Iterator[str]:
    """The same for people."""
    from b2s.backfillview import status_lines
    from b2s.render import visible

    runs, queued, health, freeze = (
        found[key] for key in ("runs", "queued", "procedures", "full_refresh_freeze")
    )
    if not health:
        yield "no pipeline is configured: b2s sync-config"
    if health and not runs and not queued:
        yield "nothing has run yet: b2s run"
    for run in runs:
        yield from _run_lines(run, look)
    yield from _queue_lines(queued)
    yield from status_lines(found["backfills"], look)
    if freeze and freeze["is_frozen"]:
        yield look.paint(f"full refreshes are frozen by {freeze['changed_by']}: {freeze['reason']}", "yellow")
    if found["held_back"] and any(one["watermark"] for one in health):
        held = visible(found["held_back"]["held_back_by"])
        yield look.paint(f"windows of timestamps and ids are held back by {held}", "yellow")
    yield from _health_lines(health, look)


def _run_lines(run: Mapping[str, Any], style: Style) -> Iterator[str]:
    from b2s.activity import step_lines
    from b2s.render import duration, moment, plural, visible

    head = f"pipeline {run['pipeline']}: run {run['run_id']} {style.status(run['status'])}"
    if run["is_dead"]:
        yield f"{head}, but its session is gone: b2s resume {run['run_id']}, or b2s reap"
        return
    if run["status"] != "running":
        took = f"took {duration(run['duration_ms'])}, " if run["started_at"] else ""
        yield f"{head}, {moment(run['ended_at'])}, {took}requested by {run['requested_by']}"
        if run["error_message"]:
            yield f"  {visible(run['error_message'])}"
            yield f"  b2s show {run['run_id']}"
        return
    since = f"for {duration(run['duration_ms'])}, {run['ended_steps']} of {run['step_count']} steps ended"
    sessions = plural(run["workers"], "session")
    yield f"{head} {since}, {sessions} at work, requested by {run['requested_by']}"
    yield from step_lines(run["running_steps"] or [], style)
    if run["cancel_requested_at"]:
        yield f"  it is being cancelled, asked by {run['cancel_requested_by']}"


def _queue_lines(queued: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What waits for a worker, in the order in which it will be taken up."""
    from b2s.render import moment

    for run in queued:
        since = f"since {moment(run['submitted_at'])}, requested by {run['requested_by']}"
        yield f"pipeline {run['pipeline']}: run {run['run_id']} queued {since}"
    if queued:
        yield "  b2s worker takes up what is queued"


def _health_lines(health: Sequence[Mapping[str, Any]], style: Style) -> list[str]:
    from b2s.activity import late_text
    from b2s.render import Column, duration, moment, table
    from b2s.runview import bound

    several = len({one["pipeline"] for one in health}) > 1
    columns = (
        Column("pipeline"),
        Column("procedure"),
        Column("type"),
        Column("last", may_wrap=False),
        Column("run", is_number=True),
        Column("rows", is_number=True),
        Column("took", is_number=True),
        Column("last success"),
        Column("complete up to", may_wrap=True),
        Column("late", may_wrap=True),
        Column("error", may_wrap=True),
    )
    rows = [
        (
            one["pipeline"] if several else None,
            one["procedure"],
            one["type"],
            one["last_status"] or "never ran",
            one["last_run_id"],
            one["last_rows_affected"],
            duration(one["last_duration_ms"]),
            moment(one["last_success_at"]),
            bound(one["watermark"]),
            late_text(one),
            one["last_error_message"],
        )
        for one in health
    ]
    return ["", *table(columns, rows, style)] if rows else []
