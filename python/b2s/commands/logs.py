"""b2s logs: what happened in a run and what its routines had to say, in order of time."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s logs."""
    parser.epilog = (
        "What a routine says with etl.log(level, message, data) is here when its step has ended, whatever\n"
        "became of it. On a terminal lines for people, else (and with --json) one JSON object a line."
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the number of a run, or latest (default; with --follow: all)"
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on: until the run has ended; without RUN until Ctrl-C"
    )
    parser.add_argument(
        "--level",
        choices=("debug", "info", "warning", "error"),
        default="debug",
        help="nothing below (debug)",
    )
    parser.add_argument(
        "--log-format",
        choices=("json", "console"),
        default=os.environ.get("B2S_LOG_FORMAT") or None,
        help="what lines look like (B2S_LOG_FORMAT; default console on a terminal, else json)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prints the events in order of time; with --follow also those to come."""
    from b2s.output import style
    from b2s.progress import LEVELS, level_of, log_event, logger

    is_json = arguments.json or style().width is None
    log = logger(arguments.log_format or ("json" if is_json else "console"), sys.stdout, has_own_time=True)
    least = LEVELS.index(arguments.level)
    for event in _following(arguments) if arguments.follow else _stored(arguments):
        if LEVELS.index(level_of(event)) >= least:
            log_event(log, event, timestamp=event["at"])
            sys.stdout.flush()
    return 0


def _stored(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from b2s.commands.show import get_run, run_id_of
    from b2s.db import connect
    from b2s.logfollow import EVENTS
    from b2s.output import documents

    with connect(arguments.dsn) as connection:
        run_id = run_id_of(connection, arguments.run or "latest")
        get_run(connection, run_id)
        yield from documents(connection, EVENTS, {"run_ids": [run_id]})


def _following(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Comes back when the database does; at the start it must be there."""
    from b2s.commands.show import get_run, run_id_of
    from b2s.db import connect
    from b2s.errors import DatabaseError
    from b2s.logfollow import Follower
    from b2s.output import remark
    from b2s.retry import backoff, is_beyond_patience

    follower: Follower | None = None
    delays = backoff()
    while True:
        try:
            with connect(arguments.dsn) as connection:
                if follower is None:
                    run_id = run_id_of(connection, arguments.run) if arguments.run else None
                    if run_id is not None:
                        get_run(connection, run_id)
                    follower = Follower(run_id)
                for event in follower.follow(connection):
                    delays = backoff()
                    yield event
                return
        except DatabaseError as error:
            if follower is None or is_beyond_patience(error):
                raise
            wait = next(delays)
            remark(f"{error}; trying again in {wait:.1f} s")
            time.sleep(wait)
