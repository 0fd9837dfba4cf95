"""Windows that lose nothing, and readers that do, side by side on the same tables and the same writers.

    python -m tests.bench.soak [--minutes 3] [--seed N] [--only xid,naive_now] [--major 15] [--dsn DSN]

Writers commit late, roll back, prepare, chain and update (tests/soak.py); each reader runs all the
while, is killed, cancelled and made to fail now and then; in the end Silver is compared with Bronze row
by row. `lost` and `twice` are rows; the run times are of runs that succeeded, waiting included; the lag
is from the commit of a row to its arrival in Silver. Without --dsn an embedded server with fsync on is
started. Exits with 1 when b2s lost, invented or repeated a row.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from b2s.embedded import EmbeddedServer, Setting
from b2s.migrate import migrate
from tests.servers import Server
from tests.soak import NAIVE, SUBJECTS, Naive, Outcome, Soak, Subject

SETTINGS: dict[str, Setting] = {
    "max_connections": 300,
    "max_prepared_transactions": 100,
    "track_commit_timestamp": True,
}


def percentiles(values: Sequence[float], digits: int) -> str:
    """Median and 95th percentile."""
    if len(values) < 2:
        return "-"
    return f"{statistics.median(values):.{digits}f} / {statistics.quantiles(values, n=20)[-1]:.{digits}f}"


def line(outcome: Outcome, soak: Soak) -> str:
    lost = sum(outcome.lost.values())
    share = f"{lost} ({lost / max(outcome.written, 1):.1%})"
    runs = sum(soak.ended.get(outcome.name, {}).values()) or len(soak.run_ms.get(outcome.name, []))
    return (
        f"| {outcome.name:30} | {outcome.written:8} | {share:>14} | {outcome.twice:5} |"
        f" {sum(outcome.invented.values()):8} | {outcome.gaps:4} | {runs:6} |"
        f" {percentiles(soak.run_ms.get(outcome.name, []), 1):>16} | {percentiles(outcome.lag_s, 2):>13} |"
    )


def soak_on(server: Server, readers: Sequence[Subject | Naive], minutes: float, seed: int) -> bool:
    """Soak in a database of its own; whether b2s lost nothing."""
    database = server.create_database()
    migrate(database.dsn)
    subjects = [reader for reader in readers if isinstance(reader, Subject)]
    naive = [reader for reader in readers if isinstance(reader, Naive)]
    soak = Soak(database, subjects, naive, seed=seed, longest=2.5)
    print(f"{server.title}, {minutes:g} minutes, seed {seed}", flush=True)
    soak.run(minutes * 60)
    print(
        "| reader                         |  written |           lost | twice | invented | gaps |   runs |"
        "  run ms, p50/p95 | lag s p50/p95 |\n|---|---|---|---|---|---|---|---|---|"
    )
    is_exact = True
    for reader in readers:
        outcome = soak.outcome(reader)
        print(line(outcome, soak), flush=True)
        if isinstance(reader, Subject) and not outcome.is_exact:
            is_exact = False
            print(f"  lost by {dict(outcome.lost)}, invented {dict(outcome.invented)}", flush=True)
    database.drop()
    return is_exact


def main() -> int:
    """Prints one line per reader."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", help="names of readers, separated by commas")
    parser.add_argument("--major", type=int, help="which embedded Postgres")
    parser.add_argument("--bindir", type=Path, help="the programs of another Postgres")
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    everyone: list[Subject | Naive] = [*NAIVE, *SUBJECTS]
    names = arguments.only.split(",") if arguments.only else [reader.name for reader in everyone]
    readers = [reader for reader in everyone if reader.name in names]
    if arguments.dsn:
        with psycopg.connect(arguments.dsn) as conn:
            version = (conn.info.parameter_status("server_version") or "0").split()[0]
        return int(
            not soak_on(Server("dsn", arguments.dsn, version), readers, arguments.minutes, arguments.seed)
        )
    with EmbeddedServer(
        major=arguments.major, bindir=arguments.bindir, durable=True, settings=SETTINGS
    ) as embedded:
        server = Server("embedded", embedded.dsn, embedded.version)
        return int(not soak_on(server, readers, arguments.minutes, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
