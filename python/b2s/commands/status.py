"""b2s status: what is going on, and how things stand."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.render import Style

_LAST_RUNS: Final = """
select distinct on (h.pipeline) h.*,
       (select jsonb_agg(jsonb_build_object('order_index', s.order_index, 'procedure', s.procedure,
                                            'attempt', s.attempt, 'duration_ms', s.duration_ms)
                         order by s.order_index)
          from etl.step_history s where s.run_id = h.run_id and s.status = 'running') as running_steps,
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
_HEALTH: Final = "select * from etl.procedure_health h order by h.pipeline, h.type, h.procedure"
_FREEZE: Final = "select * from etl.full_refresh_freezes f order by f.freeze_id desc limit 1"


def configure(parser: argparse.ArgumentParser) -> None:
    """b2s status has no options of its own."""


def execute(arguments: argparse.Namespace) -> int:
    """Prints the last run of each pipeline, what an active one is at, each procedure's health, the freeze."""
    from b2s.backfillview import status_lines
    from b2s.db import connect
    from b2s.output import documents, print_json, print_lines, style

    with connect(arguments.dsn) as connection:
        runs = documents(connection, _LAST_RUNS)
        queued = documents(connection, _QUEUED)
        backfills = documents(connection, _BACKFILLS)
        health = documents(connection, _HEALTH)
        freezes = documents(connection, _FREEZE)
    freeze = freezes[0] if freezes else None
    if arguments.json:
        print_json(
            {
                "runs": runs,
                "queued": queued,
                "backfills": backfills,
                "procedures": health,
                "full_refresh_freeze": freeze,
            }
        )
        return 0
    look = style()
    if not health:
        print("no pipeline is configured: b2s sync-config")
    if health and not runs and not queued:
        print("nothing has run yet: b2s run")
    print_lines(line for run in runs for line in _run_lines(run, look))
    print_lines(_queue_lines(queued))
    print_lines(status_lines(backfills, look))
    if freeze and freeze["is_frozen"]:
        print(
            look.paint(f"full refreshes are frozen by {freeze['changed_by']}: {freeze['reason']}", "yellow")
        )
    print_lines(_health_lines(health, look))
    return 0


def _run_lines(run: Mapping[str, Any], style: Style) -> Iterator[str]:
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
    for step in run["running_steps"] or []:
        yield f"  at [{step['order_index']}] {step['procedure']} for {duration(step['duration_ms'])}"
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
            one["last_error_message"],
        )
        for one in health
    ]
    return ["", *table(columns, rows, style)] if rows else []
