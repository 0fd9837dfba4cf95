"""What does not get slower as procedures and history grow.

    python -m tests.bench.scale [--attempts 10000000] [--procedures 10000] [--dsn DSN]

plan     a pipeline of so many procedures, layered: planning a run, and beginning one
own      1,000 steps that write a table of their own each: milliseconds per step, by tenth of the run
sync     `b2s sync-config` of 2,000 procedures: the first time, and when nothing has changed
help     `b2s --help`
history  a run of 300 steps, start to end, before and after so many attempts were written into the tables

Without --dsn an embedded server with fsync on is started. Seconds are of this machine; the ratio of the last
line is what transfers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

from b2s.embedded import EmbeddedServer
from b2s.migrate import migrate
from tests.bench.overhead import prepare, procedure, psql, spread
from tests.bench.scrape import clone_runs

Connection = psycopg.Connection[Any]


def seconds(conn: Connection, statement: str, times: int = 5) -> str:
    """A statement that is rolled back, in a session that has executed it before."""
    took = []
    for _ in range(times + 1):
        began = time.perf_counter()
        with conn.transaction(force_rollback=True):
            conn.execute(statement.encode())
            took.append(time.perf_counter() - began)
    return f"{spread(took[1:])} s"


def plan(conn: Connection, procedures: int) -> None:
    prepare(conn, "layered", procedures)
    name = f"bench_layered_{procedures}"
    print(f"{procedures:,} procedures:")
    print("  etl.plan_run", seconds(conn, f"select count(*) from etl.plan_run(pipeline => '{name}')"))
    request = json.dumps({"pipeline": name})
    print("  beginning a run", seconds(conn, f"select etl._begin_run('{request}')"), flush=True)


def own(conn: Connection, steps: int = 1000) -> None:
    conn.execute("create schema own authorization etl_owner")
    conn.execute("set role etl_owner")
    for step in range(steps):
        conn.execute(f"create table own.t{step:04} (k int primary key, n int)".encode())
        body = (
            f"begin insert into own.t{step:04} select k, 1 from generate_series(1, 10) k"
            f" on conflict (k) do update set n = own.t{step:04}.n + 1; return 10; end"
        )
        conn.execute(
            f"create function own.s{step:04}() returns bigint language plpgsql as $$ {body} $$".encode()
        )
    conn.execute("reset role")
    config = {
        "version": 1, "pipeline": "own", "description": None, "max_concurrency": 2, "search_path": [],
        "groups": [], "schedules": [],
        "procedures": [
            {**procedure("fan_out", 0), "name": f"own.s{step:04}", "routine": f"own.s{step:04}"}
            for step in range(steps)
        ],
    }  # fmt: skip
    conn.execute("select etl.apply_config(%s)", [json.dumps(config)])
    conn.execute("vacuum analyze")
    for _ in range(2):
        conn.execute("call etl.start_run(pipeline => 'own')")
    query = """
        select array_agg(ms order by tenth)
          from (select tenth, extract(epoch from max(ended_at) - min(started_at)) * 1000 / count(*) as ms
                  from (select started_at, ended_at, ntile(10) over (order by ended_at) as tenth
                          from etl.procedure_runs where run_id = (select max(run_id) from etl.runs)) t
                 group by tenth) q"""
    (tenths,) = conn.execute(query.encode()).fetchone() or ([],)
    print(
        f"{steps:,} steps with a table each, ms per step by tenth:", ", ".join(f"{ms:.2f}" for ms in tenths)
    )
    conn.execute("drop schema own cascade")


def command(folder: Path, *words: str) -> float:
    began = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "b2s.cli", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return time.perf_counter() - began


def sync(conn: Connection, dsn: str, folder: Path, procedures: int = 2000) -> None:
    prepare(conn, "chain", 1)
    for number in range(procedures):
        conn.execute(
            f"create function bench.p{number:04}() returns bigint language sql as 'select 1::bigint'".encode()
        )
    entries = [
        f"  - {{name: bench.p{number:04}, type: dimension, dependencies: [bench.p{number - 1:04}]}}"
        for number in range(1, procedures)
    ]
    text = "version: 1\npipeline: many\nprocedures:\n  - {name: bench.p0000, type: dimension}\n"
    (folder / "transformations.yaml").write_text(text + "\n".join(entries) + "\n", encoding="utf-8")
    first = command(folder, "sync-config", "--dsn", dsn)
    again = [command(folder, "sync-config", "--dsn", dsn) for _ in range(3)]
    print(f"sync-config of {procedures:,}: {first:.2f} s; nothing changed {statistics.median(again):.2f} s")


def history(conn: Connection, dsn: str, folder: Path, attempts: int) -> None:
    prepare(conn, "layered", 300)
    script = folder / "run.sql"
    script.write_text("call etl.start_run(pipeline => 'bench_layered_300');\n", encoding="utf-8")

    def runs() -> list[float]:
        return [psql(dsn, script) for _ in range(12)][2:]

    before = runs()
    (model,) = conn.execute("select max(run_id) from etl.runs").fetchone() or (0,)
    clone_runs(conn, model, attempts // 300)
    after = runs()
    print(f"300 steps: {spread(before)} s; beside {attempts:,} attempts: {spread(after)} s;", end=" ")
    print(f"ratio {statistics.median(after) / statistics.median(before):.2f}", flush=True)


def main() -> None:
    """Prints what each part takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attempts", type=int, default=10_000_000)
    parser.add_argument("--procedures", type=int, default=10_000)
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dsn = arguments.dsn or stack.enter_context(EmbeddedServer(durable=True)).dsn
        migrate(dsn)
        conn = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        plan(conn, arguments.procedures)
        own(conn)
        sync(conn, dsn, folder)
        took = [command(folder, "--help") for _ in range(11)]
        print(f"b2s --help {spread(took)} s, Python's own start included", flush=True)
        history(conn, dsn, folder, arguments.attempts)


if __name__ == "__main__":
    main()
