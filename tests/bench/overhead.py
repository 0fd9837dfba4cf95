"""What running a step costs: b2s against the same statements in one psql session, one transaction each.

    python -m tests.bench.overhead [--steps 1000] [--shape chain] [--pairs 5] [--dsn DSN]

Each step upserts ten rows. Two floors: `call` is the very statement that b2s executes,
`select bench.step_00001()`; `plain` is the upsert inside it, typed into psql without a function.
synchronous_commit is on. Floors and b2s take turns, each in a fresh session; the ratio is taken turn by turn.
Without --dsn an embedded server with fsync on is started.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from b2s.embedded import EmbeddedServer
from b2s.migrate import migrate

SHAPES = ("chain", "fan_out", "layered")
STATEMENT = (
    "insert into bench.target select k, {step}, 1 from generate_series(1, 10) k "
    "on conflict (k, step) do update set n = bench.target.n + 1"
)


def dependencies(shape: str, step: int) -> list[int]:
    """The steps that a step needs, by shape: a chain, a root with many leaves, or layers of ten."""
    if shape == "chain":
        return [step - 1] if step else []
    if shape == "fan_out":
        return [0] if step else []
    layer = step // 10
    return [(layer - 1) * 10 + step % 10, (layer - 1) * 10 + (step + 3) % 10] if layer else []


def procedure(shape: str, step: int) -> dict[str, Any]:
    """One configured procedure, all defaults written out."""
    return {
        "name": f"bench.step_{step:05}", "routine": f"bench.step_{step:05}", "type": "dimension",
        "description": None,
        "dependencies": [f"bench.step_{needed:05}" for needed in dependencies(shape, step)],
        "allow_fact_dependency": False, "group": None, "tags": [], "default_mode": "incremental",
        "allow_full_refresh": False, "transaction_scope": "per_procedure", "isolation": "read committed",
        "params": [], "args": {}, "watermark": None,
        "retries": {"attempts": 3, "backoff_ms": 1000, "max_backoff_ms": 30000}, "timeout_ms": None,
        "lock_timeout_ms": None, "on_failure": "continue", "max_window": None, "checks": [], "mv_refresh": [],
    }  # fmt: skip


def prepare(connection: psycopg.Connection[Any], shape: str, steps: int, observe: str = "daily") -> None:
    """Creates the target, one function per step and the configuration."""
    connection.execute("drop schema if exists bench cascade")
    connection.execute("create schema bench authorization etl_owner")
    connection.execute(
        "create table bench.target (k int, step int, n int, primary key (step, k)) with (fillfactor = 50)"
    )
    connection.execute("create unique index on bench.target (k, step)")
    connection.execute("alter table bench.target owner to etl_owner")
    for step in range(steps):
        body = f"begin {STATEMENT.format(step=step)}; return 10; end"
        connection.execute(
            f"create function bench.step_{step:05}() returns bigint language plpgsql as $$ {body} $$".encode()
        )
    config = {
        "version": 1, "pipeline": f"bench_{shape}_{steps}", "description": None, "max_concurrency": 2,
        "search_path": [], "groups": [], "schedules": [], "observe_lineage": observe,
        "procedures": [procedure(shape, step) for step in range(steps)],
    }  # fmt: skip
    connection.execute("select etl.apply_config(%s)", [json.dumps(config)])
    connection.execute("vacuum analyze")


def psql(dsn: str, script: Path) -> float:
    """Runs a script in one psql session; seconds of wall time."""
    start = time.perf_counter()
    command = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-d", dsn, "-f", str(script)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


@contextmanager
def server(dsn: str | None) -> Iterator[str]:
    """The server to measure on: the one given, or an embedded one with fsync on."""
    if dsn:
        yield dsn
        return
    with EmbeddedServer(durable=True) as embedded:
        yield embedded.dsn


def compare(dsn: str, shape: str, steps: int, pairs: int) -> list[tuple[float, float, float]]:
    """Turns of (plain, call, b2s) seconds, after one that is not counted."""
    scripts = {
        "plain": "".join(f"{STATEMENT.format(step=step)};\n" for step in range(steps)),
        "call": "".join(f"select bench.step_{step:05}();\n" for step in range(steps)),
        "b2s": f"call etl.start_run(pipeline => 'bench_{shape}_{steps}');\n",
    }
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, script in scripts.items():
            files.append(Path(folder, f"{name}.sql"))
            files[-1].write_text(script, encoding="utf-8")
        turns = [tuple(psql(dsn, file) for file in files) for _ in range(pairs + 1)]
    return [(plain, call, b2s) for plain, call, b2s in turns[1:]]


def spread(values: list[float]) -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def counters(connection: psycopg.Connection[Any]) -> dict[str, float]:
    """Commits and WAL bytes so far."""
    connection.execute("select pg_stat_force_next_flush()")
    row = connection.execute(
        "select xact_commit, (select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0'))"
        " from pg_stat_database where datname = current_database()"
    ).fetchone()
    assert row is not None
    return {"commits": float(row[0]), "wal_bytes": float(row[1])}


def main() -> None:
    """Prints one line per shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    with server(arguments.dsn) as dsn:
        migrate(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            for shape in arguments.shape or SHAPES:
                prepare(connection, shape, arguments.steps)
                measured = compare(dsn, shape, arguments.steps, arguments.pairs)
                before = counters(connection)
                with psycopg.connect(dsn, autocommit=True) as runner:
                    runner.execute(
                        f"call etl.start_run(pipeline => 'bench_{shape}_{arguments.steps}')".encode()
                    )
                after = counters(connection)
                per_step = 1000 / arguments.steps
                print(
                    f"{shape:8} {arguments.steps} steps: "
                    f"{spread([b2s / call for _, call, b2s in measured])} x call, "
                    f"{spread([b2s / plain for plain, _, b2s in measured])} x plain; ms per step: "
                    f"plain {statistics.median(m[0] for m in measured) * per_step:.3f}, "
                    f"call {statistics.median(m[1] for m in measured) * per_step:.3f}, "
                    f"b2s {statistics.median(m[2] for m in measured) * per_step:.3f}; "
                    f"{(after['commits'] - before['commits']) / arguments.steps:.2f} commits and "
                    f"{(after['wal_bytes'] - before['wal_bytes']) / arguments.steps:.0f} B of WAL per step",
                    flush=True,
                )


if __name__ == "__main__":
    main()
