"""b2s runs: the list of runs, newest first."""

from __future__ import annotations

import argparse
from typing import Final

STATUSES: Final = (
    "queued", "running", "succeeded", "completed_with_warnings", "failed", "cancelled", "abandoned",
)  # fmt: skip
_QUERY: Final = """
select h.* from etl.run_history h
 where (%(statuses)s::text[] is null or h.status = any (%(statuses)s::text[]))
   and (%(pipeline)s::text is null or h.pipeline = %(pipeline)s::text)
   and (%(since)s::text is null or h.submitted_at >= case when %(since)s::text ~ '^\\s*\\d+\\s*[a-z]+\\s*$'
          then now() - (%(since)s::text)::interval else (%(since)s::text)::timestamptz end)
 order by h.run_id desc limit %(limit)s"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s runs."""
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="at most so many (default 20)")
    parser.add_argument("--status", action="append", choices=STATUSES, help="only these; repeatable")
    parser.add_argument(
        "--since", metavar="TIME", help="only newer ones: a time, or an age such as '2h' or '7 days'"
    )
    parser.add_argument("--pipeline", metavar="NAME", help="only those of one pipeline")


def execute(arguments: argparse.Namespace) -> int:
    """Prints the runs."""
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.output import documents, print_json, print_lines, style
    from b2s.render import Column, duration, moment, table

    if arguments.limit < 1:
        raise UsageError("--limit must be at least 1", "leave it out for the last 20 runs")
    with connect(arguments.dsn) as connection:
        found = documents(
            connection,
            _QUERY,
            {
                "statuses": arguments.status,
                "since": arguments.since,
                "limit": arguments.limit,
                "pipeline": arguments.pipeline,
            },
        )
    if arguments.json:
        print_json(found)
        return 0
    columns = (
        Column("run", is_number=True),
        Column("pipeline"),
        Column("kind"),
        Column("status"),
        Column("mode"),
        Column("started"),
        Column("took", is_number=True),
        Column("steps", is_number=True),
        Column("requested by"),
        Column("error", may_wrap=True),
    )
    rows = [
        (
            run["run_id"],
            run["pipeline"],
            run["kind"] if run["kind"] != "run" else None,
            run["status"],
            run["mode"],
            moment(run["started_at"]),
            duration(run["duration_ms"]),
            run["step_count"],
            run["requested_by"],
            "its session is gone" if run["is_dead"] else run["error_message"],
        )
        for run in found
    ]
    print_lines(table(columns, rows, style()) or ["no runs"])
    return 0
