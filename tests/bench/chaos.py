"""Hundreds of rounds of trouble for the sessions that execute a run, and Silver against an undisturbed run.

    python -m tests.bench.chaos [--rounds 300] [--seed N] [--major 15 | --bindir DIR]

Each round executes a pipeline of some thirty steps in one to four sessions while something happens to them:
sessions are killed, cancelled and cut off, the server crashes, steps fail, deadlock and take too long
(tests/chaos.py). Then the run is resumed until it succeeds, and everything that must hold is checked. Exits
with 1 when something does not hold, after saying what.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from b2s.embedded import EmbeddedServer
from tests.chaos import FAULTS, Chaos, Dag
from tests.servers import SETTINGS, Server


def rounds(server: Server, seed: int, count: int) -> list[str]:
    """What was wrong in so many rounds, and with Silver after them."""
    template = server.migrated_template()
    db, quiet = (server.create_database(template=template) for _ in range(2))
    chaos = Chaos(db, seed=seed, can_crash=True)
    began = time.monotonic()
    found: list[str] = []
    with chaos.watchdog():
        for number in range(1, count + 1):
            chaos.round()
            found += [f"round {number}: {problem}" for problem in chaos.problems()]
            if number % 50 == 0:
                print(f"{number} rounds, {time.monotonic() - began:.0f} s, {len(found)} problems", flush=True)
    found += chaos.differences(Dag(quiet))
    ended = chaos.dag.pipeline.rows(
        "select status, count(*) as n, (select count(*) from etl.procedure_runs) as attempts,"
        " (select count(*) from etl.procedure_runs where error_code = 'worker.lost') as lost"
        " from etl.runs group by status order by n desc"
    )
    print(
        "runs: " + ", ".join(f"{row['n']} {row['status']}" for row in ended)
        + f"; {ended[0]['attempts']} attempts, {ended[0]['lost']} of them lost with their session"
    )  # fmt: skip
    print("faults: " + ", ".join(f"{chaos.counts[f'fault {name}']} {name}" for name in FAULTS))
    answers = ", ".join(f"{n} {what}" for what, n in chaos.answers.most_common())
    print(f"calls that ended with an error: {answers}")
    db.drop()
    quiet.drop()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--major", type=int, help="which embedded Postgres")
    parser.add_argument("--bindir", type=Path, help="the programs of another Postgres")
    arguments = parser.parse_args()
    with EmbeddedServer(major=arguments.major, bindir=arguments.bindir, settings=SETTINGS) as embedded:
        server = Server("embedded", embedded.dsn, embedded.version, embedded.bindir, embedded)
        print(f"{server.title}, {arguments.rounds} rounds, seed {arguments.seed}", flush=True)
        found = rounds(server, arguments.seed, arguments.rounds)
    print("\n".join(found) or "nothing lost, nothing twice, nothing out of order, nothing left behind")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
