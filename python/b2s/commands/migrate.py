"""b2s migrate: install or upgrade, in one transaction."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s migrate."""
    parser.epilog = "One transaction: everything or nothing. Refused while a run is active, or it may --wait."
    parser.add_argument(
        "--wait",
        nargs="?",
        const="1h",
        metavar="TIME",
        help="let active runs end first, for at most so long (1h); no run starts meanwhile",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="change nothing; exit 1 when something is pending")
    how.add_argument("--dry-run", action="store_true", help="execute everything, then roll it back")
    how.add_argument("--sql", action="store_true", help="print the whole install as one script for psql")


def execute(arguments: argparse.Namespace) -> int:
    """Installs, or says what an install would do."""
    from b2s import migrate
    from b2s.options import seconds
    from b2s.output import print_json

    if arguments.sql:
        print(migrate.script(), end="")
        return 0
    if arguments.check:
        return _check(arguments)
    wait = seconds("--wait", arguments.wait) if arguments.wait else None
    done = migrate.migrate(arguments.dsn, dry_run=arguments.dry_run, wait=wait)
    if arguments.json:
        print_json(
            {
                "before": done.before,
                "after": done.after,
                "applied": done.applied,
                "is_dry_run": arguments.dry_run,
            }
        )
        return 0
    for name in done.applied:
        print(f"+ migration {name}")
    if arguments.dry_run:
        print(
            f"b2s {done.after} installs cleanly over {done.before or 'nothing'}; rolled back, nothing changed"
        )
    elif done.before is None:
        print(f"b2s {done.after} is installed")
    elif done.before == done.after:
        print(f"b2s {done.after} is installed; its routines were written anew")
    else:
        print(f"b2s {done.after} is installed, {done.before} before")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from b2s.db import connect
    from b2s.migrate import pending
    from b2s.output import print_json

    with connect(arguments.dsn) as connection:
        found = pending(connection)
    if arguments.json:
        print_json(
            {
                "installed": found.installed,
                "release": found.release,
                "pending": found.migrations,
                "is_current": found.is_current,
            }
        )
    elif found.is_current:
        print(f"b2s {found.installed} is installed and current")
    else:
        for name in found.migrations:
            print(f"+ migration {name}")
        print(f"{found.installed or 'nothing'} is installed, {found.release} is pending: b2s migrate")
    return 0 if found.is_current else 1
