"""b2s schedules: when runs are due, and what became of them when they were."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.render import Style

_HEALTH: Final = """
select * from etl.schedule_health h
 where (%(name)s::text is null or h.schedule = %(name)s) order by h.pipeline, h.schedule"""
_HISTORY: Final = """
select * from etl.schedule_history h where h.schedule = %(name)s order by h.slot_at desc limit %(limit)s"""
_BEAT: Final = """
select h.*, round(extract(epoch from clock_timestamp() - h.beat_at))::int as age_s
  from etl.heartbeats h where h.name = 'clock'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s schedules."""
    parser.add_argument("name", nargs="?", metavar="SCHEDULE", help="this one, with what became of it")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="so many slots of it (20)")
    parser.add_argument(
        "--alive", metavar="TIME", help="only look whether a clock has asked what is due within this time"
    )
    parser.epilog = (
        "Exit code 1 when a schedule is late: no successful run within late_after of its time;\n"
        "with --alive, when no clock is alive."
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prints the schedules; of one, its last slots as well."""
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.options import seconds
    from b2s.output import documents, print_json, print_lines, style

    name = {"name": arguments.name}
    limit = seconds("--alive", arguments.alive) if arguments.alive else None
    with connect(arguments.dsn) as connection:
        health = documents(connection, _HEALTH, name)
        history = (
            documents(connection, _HISTORY, {**name, "limit": arguments.limit}) if arguments.name else []
        )
        beats = documents(connection, _BEAT)
    if limit is not None:
        print(_clock_line(beats))
        return 0 if beats and beats[0]["age_s"] <= limit else 1
    if arguments.name and not health and not history:
        raise UsageError(f"there is no schedule {arguments.name}", "b2s schedules lists them")
    is_late = any(one["is_late"] for one in health)
    if arguments.json:
        print_json({"schedules": health, "history": history, "clock": beats[0] if beats else None})
        return 1 if is_late else 0
    look = style()
    print_lines(_health_lines(health, look) or ["no schedules: add them to transformations.yaml"])
    if history:
        print_lines(["", *_history_lines(history, look)])
    if health:
        print(_clock_line(beats))
    return 1 if is_late else 0


def _health_lines(health: Sequence[Mapping[str, Any]], style: Style) -> list[str]:
    from b2s.render import Column, moment, table

    several = len({one["pipeline"] for one in health}) > 1
    columns = (
        Column("pipeline"),
        Column("schedule"),
        Column("when"),
        Column("time zone"),
        Column("next"),
        Column("last"),
        Column("outcome"),
        Column("run", is_number=True),
        Column("last success"),
        Column("", may_wrap=True),
    )
    rows = [
        (
            one["pipeline"] if several else None,
            one["schedule"],
            one["cron"],
            one["timezone"],
            moment(one["next_at"]),
            moment(one["last_slot_at"]),
            one["last_status"] or one["last_outcome"],
            one["last_run_id"],
            moment(one["last_success_at"]),
            f"late since {moment(one['late_since'])}" if one["is_late"] else one["last_reason"],
        )
        for one in health
    ]
    return table(columns, rows, style)


def _history_lines(history: Sequence[Mapping[str, Any]], style: Style) -> list[str]:
    from b2s.render import Column, duration, moment, table

    columns = (
        Column("due"),
        Column("noticed"),
        Column("outcome"),
        Column("run", is_number=True),
        Column("status"),
        Column("took", is_number=True),
        Column("before it", is_number=True),
        Column("reason", may_wrap=True),
    )
    rows = [
        (
            moment(one["slot_at"]),
            moment(one["decided_at"]),
            one["outcome"],
            one["run_id"],
            one["run_status"],
            duration(one["duration_ms"]),
            f"{one['passed_over_count']} missed" if one["passed_over_count"] else None,
            one["reason"],
        )
        for one in history
    ]
    return table(columns, rows, style)


def _clock_line(beats: Sequence[Mapping[str, Any]]) -> str:
    if not beats:
        return "no clock has ever asked what is due: b2s worker --schedule, or pg_cron (b2s doctor)"
    (beat,) = beats
    who = f"{beat['session_user_name']} ({beat['application_name']})"
    return f"the clock last asked what is due {beat['age_s']} s ago: {who}"
