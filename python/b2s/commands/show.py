"""b2s show: one run, explained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2s.db import Connection


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s show."""
    add_run(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """The argument that names a run."""
    parser.add_argument("run", metavar="RUN", help="the number of a run, or latest")


def execute(arguments: argparse.Namespace) -> int:
    """Prints a run: the request, the steps, each failure in full, what to type next."""
    from b2s import backfillview, postmortem
    from b2s.activity import ACTIVE, step_lines
    from b2s.db import connect
    from b2s.output import documents, print_json, print_lines, style
    from b2s.runview import (
        SUCCESSES,
        failure_lines,
        header_lines,
        kept_lines,
        next_steps,
        steps_table,
        window_lines,
    )

    with connect(arguments.dsn) as connection:
        run = get_run(connection, run_id_of(connection, arguments.run))
        if run["status"] == "running":
            run["active_steps"] = documents(connection, ACTIVE, {"run_id": run["run_id"]})
        look = style()
        is_backfill = run["kind"] == "backfill"
        if not is_backfill:
            run = postmortem.enrich(connection, run)
        procedures = (
            backfillview.procedures_table(connection, run["run_id"], look)
            if is_backfill and not arguments.json
            else []
        )
    if arguments.json:
        print_json(run)
        return 0
    print_lines(header_lines(run, look))
    print_lines(step_lines(run.get("active_steps", ()), look))
    if is_backfill:
        print_lines(["", *procedures, *backfillview.chunk_failures(run, look, is_full=True)])
        print_lines(["", backfillview.summary(run, look)])
        _print_next(backfillview.next_steps(run))
        return 0
    steps = steps_table(run, look)
    if steps:
        print_lines(["", *steps])
    windows = list(window_lines(run))
    if windows:
        print_lines(["", "windows:", *windows])
    print_lines(failure_lines(run, look, is_full=True))
    kept = list(kept_lines(run)) if run["ended_at"] and run["status"] not in SUCCESSES else []
    if kept:
        print_lines(["", "stays committed:", *kept])
    _print_next(next_steps(run))
    return 0


def _print_next(following: Sequence[str]) -> None:
    from b2s.output import print_lines

    if following:
        print_lines(["", "next:", *(f"  {line}" for line in following)])


def run_id_of(connection: Connection, word: str) -> int:
    """The run that a word means: its number, or `latest`. Raises UsageError for anything else."""
    from b2s.errors import UsageError

    if word.isdecimal() and int(word) < 2**63:
        return int(word)
    if word != "latest":
        raise UsageError(
            f"{word!r} is not the number of a run", "b2s runs lists them; the newest is called latest"
        )
    row = connection.execute("select max(run_id) from etl.runs").fetchone()
    if row is None or row[0] is None:
        raise UsageError("there is no run yet", "b2s run")
    run_id: int = row[0]
    return run_id


def get_run(connection: Connection, run_id: int) -> dict[str, Any]:
    """What etl.get_run returns. Raises DatabaseError run.unknown."""
    row = connection.execute("select etl.get_run(%s)", [run_id]).fetchone()
    document: dict[str, Any] = row[0] if row else {}
    return document
