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

CALLS: Final = """
do $$
declare
  v_begin timestamptz;
  v_best  numeric[] := array_fill(null::numeric, array[2]);
begin
  perform from bench.target where k = 1;
  for i in 1 .. 20 loop
    v_begin := clock_timestamp();
    for j in 1 .. 200 loop perform count(*) from pg_locks; end loop;
    v_best[1] := least(v_best[1], extract(epoch from clock_timestamp() - v_begin));
    v_begin := clock_timestamp();
    for j in 1 .. 200 loop perform etl._observed_relations(null, '{}'); end loop;
    v_best[2] := least(v_best[2], extract(epoch from clock_timestamp() - v_begin));
  end loop;
  perform set_config('bench.best', array_to_string(v_best, ','), false);
end $$"""
"""The quickest of twenty times two hundred scans of pg_locks, and looks at what a step locked."""
POLICIES: Final = ("never", "daily", "always")
FORGET: Final = "delete from etl.lineage_scans where source = 'observed'"


def run(connection: psycopg.Connection[Any], pipeline: str, policy: str) -> float:
    """Seconds of one run under a policy."""
    connection.execute("update etl.pipelines set observe_lineage = %s where name = %s", [policy, pipeline])
    begin = time.perf_counter()
    connection.execute("call etl.start_run(pipeline => %s)", [pipeline])
    return time.perf_counter() - begin


def look(connection: psycopg.Connection[Any]) -> tuple[float, float]:
    """Microseconds of a scan of pg_locks, and of a look at what a step locked."""
    connection.execute(CALLS)
    row = connection.execute("select current_setting('bench.best')").fetchone()
    scan, observed = (float(one) * 1e6 / 200 for one in (row[0] if row else "0,0").split(","))
    return scan, observed


def main() -> None:
    """Prints the ratio of each policy to looking never, and that of one look to a scan of pg_locks."""
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
            scan, observed = look(connection)
    print(f"one look: {observed / scan:.2f} x a scan of pg_locks; {observed:.0f} and {scan:.0f} us")
    per_step = 1000 / arguments.steps
    for name, seconds in took.items():
        ratios = [one / floor for one, floor in zip(seconds, took["never"], strict=True)]
        print(f"{name:7} {spread(ratios)} x never; {spread([one * per_step for one in seconds])} ms per step")


if __name__ == "__main__":
    main()
