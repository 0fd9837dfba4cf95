"""b2s report: one HTML file that explains a run, or a period."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s report."""
    parser.epilog = (
        "The file needs no server and no network, and may be sent to whoever may see names, messages and\n"
        "row counts. It holds no parameter; of a routine that failed it shows the lines around the error."
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="the number of a run, or latest (default)")
    parser.add_argument(
        "--since", metavar="TIME", help="a period instead: a time, or an age such as '12h' or '7 days'"
    )
    parser.add_argument("--pipeline", metavar="NAME", help="which pipeline (default: that of the newest run)")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="b2s-report.html",
        help="where to (b2s-report.html; - is stdout)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Writes the file and prints its name."""
    from b2s.commands.show import run_id_of
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.report.data import read
    from b2s.report.page import render

    if arguments.run and arguments.since:
        raise UsageError("a report is about a run or a period", "leave out RUN, or --since")
    with connect(arguments.dsn) as connection:
        named = arguments.run if arguments.run != "latest" else None
        run_id = run_id_of(connection, named) if named else None
        report = read(connection, run_id=run_id, since=arguments.since, pipeline=arguments.pipeline)
    page = render(report)
    if arguments.output == "-":
        sys.stdout.write(page)
        return 0
    path = Path(arguments.output)
    path.write_text(page, encoding="utf-8")
    print(path)
    return 0
