"""b2s resume: takes up what is left of a run that did not succeed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from b2s.commands import run as run_command
from b2s.commands.show import add_run

if TYPE_CHECKING:
    from b2s.db import Connection

_NEWEST: Final = "select max(r.run_id) from etl.runs r where r.kind = 'run'"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s resume."""
    parser.epilog = (
        "A new run: what succeeded in the old one is not run again, the rest reads the windows and has the\n"
        "parameters it had. Ctrl-C and the exit code are those of b2s run."
    )
    add_run(parser)
    parser.add_argument(
        "--changed",
        choices=("reuse", "rerun"),
        help="steps that succeeded, but whose routine has changed: keep what they wrote, or run them again",
    )
    run_command.add_workers(parser)
    run_command.add_log_format(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Resumes, and prints the steps of the new run (or with --json the document of etl.get_run)."""
    from b2s.db import connect
    from b2s.runner import ResumeRunner

    run_command.check_workers(arguments.workers)
    display = run_command.open_display(arguments)
    with connect(arguments.dsn) as connection:
        run_id = _run_id(connection, arguments.run)
    request = {"run_id": run_id, "changed_steps": arguments.changed}
    outcome = ResumeRunner(arguments.dsn, request, display, arguments.workers).run()
    return run_command.report(arguments, outcome.run_id)


def _run_id(connection: Connection, word: str) -> int:
    """Here `latest` means the newest run that is no backfill."""
    from b2s.commands.show import run_id_of

    row = connection.execute(_NEWEST).fetchone() if word == "latest" else None
    return row[0] if row and row[0] else run_id_of(connection, word)
