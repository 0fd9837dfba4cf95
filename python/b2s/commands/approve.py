"""b2s approve: the second person of a full refresh."""

from __future__ import annotations

import argparse

from b2s.commands.show import add_run


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s approve."""
    parser.epilog = (
        "For pipelines with approvals: two_person. Another admin submitted the run (b2s submit --mode full)\n"
        "and it waits; or it did not succeed, and is to be resumed."
    )
    add_run(parser)
    parser.add_argument("--reason", metavar="TEXT", help="why; it is kept")


def execute(arguments: argparse.Namespace) -> int:
    """Approves, and says what happens next."""
    from b2s.commands.show import run_id_of
    from b2s.db import connect
    from b2s.output import print_json

    with connect(arguments.dsn) as connection:
        run_id = run_id_of(connection, arguments.run)
        row = connection.execute("select etl.approve_run(%s, %s)", [run_id, arguments.reason]).fetchone()
    effect = row[0] if row else ""
    if arguments.json:
        print_json({"run_id": run_id, "effect": effect})
    else:
        print(effect)
    return 0
