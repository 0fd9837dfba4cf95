"""Everything a report tells, read in one go: a few queries, none of which grows with what lies before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from b2s import postmortem
from b2s.db import Connection
from b2s.errors import UsageError
from b2s.output import documents

Row = dict[str, Any]

TREND: Final = 40
"""How many of its newest outcomes tell how a procedure has been doing."""
_MOST_RUNS: Final = 100
_MOST_FAILURES: Final = 50
_MOST_LINES: Final = 50

_CHOSEN: Final = """
select r.run_id, r.pipeline_id, l.name as pipeline, r.kind, r.status, l.description
  from etl.runs r join etl.pipelines l using (pipeline_id)
 where r.kind = 'run' and r.status <> 'queued' and (%(pipeline)s::text is null or l.name = %(pipeline)s::text)
   and (%(run_id)s::bigint is null or r.run_id = %(run_id)s::bigint)
 order by r.run_id desc limit 1"""
_SINCE: Final = """
select case when %(since)s::text ~ '^\\s*\\d+\\s*[a-z]+\\s*$' then now() - (%(since)s::text)::interval
            else (%(since)s::text)::timestamptz end as since"""
_RANGE: Final = """
select min(r.run_id) as first, max(r.run_id) as last from etl.runs r
 where r.pipeline_id = %(pipeline_id)s and r.kind = 'run' and r.started_at >= %(since)s::timestamptz"""
_DAYS: Final = """
select r.started_at::date as day, r.status, count(*) as count, sum(r.duration_ms) as duration_ms
  from etl.runs r
 where r.pipeline_id = %(pipeline_id)s and r.kind = 'run' and r.run_id between %(first)s and %(last)s
   and r.started_at is not null
 group by 1, 2 order by 1, 2"""
_RUNS: Final = """
select h.run_id, h.status, h.mode, h.requested_by, h.started_at, h.duration_ms, h.step_count, h.error_message,
       h.reason, h.is_dead
  from etl.run_history h
 where h.pipeline = %(pipeline)s and h.kind = 'run' and h.run_id between %(first)s and %(last)s
 order by h.run_id desc limit %(limit)s"""
_PROCEDURES: Final = """
select p.procedure_id, p.name as procedure, p.type, p.description, g.name as group_name, h.last_status,
       h.last_run_id, h.last_success_at, h.freshness_ms, h.complete_at, h.is_late, h.watermark,
       p.watermark_strategy as strategy, o.outcome, o.held_back_by, coalesce(d.needs, '{}') as needs
  from etl.procedures p
  join etl.pipelines l using (pipeline_id)
  join etl.procedure_health h on h.pipeline = l.name and h.procedure = p.name
  left join etl.group_members m using (procedure_id)
  left join etl.groups g using (group_id)
  left join lateral (
    select coalesce(r.skip_reason, r.status) as outcome, r.held_back_by from etl.procedure_runs r
     where r.procedure_id = p.procedure_id and r.lock_key > 0 and r.run_id between %(first)s and %(last)s
     order by r.run_id desc, r.attempt desc limit 1) o on true
  left join lateral (
    select array_agg(q.name order by q.name) as needs
      from etl.dependencies e join etl.procedures q on q.procedure_id = e.depends_on_id
     where e.procedure_id = p.procedure_id) d on true
 where p.pipeline_id = %(pipeline_id)s and p.is_active
 order by p.type, p.name"""
_TALLIES: Final = """
select r.procedure_id, count(*) filter (where r.status = 'succeeded') as succeeded,
       count(*) filter (where r.status = 'failed') as failed,
       count(*) filter (where r.status = 'retrying') as retried,
       count(*) filter (where r.status not in ('succeeded', 'failed', 'retrying', 'advanced')) as other,
       coalesce(sum(r.duration_ms), 0) as duration_ms,
       coalesce(sum(r.rows_affected) filter (where r.status in ('succeeded', 'advanced')), 0) as rows_affected
  from etl.procedure_runs r where r.lock_key > 0 and r.run_id between %(first)s and %(last)s
 group by r.procedure_id"""
_TRENDS: Final = """
select p.procedure_id, t.run_id, t.status, t.mode, t.duration_ms, t.rows_affected
  from etl.procedures p
  cross join lateral (
    select r.run_id, r.status, r.mode, r.duration_ms, r.rows_affected from etl.procedure_runs r
     where r.procedure_id = p.procedure_id and r.lock_key > 0 and r.run_id <= %(last)s
       and r.status in ('succeeded', 'advanced', 'failed')
     order by r.run_id desc, r.attempt desc limit %(trend)s) t
 where p.pipeline_id = %(pipeline_id)s and p.is_active
 order by p.procedure_id, t.run_id"""
_FAILURES: Final = """
select r.procedure_name as procedure, r.error_code, r.error_class, count(*) as count,
       min(r.run_id) as first_run, max(r.run_id) as last_run,
       (array_agg(r.error_message order by r.run_id desc))[1] as error_message,
       (array_agg(r.error_hint order by r.run_id desc))[1] as error_hint
  from etl.procedure_runs r
 where r.status = 'failed' and r.lock_key > 0 and r.run_id between %(first)s and %(last)s
   and r.procedure_id in (select p.procedure_id from etl.procedures p where p.pipeline_id = %(pipeline_id)s)
 group by 1, 2, 3 order by max(r.run_id) desc, count(*) desc limit %(limit)s"""
_REFRESHES: Final = """
select m.mv_name, count(*) filter (where m.status = 'succeeded') as succeeded,
       count(*) filter (where m.status = 'failed') as failed,
       count(*) filter (where m.status not in ('succeeded', 'failed')) as other,
       percentile_cont(0.5) within group (order by m.duration_ms)
         filter (where m.status = 'succeeded') as median_ms,
       (array_agg(coalesce(m.skip_reason, m.status) order by m.run_id desc))[1] as outcome,
       (array_agg(coalesce(m.error_message, m.warning) order by m.run_id desc)
         filter (where coalesce(m.error_message, m.warning) is not null))[1] as remark
  from etl.mv_refreshes m join etl.runs r using (run_id)
 where r.pipeline_id = %(pipeline_id)s and m.run_id between %(first)s and %(last)s
 group by m.mv_name order by m.mv_name"""
_LINES: Final = """
select g.logged_at, g.run_id, g.procedure_name as procedure, g.level, g.message, g.is_rolled_back
  from etl.step_logs g join etl.runs r using (run_id)
 where r.pipeline_id = %(pipeline_id)s and g.run_id between %(first)s and %(last)s
   and g.level in ('warning', 'error')
 order by g.log_id desc limit %(limit)s"""
_NOW: Final = "select now() as at, current_database() as database"


@dataclass(frozen=True, slots=True)
class Report:
    """What a report tells."""

    pipeline: str
    description: str | None
    database: str
    at: str
    since: str | None
    """The beginning of the period; None: the report is about one run."""
    run: Row | None
    """The run, or the newest one of the period, with its steps; None: there was none."""
    run_count: int = 0
    days: Sequence[Row] = ()
    runs: Sequence[Row] = ()
    procedures: Sequence[Row] = ()
    tallies: dict[int, Row] = field(default_factory=dict)
    trends: dict[int, list[Row]] = field(default_factory=dict)
    failures: Sequence[Row] = ()
    refreshes: Sequence[Row] = ()
    lines: Sequence[Row] = ()


def read(connection: Connection, *, run_id: int | None, since: str | None, pipeline: str | None) -> Report:
    """Reads a report about a run (default: the newest) or a period. Raises UsageError when there is none."""
    connection.execute("set jit = off")
    chosen = documents(connection, _CHOSEN, {"run_id": run_id, "pipeline": pipeline})
    if not chosen:
        raise _nothing(connection, run_id, pipeline)
    run = chosen[0]
    period = documents(connection, _SINCE, {"since": since})[0]["since"] if since else None
    scope = {"pipeline_id": run["pipeline_id"], "pipeline": run["pipeline"], "since": period, "trend": TREND}
    scope |= (
        documents(connection, _RANGE, scope)[0] if since else {"first": run["run_id"], "last": run["run_id"]}
    )
    now = documents(connection, _NOW)[0]
    days = documents(connection, _DAYS, scope)
    return Report(
        pipeline=run["pipeline"],
        description=run["description"],
        database=now["database"],
        at=now["at"],
        since=period,
        run=_whole(connection, scope["last"]),
        run_count=sum(day["count"] for day in days),
        days=days,
        runs=documents(connection, _RUNS, {**scope, "limit": _MOST_RUNS}),
        procedures=documents(connection, _PROCEDURES, scope),
        tallies={row["procedure_id"]: row for row in documents(connection, _TALLIES, scope)},
        trends=_by_run(documents(connection, _TRENDS, {**scope, "last": scope["last"] or 0})),
        failures=documents(connection, _FAILURES, {**scope, "limit": _MOST_FAILURES}),
        refreshes=documents(connection, _REFRESHES, scope),
        lines=documents(connection, _LINES, {**scope, "limit": _MOST_LINES}),
    )


def _whole(connection: Connection, run_id: int | None) -> Row | None:
    if run_id is None:
        return None
    row = connection.execute("select etl.get_run(%s)", [run_id]).fetchone()
    return postmortem.enrich(connection, row[0]) if row else None


def _by_run(attempts: Sequence[Row]) -> dict[int, list[Row]]:
    """The outcomes of each procedure, oldest first; the slices of a step are one outcome."""
    trends: dict[int, list[Row]] = {}
    for one in attempts:
        trend = trends.setdefault(one["procedure_id"], [])
        if trend and trend[-1]["run_id"] == one["run_id"]:
            last = trend[-1]
            for name in ("duration_ms", "rows_affected"):
                last[name] = (last[name] or 0) + (one[name] or 0)
            if one["status"] != "advanced":
                last["status"] = one["status"]
        else:
            trend.append(one)
    return trends


def _nothing(connection: Connection, run_id: int | None, pipeline: str | None) -> UsageError:
    if run_id is not None:
        row = connection.execute(
            "select r.kind, r.status from etl.runs r where r.run_id = %s", [run_id]
        ).fetchone()
        if row is not None and row[0] == "backfill":
            return UsageError(f"run {run_id} is a backfill", f"b2s show {run_id}")
        if row is not None and row[1] == "queued":
            return UsageError(f"run {run_id} is queued and has not begun", "b2s worker --once takes it up")
        return UsageError(f"there is no run {run_id}", "b2s runs lists the runs there are")
    if pipeline is not None:
        return UsageError(f"there is no run of a pipeline {pipeline}", "b2s runs lists the runs there are")
    return UsageError("there is no run yet", "b2s run")
