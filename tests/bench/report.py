"""How long a report takes over many runs.

    python -m tests.bench.report [--runs 10000] [--procedures 30] [--turns 5] [--dsn DSN]

`b2s report` as a process, from its start to the file on disk: of one run (the floor), and of a period that
holds them all. Without --dsn an embedded server is started.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg

from b2s.embedded import EmbeddedServer
from b2s.migrate import migrate
from tests.bench.overhead import prepare, spread
from tests.bench.scrape import clone_runs


def report(dsn: str, *words: str) -> tuple[float, int]:
    """Seconds of one report, and the size of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "b2s.cli", "report", *words, "-o", str(path)],
            check=True, stdout=subprocess.DEVNULL, env={**os.environ, "B2S_DSN": dsn},
        )  # fmt: skip
        return time.perf_counter() - began, path.stat().st_size


def run(dsn: str, arguments: argparse.Namespace) -> None:
    """Prints the floor, the measurement, and their ratio."""
    migrate(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        prepare(connection, "layered", arguments.procedures)
        for _ in range(2):
            name = f"bench_layered_{arguments.procedures}"
            connection.execute(f"call etl.start_run(pipeline => '{name}')".encode())
        clone_runs(connection, 2, arguments.runs)
    floor = [report(dsn) for _ in range(arguments.turns)]
    full = [report(dsn, "--since", "100 years") for _ in range(arguments.turns)]
    for name, found in (("one run", floor), (f"{arguments.runs + 2:,} runs", full)):
        print(f"{name:12} {spread([seconds for seconds, _ in found])} s, {found[0][1] / 1000:,.0f} kB")
    ratio = statistics.median(s for s, _ in full) / statistics.median(s for s, _ in floor)
    print(f"all of them / one: {ratio:.2f}")


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--procedures", type=int, default=30)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    if arguments.dsn:
        run(arguments.dsn, arguments)
        return
    with EmbeddedServer(settings={"max_wal_size": "4GB"}) as embedded:
        run(embedded.dsn, arguments)


if __name__ == "__main__":
    main()
