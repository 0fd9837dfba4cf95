"""Five dimensions and five facts, loaded by hand, by b2s and by dbt: the same SQL, the same rows, in turns.

    python -m tests.bench.load [--rows 5000000] [--turns 5] [--dbt [PROGRAM]] [--dsn DSN]

Bronze is text as it arrives, Silver is typed and keyed: each table is one INSERT .. SELECT .. ON CONFLICT DO
UPDATE of what its window holds. By hand: psql, one transaction per table, the window typed in. b2s: the same
statement in a routine per table, window by the timestamp strategy. dbt (--dbt: a program, or none to install
dbt-postgres into a temporary environment): the same SELECT as incremental models, strategies merge and
delete+insert, two threads; its start is a part of what a run takes. All fill schemas of their own from the
same Bronze; a turn adds 1% to it. The ratio to the hand is taken turn by turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from b2s.embedded import EmbeddedServer
from b2s.migrate import migrate
from tests.bench.overhead import procedure, psql, spread

Connection = psycopg.Connection[Any]
DIMENSIONS = [f"dim_{n}" for n in range(1, 6)]
FACTS = [f"fact_{n}" for n in range(1, 6)]
TABLES = [*DIMENSIONS, *FACTS]
COLUMNS = {
    "dim": "id bigint primary key, name text, country text, since date, updated_at timestamptz",
    "fact": "id bigint primary key, dim_id bigint, sold_on date, quantity int, amount numeric(12, 2),"
    " updated_at timestamptz",
}
SELECTS = {
    "dim": "id::bigint as id, initcap(trim(name)) as name, nullif(upper(trim(country)), 'N/A') as country,"
    " to_date(since, 'YYYYMMDD') as since, ingested_at as updated_at",
    "fact": "id::bigint as id, dim_id::bigint as dim_id, to_date(sold_on, 'YYYYMMDD') as sold_on,"
    " greatest(quantity::int, 0) as quantity, round(abs(amount::numeric), 2) as amount,"
    " ingested_at as updated_at",
}
BRONZE = {
    "dim": "(id text, name text, country text, since text,"
    " ingested_at timestamptz default clock_timestamp())",
    "fact": "(id text, dim_id text, sold_on text, quantity text, amount text,"
    " ingested_at timestamptz default clock_timestamp())",
}
ROWS = {
    "dim": "select g, '  customer ' || g, (array['de', 'US ', 'n/a'])[1 + g % 3],"
    " to_char(date '2020-01-01' + g % 1000, 'YYYYMMDD')",
    "fact": "select g, g % 1000, to_char(date '2024-01-01' + g % 500, 'YYYYMMDD'), g % 20 - 1,"
    " ' ' || (g % 10000) / 7.0",
}


def kind(table: str) -> str:
    return table.split("_")[0]


def rows_of(table: str, rows: int) -> int:
    """A tenth of all rows is in dimensions."""
    return rows // 50 if kind(table) == "dim" else rows * 9 // 50


def add(conn: Connection, table: str, first: int, count: int) -> None:
    """New rows, and as many again that replace older ones in one case of ten."""
    names = BRONZE[kind(table)].replace(" text", "").split(", ingested_at")[0] + ")"
    older = max(first - count, 1)
    for begin, end in ((first, first + count * 9 // 10 - 1), (older, older + count // 10 - 1)):
        series = f"generate_series({begin}, {end}) g"
        conn.execute(f"insert into bronze.{table} {names} {ROWS[kind(table)]} from {series}".encode())


def statement(schema: str, table: str, since: str, until: str) -> str:
    columns = [part.split()[0] for part in COLUMNS[kind(table)].replace("(12, 2)", "").split(", ")]
    changes = ", ".join(f"{column} = excluded.{column}" for column in columns[1:])
    return (
        f"insert into {schema}.{table} ({', '.join(columns)})"
        f" select distinct on (id) {SELECTS[kind(table)]} from bronze.{table}"
        f" where ({since} is null or ingested_at >= {since}) and ingested_at < {until}"
        f" order by id, ingested_at desc on conflict (id) do update set {changes}"
    )


def prepare(conn: Connection, rows: int) -> None:
    for schema in ("bronze", "silver", "hand"):
        conn.execute(f"drop schema if exists {schema} cascade".encode())
        conn.execute(f"create schema {schema} authorization etl_owner".encode())
    conn.execute("set role etl_owner")
    for table in TABLES:
        conn.execute(f"create table bronze.{table} {BRONZE[kind(table)]}".encode())
        add(conn, table, 1, rows_of(table, rows))
        conn.execute(f"create index on bronze.{table} (ingested_at)".encode())
        for schema in ("silver", "hand"):
            conn.execute(f"create table {schema}.{table} ({COLUMNS[kind(table)]})".encode())
        conn.execute(
            f"create function silver.load_{table}(p_since timestamptz, p_until timestamptz) returns bigint"
            f" language plpgsql as $$ declare n bigint; begin"
            f" {statement('silver', table, 'p_since', 'p_until')}; get diagnostics n = row_count; return n;"
            f" end $$".encode()
        )
    conn.execute("reset role")
    config = {
        "version": 1, "pipeline": "load", "description": None, "max_concurrency": 2, "search_path": [],
        "groups": [], "schedules": [],
        "procedures": [
            {
                **procedure("fan_out", 0),
                "name": f"silver.{table}", "routine": f"silver.load_{table}", "dependencies": [],
                "type": "dimension" if kind(table) == "dim" else "fact",
                "watermark": {
                    "strategy": "timestamp", "source": [f"bronze.{table}.ingested_at"],
                    "state_key": table, "delay_ms": 0,
                },
            }
            for table in TABLES
        ],
    }  # fmt: skip
    conn.execute("select etl.apply_config(%s)", [json.dumps(config)])
    conn.execute("vacuum analyze")


def settled(conn: Connection) -> str:
    """A moment by which everything was committed a second ago, which is where a window of b2s ends."""
    time.sleep(1.5)
    row = conn.execute("select (clock_timestamp() - interval '1.2 seconds')::text").fetchone()
    assert row is not None
    return str(row[0])


def by_hand(dsn: str, folder: Path, since: str | None, until: str) -> float:
    script = folder / "hand.sql"
    start = f"'{since}'::timestamptz" if since else "null::timestamptz"
    script.write_text(
        "".join(f"{statement('hand', table, start, f'{until!r}::timestamptz')};\n" for table in TABLES),
        encoding="utf-8",
    )
    return psql(dsn, script)


def by_b2s(dsn: str, folder: Path) -> float:
    script = folder / "b2s.sql"
    script.write_text("call etl.start_run(pipeline => 'load');\n", encoding="utf-8")
    return psql(dsn, script)


def dbt_project(folder: Path, dsn: str, strategy: str) -> Path:
    """A project of its own per strategy: the same SELECT, what is new by the newest row there is."""
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    project = folder / f"dbt_{strategy.replace('+', '_')}"
    (project / "models").mkdir(parents=True)
    schema = f"dbt_{strategy.replace('+', '_')}"
    (project / "dbt_project.yml").write_text(
        "name: load\nversion: '1.0'\nprofile: load\nmodel-paths: [models]\n"
        "models: {load: {+materialized: incremental, +unique_key: id,"
        f" +incremental_strategy: {strategy}}}}}\n"
        "flags: {send_anonymous_usage_stats: false}\n",
        encoding="utf-8",
    )
    profile = {
        "type": "postgres", "host": parts["host"], "user": parts["user"], "password": "", "threads": 2,
        "port": int(str(parts.get("port") or 5432)), "dbname": parts["dbname"], "schema": schema,
    }  # fmt: skip
    (project / "profiles.yml").write_text(
        json.dumps({"load": {"target": "dev", "outputs": {"dev": profile}}}), encoding="utf-8"
    )
    for table in TABLES:
        (project / "models" / f"{table}.sql").write_text(
            f"select distinct on (id) {SELECTS[kind(table)]} from bronze.{table}"
            " {% if is_incremental() %} where ingested_at > (select max(updated_at) from {{ this }})"
            " {% endif %} order by id, ingested_at desc",
            encoding="utf-8",
        )
    return project


def dbt_of(given: str | None, folder: Path) -> str:
    if given:
        return given
    venv.create(folder / "venv", with_pip=True)
    program = folder / "venv" / "bin"
    # The last of dbt that comes from the package index alone.
    dbt = ["dbt-core<1.11", "dbt-postgres<1.10"]
    install = [str(program / "python"), "-m", "pip", "install", "--quiet", *dbt]
    subprocess.run(install, check=True)
    return str(program / "dbt")


def by_dbt(program: str, project: Path) -> float:
    began = time.perf_counter()
    command = [program, "run", "--quiet", "--project-dir", str(project), "--profiles-dir", str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - began


def same(conn: Connection) -> bool:
    query = "select count(*) from (select * from silver.{0} except select * from hand.{0}) d"
    return all(conn.execute(query.format(table).encode()).fetchone() == (0,) for table in TABLES)


def measure(dsn: str, rows: int, turns: int, dbt: str | None, folder: Path) -> bool:
    with psycopg.connect(dsn, autocommit=True) as conn:
        prepare(conn, rows)
        others: dict[str, Callable[[], float]] = {"b2s": partial(by_b2s, dsn, folder)}
        if dbt is not None:
            for strategy in ("merge", "delete+insert"):
                project = dbt_project(folder, dsn, strategy)
                others[f"dbt {strategy}"] = partial(by_dbt, dbt, project)
        until = settled(conn)
        first = by_hand(dsn, folder, None, until)
        print(f"{rows:,} rows in Bronze; the first load, by hand {first:.1f} s", flush=True)
        print(", ".join(f"{name} {work() / first:.2f}" for name, work in others.items()), flush=True)
        conn.execute("vacuum analyze")
        ratios: dict[str, list[float]] = {name: [] for name in others}
        seconds, since, next_id = [], until, {table: rows_of(table, rows) + 1 for table in TABLES}
        for turn in range(turns + 1):
            for table in TABLES:
                count = rows_of(table, rows) // 100
                add(conn, table, next_id[table], count)
                next_id[table] += count
            until = settled(conn)
            conn.execute("checkpoint")
            hand = by_hand(dsn, folder, since, until)
            since = until
            took = {name: work() for name, work in others.items()}
            if turn:
                seconds.append(hand)
                for name, value in took.items():
                    ratios[name].append(value / hand)
        print(f"increments of 1%, by hand {statistics.median(seconds):.2f} s", flush=True)
        for name, values in ratios.items():
            print(f"  {name} / by hand {spread(values)}", flush=True)
        is_same = same(conn)
        print("silver equals what was loaded by hand" if is_same else "SILVER DIFFERS", flush=True)
        return is_same


def main(words: Sequence[str] | None = None) -> int:
    """Prints the ratios; exits with 1 when the rows differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000_000])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dbt", nargs="?", const="")
    parser.add_argument("--dsn")
    arguments = parser.parse_args(words)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dsn = arguments.dsn or stack.enter_context(EmbeddedServer(durable=True)).dsn
        migrate(dsn)
        dbt = None if arguments.dbt is None else dbt_of(arguments.dbt, folder)
        outcomes = []
        for rows in arguments.rows:
            inner = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            outcomes.append(measure(dsn, rows, arguments.turns, dbt, inner))
        return int(not all(outcomes))


if __name__ == "__main__":
    sys.exit(main())
