"""What a scrape costs the database, and that history does not matter to it.

    python -m tests.bench.scrape [--attempts 10000000] [--procedures 300] [--scrapes 100] [--dsn DSN]

The queries of a scrape in a session that is kept, as the exporter keeps one, and in a new one. Milliseconds
as the server gives them, planning and execution; and processor time of the session, which other work on the
machine changes least (Linux). First without any history (the floor), then with so many attempts; and what
counting a run costs when it ends. Without --dsn an embedded server is started.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import psycopg

from b2s.embedded import EmbeddedServer
from b2s.exporter import QUERIES
from b2s.migrate import migrate
from tests.bench.overhead import prepare, spread

_BATCH = 2000
_MOMENTS = ("submitted_at", "started_at", "ended_at")
_COLUMNS = """
select array_agg(a.attname::text order by a.attnum) from pg_attribute a
 where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
   and a.attname not in ('run_id', 'idempotency_key')"""


def clone_runs(connection: psycopg.Connection[Any], model: int, runs: int) -> None:
    """Writes so many runs that went as the model did, a minute apart, with their attempts and refreshes."""
    connection.execute("set session_replication_role = replica")
    for table in ("runs", "procedure_runs", "mv_refreshes"):
        connection.execute(f"alter table etl.{table} set (fillfactor = 100)".encode())
        (names,) = connection.execute(_COLUMNS, [f"etl.{table}"]).fetchone() or ([],)
        shown = ", ".join(
            f"m.{name} - g.n * interval '1 minute'" if name in _MOMENTS else f"m.{name}" for name in names
        )
        overriding = "overriding system value" if table == "runs" else ""
        for first in range(0, runs, _BATCH):
            numbers = f"generate_series({first + 1}, {min(first + _BATCH, runs)}) g(n)"
            connection.execute(
                f"insert into etl.{table} (run_id, {', '.join(names)}) {overriding}"
                f" select {model + 1 + runs} - g.n, {shown}"
                f" from {numbers} cross join etl.{table} m where m.run_id = {model}".encode()
            )
    sequence = "pg_get_serial_sequence('etl.runs', 'run_id')"
    connection.execute(f"select setval({sequence}, max(run_id)) from etl.runs".encode())
    connection.execute("reset session_replication_role")
    connection.execute("vacuum analyze")


def scrape(connection: psycopg.Connection[Any]) -> dict[str, float]:
    """Milliseconds of each query of one scrape."""
    took = {}
    connection.execute("begin isolation level repeatable read read only")
    connection.execute("select set_config('jit', 'off', true)")
    for name, query in QUERIES.items():
        explain = f"explain (analyze, timing off, summary, format json) {query}"
        ((plan,),) = connection.execute(explain.encode()).fetchall()
        took[name] = plan[0]["Planning Time"] + plan[0]["Execution Time"]
    connection.execute("commit")
    return took


def processor_ms(connection: psycopg.Connection[Any]) -> float:
    """What the session has used of the processors so far."""
    text = Path(f"/proc/{connection.info.backend_pid}/schedstat").read_text(encoding="ascii")
    return int(text.split()[0]) / 1e6


def measure(dsn: str, scrapes: int) -> float:
    """The mean processor time of so many scrapes, after printing what each query takes."""
    firsts = []
    for _ in range(10):
        with psycopg.connect(dsn, autocommit=True) as connection:
            scrape(connection)
            firsts.append(processor_ms(connection))
    with psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(5):
            scrape(connection)
        began = processor_ms(connection)
        found = [scrape(connection) for _ in range(scrapes)]
        mean = (processor_ms(connection) - began) / scrapes
    for name in QUERIES:
        print(f"  {name:11} {spread([one[name] for one in found])} ms")
    print(f"  {'together':11} {spread([sum(one.values()) for one in found])} ms")
    print(f"  processor time {mean:.1f} ms; first scrape and start of a session {min(firsts):.1f} ms")
    return mean


def counting(connection: psycopg.Connection[Any], run_id: int, times: int = 20) -> float:
    """Milliseconds of counting a run when it ends, the fastest of several."""
    took = []
    for _ in range(times):
        connection.execute("begin")
        began = time.perf_counter()
        connection.execute("select etl._count_runs(array[%s::bigint])", [run_id])
        took.append(1000 * (time.perf_counter() - began))
        connection.execute("rollback")
    return min(took)


def run(dsn: str, arguments: argparse.Namespace) -> None:
    """Prints the floor, the measurement, and their ratio."""
    migrate(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        prepare(connection, "layered", arguments.procedures)
        name = f"bench_layered_{arguments.procedures}"
        for _ in range(2):
            connection.execute(f"call etl.start_run(pipeline => '{name}')".encode())
        print(f"{arguments.procedures} procedures, 2 runs:")
        floor = measure(dsn, arguments.scrapes)
        ended = counting(connection, 2)
        per_step = 1000 * ended / arguments.procedures
        print(f"  counting a run at its end {ended:.1f} ms, {per_step:.0f} us for each step")
        runs = arguments.attempts // arguments.procedures
        clone_runs(connection, 2, runs)
        (attempts,) = connection.execute("select count(*) from etl.procedure_runs").fetchone() or (0,)
        print(f"{arguments.procedures} procedures, {runs:,} more runs, {attempts:,} attempts:")
        full = measure(dsn, arguments.scrapes)
        print(f"  counting a run at its end {counting(connection, 2):.1f} ms")
    print(f"processor time with history / without: {full / floor:.2f}")


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attempts", type=int, default=10_000_000)
    parser.add_argument("--procedures", type=int, default=300)
    parser.add_argument("--scrapes", type=int, default=100)
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    if arguments.dsn:
        run(arguments.dsn, arguments)
        return
    with EmbeddedServer(settings={"max_wal_size": "4GB", "maintenance_work_mem": "512MB"}) as embedded:
        run(embedded.dsn, arguments)


if __name__ == "__main__":
    main()
