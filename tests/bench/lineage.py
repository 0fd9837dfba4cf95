"""What it costs to observe what steps lock: runs that look never, once a day, and always, in turns.

    python -m tests.bench.lineage [--steps 1000] [--turns 7] [--dsn DSN]

The floor of each turn is the run that never looks. `daily` is any run but the first of a day: its steps pay
for a test of their settings. `first` is that first run. Without --dsn an embedded server with fsync on is
started.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, Final

import psycopg

from b2s.migrate import migrate
from tests.bench.overhead import prepare, server, spread

POLICIES: Final = ("never", "daily", "always")
FORGET: Final = "delete from etl.lineage_scans where source = 'observed'"


def run(connection: psycopg.Connection[Any], pipeline: str, policy: str) -> float:
    """Seconds of one run under a policy."""
    connection.execute("update etl.pipelines set observe_lineage = %s where name = %s", [policy, pipeline])
    begin = time.perf_counter()
    connection.execute("call etl.start_run(pipeline => %s)", [pipeline])
    return time.perf_counter() - begin


def main() -> None:
    """Prints the ratio of each policy to looking never, and milliseconds per step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    pipeline = f"bench_chain_{arguments.steps}"
    took: dict[str, list[float]] = {}
    with server(arguments.dsn) as dsn:
        migrate(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            prepare(connection, "chain", arguments.steps)
            connection.execute(f"call etl.start_run(pipeline => '{pipeline}')".encode())
            for _ in range(arguments.turns):
                for policy in POLICIES:
                    took.setdefault(policy, []).append(run(connection, pipeline, policy))
                connection.execute(FORGET)
                took.setdefault("first", []).append(run(connection, pipeline, "daily"))
    per_step = 1000 / arguments.steps
    for name, seconds in took.items():
        ratios = [one / floor for one, floor in zip(seconds, took["never"], strict=True)]
        print(f"{name:7} {spread(ratios)} x never; {spread([one * per_step for one in seconds])} ms per step")


if __name__ == "__main__":
    main()
