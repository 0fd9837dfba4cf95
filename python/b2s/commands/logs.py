"""b2s logs: what happened in one run, event by event."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from b2s.commands.show import add_run

_QUERY: Final = """
select * from etl.run_events e where e.run_id = %(run_id)s
 order by e.at, e.event like '%%started' desc, e.order_index, e.attempt"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s logs."""
    parser.epilog = "On a terminal lines for people, else (and with --json) one JSON object a line."
    add_run(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Prints the events in order of time."""
    from b2s.commands.show import get_run, run_id_of
    from b2s.db import connect
    from b2s.output import documents, style
    from b2s.progress import log_event, logger

    with connect(arguments.dsn) as connection:
        run_id = run_id_of(connection, arguments.run)
        get_run(connection, run_id)
        events = documents(connection, _QUERY, {"run_id": run_id})
    is_json = arguments.json or style().width is None
    log = logger("json" if is_json else "console", sys.stdout, has_own_time=True)
    for event in events:
        log_event(log, event, timestamp=event["at"])
    return 0
