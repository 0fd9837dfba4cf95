"""b2s worker: sessions that execute what is submitted."""

from __future__ import annotations

import argparse
import os
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s worker."""
    parser.epilog = (
        "SIGTERM or Ctrl-C: no run is taken up any more, and what is being executed gets --grace to end;\n"
        "after that, or at a second signal, the sessions are ended, which rolls their steps back for other\n"
        "workers to try again. Exit code 0 after a clean stop, 1 when sessions were ended in a step.\n"
        "Connect directly, not through a pooler in transaction mode."
    )
    what = parser.add_argument_group("what to work on")
    what.add_argument(
        "-j",
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="sessions, each executes a step at a time (2)",
    )
    what.add_argument(
        "--pipeline",
        action="append",
        default=[name] if (name := os.environ.get("B2S_PIPELINE")) else [],
        metavar="NAME",
        help="only this one; repeatable (B2S_PIPELINE; default: all)",
    )
    what.add_argument(
        "--schedule",
        action="store_true",
        help="be the clock as well: queue what is due, purge history once a day; safe beside other clocks",
    )
    when = parser.add_argument_group("how long")
    when.add_argument("--once", action="store_true", help="end when nothing is queued any more")
    when.add_argument("--poll", default="1s", metavar="TIME", help="look for runs at least so often (1s)")
    when.add_argument("--grace", default="30s", metavar="TIME", help="time to finish when told to stop (30s)")
    add_log(parser)


def add_log(parser: argparse.ArgumentParser) -> None:
    """The option of commands that stay, and log what they do."""
    parser.add_argument_group("what to show").add_argument(
        "--log-format",
        choices=("json", "console"),
        default=os.environ.get("B2S_LOG_FORMAT") or None,
        help="log lines on stderr (B2S_LOG_FORMAT; default: console on a terminal, else json)",
    )


def log_of(arguments: argparse.Namespace) -> Any:
    """The logger that the option asks for: for people on a terminal, for programs elsewhere."""
    import sys

    from b2s.progress import logger

    return logger(arguments.log_format or ("console" if sys.stderr.isatty() else "json"), sys.stderr)


def execute(arguments: argparse.Namespace) -> int:
    """Works, and logs what happens; with --json prints at the end how many runs it worked on."""
    from b2s.commands.run import check_workers
    from b2s.options import seconds
    from b2s.output import print_json
    from b2s.worker import Team

    check_workers(arguments.workers)
    team = Team(
        arguments.dsn,
        arguments.workers,
        list(dict.fromkeys(arguments.pipeline)),
        log_of(arguments),
        poll=seconds("--poll", arguments.poll),
        is_once=arguments.once,
        is_clock=arguments.schedule,
    )
    is_clean = team.work(seconds("--grace", arguments.grace))
    if arguments.json:
        print_json({"executed": sorted(team.executed), "is_clean": is_clean})
    return 0 if is_clean else 1
