"""b2s cancel: asks an active run to stop."""

from __future__ import annotations

import argparse

from b2s.commands.show import add_run


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s cancel."""
    add_run(parser)
    parser.add_argument("--reason", metavar="TEXT", help="why; it is kept with the run")
    parser.add_argument("--force", action="store_true", help="also cancel the statement in flight")


def execute(arguments: argparse.Namespace) -> int:
    """Asks, and says what will happen; it does not wait for the run to end."""
    from b2s.commands.show import run_id_of
    from b2s.db import connect
    from b2s.output import print_json

    with connect(arguments.dsn) as connection:
        run_id = run_id_of(connection, arguments.run)
        query = "select etl.cancel_run(%s, reason => %s, force => %s)"
        row = connection.execute(query, [run_id, arguments.reason, arguments.force]).fetchone()
    effect = row[0] if row else ""
    if arguments.json:
        print_json({"run_id": run_id, "effect": effect})
    else:
        print(f"run {run_id}: {effect}")
    return 0
