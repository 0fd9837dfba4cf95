"""What sharing a run among sessions gains, and what it costs.

    python -m tests.bench.workers [--part PART] [--pairs 5] [--steps 10000] [--major 15] [--dsn DSN]

pairs  Eight equal steps that only compute, executed by two sessions, against two psql sessions that run four
       of the same statements each, in turns; the ratio is taken turn by turn.
skewed Eight short steps, and behind them in the plan a chain of four that takes as long as all of them,
       executed by two sessions, against two psql sessions: one runs the chain, the other one the rest.
dag    A random pipeline of 200 small steps, executed by 1, 2 and 4 sessions.
long   A pipeline of many steps that do next to nothing, executed by one session and by two: milliseconds per
       step in each tenth of the run, and the memory of the backend then.

Without --dsn an embedded server with fsync on is started. Exits with 1 when memory grows with the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg

from b2s.embedded import EmbeddedServer
from b2s.migrate import migrate
from tests.bench.overhead import procedure

Connection = psycopg.Connection[Any]
PARTS = ("pairs", "skewed", "dag", "long")
COMPUTE = "select count(*) from generate_series(1, {rows}) i where md5(i::text) like 'ff%'"


def build(conn: Connection, name: str, bodies: Sequence[str], needs: Sequence[Sequence[int]]) -> None:
    """A pipeline whose step n needs these steps and has this body; the last one when there are fewer."""
    conn.execute(f"drop schema if exists {name} cascade".encode())
    conn.execute(f"create schema {name} authorization etl_owner".encode())
    conn.execute(f"create table {name}.target (step int, n int)".encode())
    conn.execute(f"alter table {name}.target owner to etl_owner".encode())
    for step, body in enumerate(bodies):
        conn.execute(
            f"create function {name}.step_{step:05}() returns bigint language plpgsql as"
            f" $$ declare n bigint; begin {body}; return n; end $$".encode()
        )
    procedures = [
        {
            **procedure("fan_out", step),
            "name": f"{name}.step_{step:05}",
            "routine": f"{name}.step_{min(step, len(bodies) - 1):05}",
            "dependencies": [f"{name}.step_{needed:05}" for needed in needs[step]],
        }
        for step in range(len(needs))
    ]
    config = {
        "version": 1, "pipeline": name, "description": None, "max_concurrency": 4, "search_path": [],
        "groups": [], "schedules": [], "procedures": procedures,
    }  # fmt: skip
    conn.execute("select etl.apply_config(%s)", [json.dumps(config)])
    conn.execute("vacuum analyze")


def run(dsn: str, pipeline: str, sessions: int) -> float:
    """Seconds from the request to the end of the run, executed by so many sessions that are there already."""
    with ExitStack() as stack:
        conns: list[Connection] = [
            stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(sessions)
        ]
        row = (
            conns[0]
            .execute(
                "select run_id from etl.submit_run(pipeline => %s, max_concurrency => %s)",
                [pipeline, sessions],
            )
            .fetchone()
        )
        assert row is not None
        began = time.perf_counter()
        statement = f"call etl.work(pipeline => '{pipeline}')".encode()
        threads = [threading.Thread(target=conn.execute, args=[statement]) for conn in conns]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
        status = conns[0].execute("select status from etl.runs where run_id = %s", row).fetchone()
        assert status == ("succeeded",), status
    return seconds


def in_psql(dsn: str, scripts: Sequence[str]) -> float:
    """Seconds that these scripts take side by side in a psql session each."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, script in enumerate(scripts):
            files.append(Path(folder, f"{number}.sql"))
            files[-1].write_text(script, encoding="utf-8")
        began = time.perf_counter()
        sessions = [
            subprocess.Popen(
                ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-o", os.devnull, "-d", dsn, "-f", str(file)]
            )
            for file in files
        ]
        assert all(session.wait() == 0 for session in sessions)
        return time.perf_counter() - began


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def pairs(dsn: str, turns: int) -> bool:
    """Two workers against two sessions of psql."""
    body = f"n := ({COMPUTE.format(rows=1_600_000)})"
    with psycopg.connect(dsn, autocommit=True) as conn:
        build(conn, "compute", [body] * 8, [[]] * 8)
    halves = ["".join(f"select compute.step_{step:05}();\n" for step in range(n, 8, 2)) for n in range(2)]
    measured = [(in_psql(dsn, halves), run(dsn, "compute", 2)) for _ in range(turns + 1)][1:]
    ratios = [b2s / by_hand for by_hand, b2s in measured]
    print(
        f"eight steps that compute, two sessions: b2s / psql {spread(ratios)}; seconds:"
        f" psql {spread([m[0] for m in measured])}, b2s {spread([m[1] for m in measured])}",
        flush=True,
    )
    return True


