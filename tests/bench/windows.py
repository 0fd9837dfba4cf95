"""What a window costs: the horizon beside many sessions, the index under it, and a backlog read through it.

    python -m tests.bench.windows [--part horizon|index|backlog] [--sessions 1000] [--rows 1000000]
                                  [--pairs 5] [--major 15] [--dsn DSN]

horizon  A run of many steps that do nothing, with a watermark each and without one; the difference is what
         fixing the windows adds to a step. With no other session, with many idle ones, and with a tenth of
         those in transactions.
index    Small windows of a large table, read by one session again and again: what the server reads for them.
backlog  The whole table in one window, and in slices, against one INSERT .. SELECT by hand, in turns.

Without --dsn an embedded server with fsync on is started. Exits with 1 when a window is not read by an index.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from b2s.embedded import EmbeddedServer, Setting
from b2s.migrate import migrate
from tests.pipelines import Pipeline
from tests.servers import Connection, Database, Server

SETTINGS: dict[str, Setting] = {
    "max_connections": 1200,
    "max_prepared_transactions": 10,
    "max_wal_size": "16GB",
    "shared_buffers": "1GB",
    "checkpoint_timeout": "1h",
    "autovacuum": False,
}
STRATEGIES = ("timestamp", "id", "xid")
COLUMN = {"timestamp": "at", "id": "id", "xid": "etl_xid"}
TYPE = {"timestamp": "timestamptz", "id": "bigint", "xid": "pg_snapshot"}
WINDOW = {
    "timestamp": "b.at < p_until and (p_since is null or b.at >= p_since)",
    "id": "b.id < p_until and (p_since is null or b.id >= p_since)",
    "xid": "etl.arrived(b.etl_xid, p_since, p_until)",
}
# What --rows is cut into.
SLICES = 10


def watermark(strategy: str, state_key: str) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "source": [f"bronze.events.{COLUMN[strategy]}"],
        "state_key": state_key,
        "delay_ms": 0,
    }


def arguments_of(strategy: str) -> str:
    return f"p_since {TYPE[strategy]}, p_until {TYPE[strategy]}"


def prepare(database: Database, rows: int) -> Pipeline:
    """Bronze with so many rows of an hour, each written by one of a thousand transactions."""
    pipeline = Pipeline(database, "prepare")
    pipeline.sql(
        "create table bronze.events (id bigint generated always as identity, at timestamptz not null default"
        " now(), etl_xid xid8 not null default pg_current_xact_id(), note text not null)"
    )
    first = int(pipeline.value("select pg_current_xact_id()::text::bigint"))
    for _ in range(1000):
        pipeline.value("select pg_current_xact_id()::text")
    pipeline.conn.execute(
        "insert into bronze.events (at, etl_xid, note)"
        " select now() - interval '2 hours' + n * interval '1 hour' / %(rows)s,"
        " (%(first)s + n * 1000 / %(rows)s)::text::xid8, md5(n::text) from generate_series(1, %(rows)s) n",
        {"rows": rows, "first": first},
    )
    for column in COLUMN.values():
        pipeline.conn.execute(f"create index on bronze.events ({column})".encode())
    pipeline.conn.execute("vacuum (analyze, freeze) bronze.events")
    pipeline.conn.execute("select pg_stat_force_next_flush()")
    return pipeline


# -- the horizon --


def configure_steps(database: Database, strategy: str | None, steps: int) -> Pipeline:
    """A pipeline of steps that do nothing."""
    name = strategy or "plain"
    pipeline = Pipeline(database, f"horizon_{name}")
    body = "return 0"
    if strategy:
        pipeline.routine(f"nothing_{name}", body, arguments_of(strategy))
    else:
        pipeline.routine(f"nothing_{name}", body)
    for step in range(steps):
        key = f"{name}_{step}"
        pipeline.add(
            key, routine=f"silver.nothing_{name}", watermark=watermark(strategy, key) if strategy else None
        )
    pipeline.apply()
    return pipeline


@contextmanager
def sessions(database: Database, idle: int, busy: int) -> Iterator[None]:
    """Other sessions: some that do nothing, some inside a transaction."""
    with ExitStack() as stack:
        for number in range(idle + busy):
            conn = stack.enter_context(psycopg.connect(database.dsn, autocommit=True))
            if number < busy:
                conn.execute("begin")
                conn.execute("select now()")
        yield


def measure_horizon(database: Database, count: int, steps: int = 100, turns: int = 15) -> None:
    pipelines = {name: configure_steps(database, name, steps) for name in (None, *STRATEGIES)}
    print(
        f"milliseconds per step, {steps} steps, the fastest of {turns} runs; added: by the window",
        flush=True,
    )
    for idle, busy in ((0, 0), (count, 0), (count - count // 10, count // 10)):
        with sessions(database, idle, busy):
            taken: dict[str | None, list[float]] = {name: [] for name in pipelines}
            with database.connect() as conn:
                for turn in range(turns + 1):
                    for name, pipeline in pipelines.items():
                        started = time.perf_counter()
                        run = pipeline.start(conn, pipeline=pipeline.name)
                        assert run.status == "succeeded", pipeline.steps(run.run_id)[0]
                        if turn:
                            taken[name].append((time.perf_counter() - started) * 1000 / steps)
            plain = min(taken.pop(None))
            added = ", ".join(
                f"{name} {min(values):.3f} (added {min(values) - plain:.3f})"
                for name, values in taken.items()
            )
            print(f"{idle:5} idle, {busy:4} in transactions: no window {plain:.3f}, {added}", flush=True)


# -- the index --


def explain(pipeline: Pipeline, strategy: str, mode: str) -> str:
    """The condition that the index gets, with the bounds as parameters of a prepared statement."""
    since, until = {
        "timestamp": ("now() - interval '90 minutes'", "now() - interval '89 minutes 59 seconds'"),
        "id": ("1000", "2000"),
        "xid": ("'900:900:'", "'901:901:'"),
    }[strategy]
    condition = WINDOW[strategy].replace("p_since", "$1").replace("p_until", "$2")
    with pipeline.db.connect() as conn:
        conn.execute(f"set plan_cache_mode = {mode}".encode())
        kind = TYPE[strategy]
        conn.execute(
            f"prepare w ({kind}, {kind}) as select b.note from bronze.events b where {condition}".encode()
        )
        plan = [str(row[0]) for row in conn.execute(f"explain execute w ({since}, {until})".encode())]
    return next((line.strip() for line in plan if "Index Cond" in line), str(plan[0]))


def measure_index(database: Database, runs: int = 10, fresh: int = 100) -> bool:
    """Whether small windows read about as many rows as they hold."""
    is_served = True
    for strategy in STRATEGIES:
        pipeline = Pipeline(database, f"index_{strategy}")
        pipeline.sql(f"create table silver.index_{strategy} (note text)")
        pipeline.add(
            f"index_{strategy}",
            f"insert into silver.index_{strategy} select note from bronze.events b where {WINDOW[strategy]}",
            arguments=arguments_of(strategy),
            watermark=watermark(strategy, f"index_{strategy}"),
        )
        pipeline.apply()
        time.sleep(1.05)
        pipeline.start(pipeline=pipeline.name)
        before = counters(pipeline.conn)
        for _ in range(runs):
            pipeline.conn.execute(
                "insert into bronze.events (note) select md5(n::text) from generate_series(1, %s) n", [fresh]
            )
            time.sleep(1.05)  # the newest second of timestamps is not read
            pipeline.start(pipeline=pipeline.name)
        scans, fetched = (now - then for now, then in zip(counters(pipeline.conn), before, strict=True))
        is_good = scans == 0 and runs * fresh <= fetched < 3 * runs * fresh
        is_served = is_served and is_good
        print(
            f"{strategy}: {runs} windows of {fresh} rows: {scans} sequential scans,"
            f" {fetched} index entries read{'' if is_good else '  <-- NOT AS IT SHOULD BE'}",
            flush=True,
        )
        for mode in ("force_custom_plan", "force_generic_plan"):
            condition = explain(pipeline, strategy, mode)
            is_served = is_served and "Index Cond" in condition
            print(f"  {mode}: {condition}", flush=True)
    return is_served


def counters(conn: Connection) -> tuple[int, int]:
    """Sequential scans of Bronze, and index entries read, so far, by this session too."""
    conn.execute("select pg_stat_force_next_flush()")
    row = conn.execute(
        "select (select seq_scan from pg_stat_user_tables where relname = 'events'),"
        " (select sum(idx_tup_read) from pg_stat_user_indexes where relname = 'events')"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])


# -- a backlog --


def measure_backlog(database: Database, rows: int, pairs: int) -> None:
    """The ratio to a hand-written statement, turn by turn; who begins alternates."""
    for strategy in STRATEGIES:
        name = f"backlog_{strategy}"
        width: dict[str, int | None] = {
            "whole": None,
            "sliced": {"timestamp": 3_600_000, "id": rows, "xid": 1000}[strategy] // SLICES + 1,
        }
        statement = (
            "insert into silver.{} (id, at, note) select b.id, b.at, b.note from bronze.events b where {}"
        )
        readers: dict[str, Pipeline] = {}
        for shape, max_window in width.items():
            pipeline = Pipeline(database, f"{name}_{shape}")
            target = f"{name}_{shape}"
            pipeline.sql(f"create table silver.{target} (id bigint, at timestamptz, note text)")
            pipeline.add(
                target,
                statement.format(target, WINDOW[strategy]),
                arguments=arguments_of(strategy),
                watermark=watermark(strategy, target),
                max_window=max_window,
            )
            pipeline.apply()
            readers[shape] = pipeline
        readers["whole"].sql(f"create table silver.{name}_hand (id bigint, at timestamptz, note text)")
        warm = Pipeline(database, f"{name}_warm")
        warm.add(
            f"{name}_warm",
            "perform 1",
            arguments=arguments_of(strategy),
            watermark=watermark(strategy, f"{name}_warm"),
        )
        warm.apply()
        bound = (
            readers["whole"].value(f"select max({COLUMN[strategy]}) from bronze.events")
            if strategy != "xid"
            else None
        )
        by_hand = statement.format(
            f"{name}_hand",
            f"b.{COLUMN[strategy]} <= '{bound}'" if bound else "b.etl_xid < pg_current_xact_id()",
        )
        ratios: dict[str, list[tuple[float, float]]] = {shape: [] for shape in readers}
        for turn in range(pairs + 1):
            order = ["hand", *readers] if turn % 2 else [*readers, "hand"]
            taken = {one: backlog_turn(database, readers, warm, name, one, by_hand, rows) for one in order}
            if turn:
                for shape, values in ratios.items():
                    elapsed, busy = (
                        ours / hand for ours, hand in zip(taken[shape], taken["hand"], strict=True)
                    )
                    values.append((elapsed, busy))
        print(f"{strategy}: {rows} rows, by hand {taken['hand'][0]:.2f} s; b2s / by hand:")
        for shape, values in ratios.items():
            elapsed_all, busy_all = zip(*values, strict=True)
            print(f"  {shape:6} elapsed {spread(elapsed_all)}, processor {spread(busy_all)}", flush=True)


def spread(values: Sequence[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def processor_seconds(conn: Connection) -> float:
    """How long the backend of a session has computed, on Linux; elsewhere how long ago it began."""
    try:
        return int(Path(f"/proc/{conn.info.backend_pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return time.perf_counter()


def backlog_turn(
    database: Database,
    readers: dict[str, Pipeline],
    warm: Pipeline,
    name: str,
    shape: str,
    by_hand: str,
    rows: int,
) -> tuple[float, float]:
    """Seconds that it takes to read everything into an empty table, and of those the computing.

    In a session that has executed a run before: what the first one of a session costs is another matter.
    """
    control = readers["whole"].conn
    control.execute(f"truncate silver.{name}_{shape}".encode())
    control.execute(
        "update etl.state set last_success_watermark = null where state_key = %s", [f"{name}_{shape}"]
    )
    control.execute("checkpoint")
    with database.connect() as conn:
        warm.start(conn, pipeline=warm.name)
        started, busy = time.perf_counter(), processor_seconds(conn)
        if shape == "hand":
            conn.execute(by_hand.encode())
        else:
            assert readers[shape].start(conn, pipeline=readers[shape].name).status == "succeeded"
        taken = time.perf_counter() - started, processor_seconds(conn) - busy
    assert readers["whole"].value(f"select count(*) from silver.{name}_{shape}") == rows
    return taken


def measure(server: Server, arguments: argparse.Namespace) -> bool:
    database = server.create_database()
    migrate(database.dsn)
    prepare(database, arguments.rows)
    print(server.title, flush=True)
    is_served = True
    if arguments.part in (None, "horizon"):
        measure_horizon(database, arguments.sessions)
    if arguments.part in (None, "backlog"):
        measure_backlog(database, arguments.rows, arguments.pairs)
    if arguments.part in (None, "index"):
        is_served = measure_index(database)
    database.drop()
    return is_served


def main() -> int:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("horizon", "index", "backlog"))
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--major", type=int, help="which embedded Postgres")
    parser.add_argument("--bindir", type=Path, help="the programs of another Postgres")
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    if arguments.dsn:
        with psycopg.connect(arguments.dsn) as conn:
            version = (conn.info.parameter_status("server_version") or "0").split()[0]
        return int(not measure(Server("dsn", arguments.dsn, version), arguments))
    with EmbeddedServer(
        major=arguments.major, bindir=arguments.bindir, durable=True, settings=SETTINGS
    ) as embedded:
        return int(not measure(Server("embedded", embedded.dsn, embedded.version), arguments))


if __name__ == "__main__":
    sys.exit(main())
