"""b2s submit: leaves a request for a worker."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from b2s import selection
from b2s.commands import run as run_command

if TYPE_CHECKING:
    from b2s.db import Connection
    from b2s.progress import Display

_HEARD_EVERY: Final = 0.5
_AWAITS: Final = "select h.awaits_approval from etl.run_history h where h.run_id = %s"
_STANDING: Final = "select h.status, h.is_dead from etl.run_history h where h.run_id = %s"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s submit."""
    parser.epilog = (
        "b2s worker, or etl.work in any session, takes up what was submitted: first come, first served,\n"
        "one run of a pipeline at a time. Ctrl-C under --wait only stops waiting. Exit code 0 once it is\n"
        "queued; with --wait, 1 unless the run succeeded or completed with warnings."
    )
    selection.configure(parser)
    run_command.add_key(parser)
    shown = parser.add_argument_group("what to show")
    shown.add_argument("--wait", action="store_true", help="stay until the run has ended, and show it")
    run_command.add_log_format(shown)


def execute(arguments: argparse.Namespace) -> int:
    """Prints the number of the run; with --wait, the run (or with --json the document of etl.get_run)."""
    from b2s.commands import plan
    from b2s.db import connect
    from b2s.output import print_json, remark

    display = run_command.open_display(arguments)
    with connect(arguments.dsn) as connection:
        request = selection.request_of(arguments, plan.declarations(connection, arguments))
        named, values = selection.call_arguments(request)
        if arguments.wait:
            connection.execute("listen etl")
        query = f"select run_id, status, is_new from etl.submit_run({named})"  # noqa: S608 - our own
        run_id, status, is_new = connection.execute(query.encode(), values).fetchone() or (0, "", False)
        awaits = connection.execute(_AWAITS, [run_id]).fetchone() == (True,)
        known = None if is_new else f"this idempotency key is known: run {run_id} was submitted with it"
        if arguments.wait:
            try:
                _wait(connection, run_id, display)
            except KeyboardInterrupt:
                remark(f"left; run {run_id} goes on: b2s show {run_id}, b2s cancel {run_id}")
                raise
    if arguments.wait:
        return run_command.report(arguments, run_id, known)
    if arguments.json:
        print_json({"run_id": run_id, "status": status, "is_new": is_new})
    else:
        then = (
            f"another admin has to approve it: b2s approve {run_id}" if awaits else "b2s worker takes it up"
        )
        remark(known or f"run {run_id} is queued; {then}, b2s show {run_id} shows it")
        print(run_id)
    return 0


def _wait(connection: Connection, run_id: int, display: Display) -> None:
    """Shows what the sessions that execute the run say about it, until it has ended."""
    import json

    try:
        while True:
            row = connection.execute(_STANDING, [run_id]).fetchone()
            has_ended = row is None or row[0] not in ("queued", "running")
            if row is not None and row[1]:
                connection.execute("select etl.reap()")
            # What was said last may arrive a moment after the status can be seen.
            for notice in connection.notifies(timeout=_HEARD_EVERY, stop_after=None if has_ended else 1):
                event = json.loads(notice.payload)
                if event.get("run_id") == run_id:
                    display.event(event)
                    if str(event["event"]).startswith("run_"):
                        return
            if has_ended:
                return
            display.tick()
    finally:
        display.close()
