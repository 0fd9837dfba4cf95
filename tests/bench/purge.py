"""What purging history costs, and what runs notice of it.

    python -m tests.bench.purge [--attempts 1000000] [--steps 100] [--major 18] [--bindir DIR]

Old runs of --steps steps each are made with generate_series, as wide as real ones; then `call etl.purge()`
deletes them while another session starts a run every 50 ms. The floors are taken in the same database: the
same runs before the purge began, and a plain `delete` from a copy of the table. An embedded server with fsync
on, which logs whoever waits for a lock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from b2s.embedded import EmbeddedServer, Setting
from b2s.migrate import migrate
from tests.pipelines import Pipeline
from tests.servers import Database, Server

SETTINGS: Final[dict[str, Setting]] = {
    "max_wal_size": "4GB",
    "log_lock_waits": True,
    "deadlock_timeout": "10ms",
}
"""Whoever waits for a lock for more than 10 ms leaves a line in the server's log."""
ROUNDS: Final = 200
PAUSE: Final = 0.05
FLOOR_ROWS: Final = 500_000
AGED: Final = "to_timestamp(extract(epoch from now()) - 86400 * (500 + n %% 400))"
FILL: Final = f"""
insert into etl.runs (run_id, pipeline_id, config_version_id, request, fingerprint, requested_by,
                      max_concurrency, step_count, submitted_at, started_at, status, worker_pid, ended_at)
overriding system value
select n, r.pipeline_id, r.config_version_id, r.request, r.fingerprint, r.requested_by, 2, %(steps)s, {AGED},
       {AGED}, 'succeeded', 1, {AGED} + interval '1 minute'
  from generate_series(%(first)s::bigint, %(last)s::bigint) n,
       (select * from etl.runs order by run_id limit 1) r;
insert into etl.run_scopes (run_id, scope_index, kind, first_order_index, last_order_index, required_by,
                            remaining_dependencies, is_passed)
select n, s, 'steps', s, s, array[s + 1], 0, true
  from generate_series(%(first)s::bigint, %(last)s::bigint) n, generate_series(1, %(steps)s::int) s;
insert into etl.procedure_runs
select {{columns}}
  from generate_series(%(first)s::bigint, %(last)s::bigint) n, generate_series(1, %(steps)s::int) s,
       (select * from etl.procedure_runs order by run_id limit 1) p"""


def fill(conn_of: Database, attempts: int, steps: int) -> float:
    """Makes old runs; how long that took."""
    conn = conn_of.connect()
    conn.execute("set session_replication_role = replica")
    conn.execute("set synchronous_commit = off")
    names = conn.execute(
        "select attname from pg_attribute where attrelid = 'etl.procedure_runs'::regclass"
        " and attnum > 0 and not attisdropped order by attnum"
    )
    own = {"run_id": "n", "order_index": "s", "scope_index": "s"}
    script = FILL.format(columns=", ".join(own.get(name, f"p.{name}") for (name,) in names))
    began, per_turn = time.monotonic(), max(1, 500_000 // steps)
    for first in range(1000, 1000 + attempts // steps, per_turn):
        last = min(first + per_turn, 1000 + attempts // steps) - 1
        for statement in script.split(";"):
            conn.execute(statement.encode(), {"first": first, "last": last, "steps": steps})
    conn.execute("select setval(pg_get_serial_sequence('etl.runs', 'run_id'), 100000000)")
    conn.execute("vacuum (analyze) etl.procedure_runs")
    conn.execute("vacuum (analyze) etl.runs")
    conn.execute("checkpoint")
    return time.monotonic() - began


def runs(pipeline: Pipeline, until: threading.Event | None) -> list[float]:
    """The durations of runs, ms: so many, or until something is over."""
    conn, took = pipeline.db.connect(), list[float]()
    while (len(took) < ROUNDS) if until is None else not until.is_set():
        began = time.perf_counter()
        conn.execute("call etl.start_run()")
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(PAUSE)
    return took


def plain_delete(pipeline: Pipeline) -> float:
    """Rows a second that a delete takes from a table of the same shape and indexes, in one statement."""
    conn = pipeline.db.connect()
    conn.execute("create table plain (like etl.procedure_runs including indexes)")
    conn.execute(f"insert into plain select * from etl.procedure_runs limit {FLOOR_ROWS}")
    conn.execute("vacuum analyze plain")
    conn.execute("checkpoint")
    began = time.monotonic()
    conn.execute("delete from plain")
    took = time.monotonic() - began
    conn.execute("drop table plain")
    return FLOOR_ROWS / took


def shown(name: str, took: Sequence[float]) -> str:
    ordered = sorted(took)
    at = [
        statistics.median(ordered),
        ordered[int(len(ordered) * 0.95)],
        ordered[int(len(ordered) * 0.99)],
        ordered[-1],
    ]
    return f"| {name:12} | {len(ordered):6} | " + " | ".join(f"{value:6.1f}" for value in at) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=5000)
    parser.add_argument("--major", type=int, help="which embedded Postgres")
    parser.add_argument("--bindir", type=Path, help="the programs of another Postgres")
    arguments = parser.parse_args()
    with EmbeddedServer(
        major=arguments.major, bindir=arguments.bindir, durable=True, settings=SETTINGS
    ) as embedded:
        server = Server("embedded", embedded.dsn, embedded.version)
        database = server.create_database()
        migrate(database.dsn)
        with Pipeline(database) as pipeline:
            pipeline.add("orders")
            pipeline.apply()
            pipeline.start()
            filled = fill(database, arguments.attempts, arguments.steps)
            size = pipeline.value("select pg_size_pretty(pg_total_relation_size('etl.procedure_runs'))")
            print(
                f"{server.title}: {arguments.attempts:,} attempts, {size}, made in {filled:.0f} s", flush=True
            )
            floor = plain_delete(pipeline)
            before, over, during = runs(pipeline, None), threading.Event(), list[float]()
            watcher = threading.Thread(target=lambda: during.extend(runs(pipeline, over)))
            watcher.start()
            began = time.monotonic()
            conn = database.connect()
            row = conn.execute(
                "call etl.purge(batch_rows => %s, max_duration => '5 hours')", [arguments.batch]
            ).fetchone()
            took = time.monotonic() - began
            over.set()
            watcher.join()
            assert row is not None
            purged = row[0]["attempts"]
            rate = purged / took
            print(f"purged {purged:,} attempts in {took:.0f} s: {rate:,.0f} a second,")
            print(f"{rate / floor:.2f} of the {floor:,.0f} rows a second of one plain delete\n")
            print("| runs, ms     |  count |    p50 |    p95 |    p99 |    max |\n|---|---|---|---|---|---|")
            print(shown("before", before))
            print(shown("meanwhile", during))
            log = embedded.log.read_text(errors="replace").splitlines()
            waits = [line for line in log if "still waiting for" in line]
            print("\n".join([f"\nwaits for a lock of more than 10 ms: {len(waits)}", *waits]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