def skewed(dsn: str, turns: int) -> bool:
    """Two workers against the best that two sessions of psql can do; the first run tells b2s what is long."""
    body = "n := ({0})"
    short, long_ = (body.format(COMPUTE.format(rows=rows)) for rows in (800_000, 1_600_000))
    bodies = [short] * 8 + [long_] * 4
    with psycopg.connect(dsn, autocommit=True) as conn:
        build(conn, "skewed", bodies, [[]] * 9 + [[8], [9], [10]])
    halves = ["".join(f"select skewed.step_{n:05}();\n" for n in half) for half in (range(8), range(8, 12))]
    measured = [(in_psql(dsn, halves), run(dsn, "skewed", 2)) for _ in range(turns + 1)]
    first = measured.pop(0)
    print(
        "eight short steps and a chain of four, two sessions: b2s / psql"
        f" {spread([b2s / by_hand for by_hand, b2s in measured])}; the first run, of which nothing was known:"
        f" {first[1] / first[0]:.3f}",
        flush=True,
    )
    return True


def dag(dsn: str, turns: int) -> bool:
    """A random pipeline of 200 steps of 1 to 20 ms, a half of it in waits for something else."""
    rng = random.Random(7)
    needs = [rng.sample(range(max(0, n - 30), n), min(n, rng.choice((0, 1, 1, 2, 3)))) for n in range(200)]
    bodies = [
        f"n := ({COMPUTE.format(rows=rng.randrange(500, 10_000))});"
        f" perform pg_sleep({rng.random() / 100}); insert into dag.target values ({n}, n)"
        for n in range(200)
    ]
    with psycopg.connect(dsn, autocommit=True) as conn:
        build(conn, "dag", bodies, needs)
    seconds: dict[int, list[float]] = {sessions: [] for sessions in (1, 2, 4)}
    for _ in range(turns):
        for sessions, measured in seconds.items():
            measured.append(run(dsn, "dag", sessions))
    alone = statistics.median(seconds[1])
    for sessions, measured in seconds.items():
        print(
            f"200 steps, {sessions} session(s): {spread(measured)} s,"
            f" {alone / statistics.median(measured):.2f} times as fast as one",
            flush=True,
        )
    return True


def long(dsn: str, steps: int) -> bool:
    """Per tenth of a long run: milliseconds per step, and the memory of the backend."""
    needs = [[n - 10] if n >= 10 else [] for n in range(steps)]
    with psycopg.connect(dsn, autocommit=True) as conn:
        # One function for all: what the server keeps of each function that was called would hide the rest.
        # Each hundredth time it looks at the session that executes it, from within.
        body = (
            "insert into long.target values (1, 1) returning target.n into n;"
            " if random() < 0.01 then insert into long.memory select clock_timestamp(), pg_backend_pid(),"
            " sum(total_bytes), sum(used_bytes) from pg_backend_memory_contexts; end if"
        )
        build(conn, "long", [body], needs)
        conn.execute("create table long.memory (at timestamptz, pid int, total bigint, used bigint)")
        conn.execute("alter table long.memory owner to etl_owner")
        conn.execute("grant pg_read_all_stats to etl_engine")
        is_flat = True
        for sessions in (1, 2):
            conn.execute("truncate long.memory")
            seconds = run(dsn, "long", sessions)
            cost = conn.execute(
                "select array_agg(ms order by tenth) from (select tenth,"
                "  extract(epoch from max(ended_at) - min(ended_at)) * 1000 / count(*) as ms from ("
                "    select ended_at, ntile(10) over (order by ended_at) as tenth from etl.procedure_runs"
                "     where run_id = (select max(run_id) from etl.runs)) t group by tenth) c"
            ).fetchone()
            memory = conn.execute(
                "select array_agg(mb order by tenth) from (select tenth, max(used) / 1048576.0 as mb from ("
                "  select used, ntile(10) over (order by at) as tenth from long.memory) t group by tenth) m"
            ).fetchone()
            assert cost is not None
            assert memory is not None
            tenths = [float(mb) for mb in memory[0]]
            print(
                f"{steps} steps, {sessions} session(s), {seconds:.1f} s; ms per step by tenth: "
                + ", ".join(f"{ms:.2f}" for ms in cost[0])
                + "; MB in use by tenth: " + ", ".join(f"{mb:.1f}" for mb in tenths),
                flush=True,
            )  # fmt: skip
            is_flat &= tenths[-1] < tenths[0] + 2
    return is_flat


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--major", type=int, help="which embedded Postgres")
    parser.add_argument("--bindir", type=Path, help="the programs of another Postgres")
    parser.add_argument("--dsn")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        dsn = arguments.dsn
        if dsn is None:
            server = EmbeddedServer(major=arguments.major, bindir=arguments.bindir, durable=True)
            dsn = stack.enter_context(server).dsn
        migrate(dsn)
        with psycopg.connect(dsn) as conn:
            print(f"PostgreSQL {conn.info.parameter_status('server_version')}", flush=True)
        parts = {
            "pairs": lambda: pairs(dsn, arguments.pairs),
            "skewed": lambda: skewed(dsn, arguments.pairs),
            "dag": lambda: dag(dsn, arguments.pairs),
            "long": lambda: long(dsn, arguments.steps),
        }
        outcomes = [parts[name]() for name in arguments.part or PARTS]
        return int(not all(outcomes))


if __name__ == "__main__":
    sys.exit(main())
