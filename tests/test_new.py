"""`b2s new` and `b2s init`: what they write is clean for lint, keeps its contract on a server, and does its work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from b2s.config import load_config
from b2s.names import KEYWORDS, quoted
from b2s.scaffold.entry import with_entry
from b2s.scaffold.source import described
from tests.servers import Connection, Database
from tests.shell import Shell

PATTERNS: Final = ("upsert", "append", "scd2", "snapshot", "delete_insert")
STRATEGIES: Final = ("timestamp", "id", "xid", "none")
SENSIBLE: Final = [
    (pattern, strategy)
    for pattern in PATTERNS
    for strategy in STRATEGIES
    if pattern != "snapshot" or strategy == "none"
]
BRONZE: Final = """
create schema bronze; create schema silver;
create table bronze.orders (
  row_id bigint generated always as identity (cache 1) primary key, order_id text, line int, customer text, amount numeric(12, 2),
  payload json, "Odd Name" text, ingested_at timestamptz not null, etl_xid xid8 not null default pg_current_xact_id());
insert into bronze.orders (order_id, line, customer, amount, payload, "Odd Name", ingested_at)
select 'o' || i % 7, i % 3, 'c' || i % 5, (i * 7) % 11, json_build_object('n', i % 2), case when i % 4 > 0 then 'x' end,
       now() - interval '1 day' + i * interval '10 minutes'
  from generate_series(1, 60) i;
insert into bronze.orders (order_id, line, customer, amount, ingested_at)
values (null, 1, 'nobody', 1, now() - interval '2 hours'), ('o1', 2, null, null, now() - interval '3 hours'), ('o1', 2, null, null, now() - interval '3 hours');
"""
KEYS: Final = {
    "upsert": "order_id", "append": "row_id", "scd2": "order_id,line", "snapshot": "", "delete_insert": "order_id",
}  # fmt: skip


@pytest.fixture
def bronze(db: Database) -> Connection:
    """A table in Bronze that every strategy can read."""
    connection = db.connect()
    connection.execute(BRONZE.encode())
    return connection


def new(shell: Shell, pattern: str, strategy: str, *more: str, code: int = 0) -> str:
    key = ["--key", KEYS[pattern]] if KEYS[pattern] else []
    return shell("new", "silver.orders", "--pattern", pattern, "--strategy", strategy, *key, *more, code=code)


def first_run(bronze: Connection, shell: Shell, strategy: str) -> None:
    """A run of an hour ago, so that rows of a minute ago are new."""
    row = bronze.execute("select (now() - interval '1 hour')::text").fetchone()
    shell("run", *(["--as-of", row[0]] if strategy == "timestamp" and row else []))


# -- what is written is right --


@pytest.mark.parametrize(("pattern", "strategy"), SENSIBLE)
def test_lint_finds_nothing_and_the_contract_is_kept(
    bronze: Connection, shell: Shell, pattern: str, strategy: str
) -> None:
    pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")
    new(shell, pattern, strategy, "--apply")
    assert shell("lint", "sql").startswith("nothing found in 1 routine")
    assert shell("lint", "--db").endswith("nothing found in 1 routine of 1 source\n")
    assert shell("sync-config").endswith("applied as version 1\n")
    findings = json.loads(shell("test", "silver.orders", "--json"))
    (tested,) = findings if isinstance(findings, list) else [findings]
    assert len(_checks(tested)) > 3
    bad = [one for one in _checks(tested) if one["status"] not in ("ok", "skipped")]
    assert bad == []
    assert "1 succeeded" in shell("run")
    assert shell("lineage", "--check") == "what is declared is what was found\n"


def _checks(document: Any) -> list[dict[str, Any]]:
    """The checks of a test, wherever its document has them."""
    if isinstance(document, dict):
        if "status" in document and ("check_name" in document or "check" in document):
            return [document]
        return [one for value in document.values() for one in _checks(value)]
    return [one for value in document for one in _checks(value)] if isinstance(document, list) else []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_upsert_holds_the_newest_row_of_each_key(bronze: Connection, shell: Shell, strategy: str) -> None:
    new(shell, "upsert", strategy, "--apply")
    shell("sync-config")
    first_run(bronze, shell, strategy)
    bronze.execute(
        "insert into bronze.orders (order_id, customer, ingested_at) values ('o1', 'newest', now() - interval '1 minute'), ('o99', 'new', now() - interval '1 minute')"
    )
    shell("run")
    found = dict(bronze.execute("select order_id, customer from silver.orders").fetchall())
    assert len(found) == 8
    assert found["o99"] == "new"
    if strategy != "none":
        assert found["o1"] == "newest"


@pytest.mark.parametrize("strategy", ["timestamp", "id", "xid"])
def test_an_old_range_read_again_puts_no_older_row_back(
    bronze: Connection, shell: Shell, strategy: str
) -> None:
    new(shell, "upsert", strategy, "--apply")
    shell("sync-config")
    shell("run")
    before = bronze.execute("select t::text from silver.orders t order by 1").fetchall()
    until = {"timestamp": "now", "id": "30", "xid": None}[strategy]
    if until == "now":
        row = bronze.execute(
            "select (min(ingested_at) + interval '3 hours')::text from bronze.orders"
        ).fetchone()
        until = row[0] if row else ""
    if until:
        chunk = "1h" if strategy == "timestamp" else "7"
        shell("backfill", "silver.orders", "--until", until, "--chunk", chunk, "--reason", "test")
        assert bronze.execute("select t::text from silver.orders t order by 1").fetchall() == before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_history_has_a_version_for_each_change_and_one_that_is_current(
    bronze: Connection, shell: Shell, strategy: str
) -> None:
    bronze.execute("truncate bronze.orders")
    insert = "insert into bronze.orders (order_id, line, customer, ingested_at) values ('a', 1, %s, now() - %s::interval)"
    columns = {"timestamp": ", ingested_at timestamptz", "id": ", ingested_at timestamptz, row_id bigint",
               "xid": ", ingested_at timestamptz, etl_xid xid8", "none": ""}[strategy]  # fmt: skip
    shell("new", "silver.orders", "--pattern", "scd2", "--strategy", strategy, "--key", "order_id",
        *(["--watermark", "row_id"] if strategy == "id" else []),
        "--columns", f"order_id text, customer text{columns}", "--apply")  # fmt: skip
    shell("sync-config")
    for customer, age in (("x", "9 hours"), ("x", "8 hours"), ("y", "7 hours")):
        if strategy == "none":
            bronze.execute("truncate bronze.orders")
        bronze.execute(insert, [customer, age])
        if strategy == "none":
            shell("run")
    if strategy != "none":
        first_run(bronze, shell, strategy)
        bronze.execute(insert, ["x", "7 hours 30 minutes"])
        bronze.execute(insert, ["z", "1 minute"])
        shell("run")
    versions = bronze.execute(
        "select customer, is_current, valid_to is null, lead(valid_from) over w is not distinct from valid_to from silver.orders"
        " window w as (partition by order_id order by valid_from) order by valid_from"
    ).fetchall()
    expected = ["x", "y"] if strategy == "none" else ["x", "y", "z"]
    assert [row[0] for row in versions][: len(expected)] == expected
    assert [row[1] for row in versions] == [False] * (len(versions) - 1) + [True]
    assert all(is_open == is_current and is_seamless for _, is_current, is_open, is_seamless in versions)


def test_a_key_that_is_gone_from_the_source_is_closed(bronze: Connection, shell: Shell) -> None:
    new(shell, "scd2", "none", "--apply")
    shell("sync-config")
    shell("run")
    bronze.execute("delete from bronze.orders where order_id = 'o1'")
    shell("run")
    rows = bronze.execute("select distinct is_current from silver.orders where order_id = 'o1'").fetchall()
    assert rows == [(False,)]


def test_all_lines_of_a_key_that_changed_are_replaced(bronze: Connection, shell: Shell) -> None:
    new(shell, "delete_insert", "timestamp", "--apply")
    shell("sync-config")
    first_run(bronze, shell, "timestamp")
    bronze.execute("delete from bronze.orders where order_id = 'o2' and line = 0")
    bronze.execute(
        "insert into bronze.orders (order_id, line, ingested_at) values ('o2', 9, now() - interval '1 minute')"
    )
    shell("run")
    silver = "select order_id, line, count(*) from silver.orders group by 1, 2 order by 1, 2"
    assert (
        bronze.execute(silver).fetchall()
        == bronze.execute(
            silver.replace("silver.orders", "bronze.orders where order_id is not null").replace(
                "group by", "group by"
            )
        ).fetchall()
    )


def test_a_snapshot_is_kept_for_each_day(bronze: Connection, shell: Shell) -> None:
    new(shell, "snapshot", "none", "--apply")
    shell("sync-config")
    shell("run", "--param", "silver.orders.snapshot_on=2026-01-01")
    shell("run", "--param", "silver.orders.snapshot_on=2026-01-01")
    bronze.execute("delete from bronze.orders where order_id = 'o1'")
    shell("run")
    days = bronze.execute(
        "select count(*) from silver.orders group by snapshot_on order by snapshot_on"
    ).fetchall()
    row = bronze.execute("select count(*) from bronze.orders").fetchone()
    assert days[0] == (63,)
    assert days[1] == row


# -- what is found out --


def test_the_source_says_what_was_not_given(bronze: Connection, shell: Shell) -> None:
    out = shell("new", "silver.orders", "--pattern", "append", "--stdout")
    assert "p_since pg_snapshot, p_until pg_snapshot" in out, "xid before timestamp"
    assert "on conflict (row_id) do nothing" in out, "the key of the source"
    assert "etl.arrived(s.etl_xid, p_since, p_until)" in out
    assert "watermark: {strategy: xid, source: bronze.orders.etl_xid}" in out
    out = shell(
        "new",
        "silver.orders",
        "--pattern",
        "upsert",
        "--key",
        "order_id",
        "--watermark",
        "row_id",
        "--stdout",
    )
    assert "p_since bigint, p_until bigint" in out
    assert not Path("sql").exists()


def test_a_target_that_is_there_is_filled_as_it_is(bronze: Connection, shell: Shell) -> None:
    bronze.execute("create table silver.orders (customer text, order_id text unique, extra int)")
    out = shell("new", "silver.orders", "--pattern", "upsert", "--strategy", "timestamp", "--stdout")
    assert "create table" not in out
    assert "insert into silver.orders as t (order_id, customer)" in out


def test_a_source_that_a_procedure_fills_is_a_dependency(bronze: Connection, shell: Shell) -> None:
    new(shell, "upsert", "timestamp", "--apply")
    shell(
        "new",
        "silver.totals",
        "--pattern",
        "upsert",
        "--source",
        "silver.orders",
        "--strategy",
        "none",
        "--apply",
    )
    procedures = {one.name: one for one in load_config(Path("transformations.yaml"), {}).config.procedures}
    assert procedures["silver.totals"].dependencies == ("silver.orders",)
    shell("sync-config")
    assert "2 succeeded" in shell("run")
    assert shell("lineage", "--check") == "what is declared is what was found\n"


def test_without_a_database_columns_are_described(shell: Shell) -> None:
    out = shell(
        "new", "silver.dim_parts", "--pattern", "upsert", "--columns", 'part_no text, "Weight" numeric(10, 2), loaded_at timestamptz',
        "--key", "part_no", "--stdout", "--dsn", "host=/nowhere",
    )  # fmt: skip
    assert '"Weight" numeric(10, 2)' in out
    assert "  type: dimension" in out
    assert "watermark: {strategy: timestamp, source: bronze.dim_parts.loaded_at}" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["orders", "--pattern", "upsert"], "orders is not schema.name"),
        (["silver.nope", "--pattern", "upsert"], "table bronze.nope does not exist"),
        (["silver.orders", "--pattern", "snapshot", "--strategy", "timestamp"], "a snapshot copies all of bronze.orders"),
        (["silver.orders", "--pattern", "upsert", "--key", "nope"], "column nope of the key is not in bronze.orders"),
        (["silver.orders", "--pattern", "upsert", "--watermark", "customer"], "bronze.orders.customer cannot tell new rows"),
        (["silver.orders", "--pattern", "upsert", "--strategy", "id", "--watermark", "customer"], "is of type text, which the id strategy cannot read"),
        (["silver.orders", "--pattern", "upsert", "--strategy", "timestamp", "--watermark", "nope"], "bronze.orders has no column nope"),
        (["silver.orders", "--pattern", "scd2", "--key", "order_id", "--valid-from", "customer"], "bronze.orders.customer is no timestamp"),
        (["silver.x", "--pattern", "upsert", "--columns", "a"], "--columns cannot be understood from 'a' on"),
        (["silver.x", "--pattern", "upsert", "--columns", "a int, a int"], "--columns names a twice"),
        (["silver.x", "--pattern", "upsert", "--columns", "a int"], "nothing says which columns tell the rows"),
        (["silver.x", "--pattern", "scd2", "--columns", "a int, t timestamptz", "--key", "a"], "a history needs columns outside the key"),
        (["silver.orders", "--pattern", "upsert", "--source", "orders"], "orders is not schema.table"),
        (["silver.taken", "--pattern", "upsert", "--source", "bronze.orders", "--key", "order_id"], "silver.taken has no unique index on (order_id)"),
        (["silver.taken", "--pattern", "scd2", "--source", "bronze.orders", "--key", "order_id"], "has no column valid_from"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(
    bronze: Connection, shell: Shell, words: list[str], message: str
) -> None:
    bronze.execute("create table silver.taken (order_id text, customer text)")
    assert message in shell("new", *words, code=2)
    assert not Path("transformations.yaml").exists()
    assert not Path("sql").exists()


# -- the entry --


def test_nothing_is_overwritten(bronze: Connection, shell: Shell) -> None:
    new(shell, "upsert", "timestamp")
    before = Path("transformations.yaml").read_text(encoding="utf-8")
    assert "sql/silver.orders.sql is there already" in new(shell, "append", "id", code=2)
    Path("sql/silver.orders.sql").unlink()
    assert "was left as it is" in new(shell, "append", "id", code=2)
    assert Path("transformations.yaml").read_text(encoding="utf-8") == before
    assert not Path("sql/silver.orders.sql").exists()


ENTRY: Final = ["- name: silver.b", "  type: fact"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nprocedures:\n  - {name: silver.a, type: fact}\n",
         "version: 1\nprocedures:\n  - {name: silver.a, type: fact}\n  - name: silver.b\n    type: fact\n"),
        ("procedures: []\nversion: 1\n", "procedures:\n  - name: silver.b\n    type: fact\n\nversion: 1\n"),
        ("procedures:   # all of them\n- name: silver.a\n  type: fact\n\n# when\nschedules: []\n",
         "procedures: # all of them\n- name: silver.a\n  type: fact\n- name: silver.b\n  type: fact\n\n# when\nschedules: []\n"),
        ("version: 1\nprocedures: [{name: silver.a, type: fact}]\n", None),
    ],
)  # fmt: skip
def test_an_entry_is_added_to_the_text_and_everything_else_stays(text: str, expected: str | None) -> None:
    assert with_entry(text, ENTRY) == expected


def test_a_list_in_one_line_is_left_alone_and_the_entry_shown(bronze: Connection, shell: Shell) -> None:
    Path("transformations.yaml").write_text(
        "version: 1\nprocedures: [{name: silver.a, type: fact}]\n", encoding="utf-8"
    )
    out = new(shell, "upsert", "timestamp", code=2)
    assert (
        "transformations.yaml was left as it is: its list of procedures is not written one below the other"
        in out
    )
    assert "--stdout prints" in out
    assert "- name: silver.orders" in new(shell, "upsert", "timestamp", "--stdout")
    assert not Path("sql").exists()


def test_a_broken_configuration_is_reported_before_anything_is_written(
    bronze: Connection, shell: Shell
) -> None:
    Path("transformations.yaml").write_text(
        "version: 1\nprocedures:\n  - {name: silver.a, typ: fact}\n", encoding="utf-8"
    )
    assert "unknown key 'typ'" in new(shell, "upsert", "timestamp", code=2)
    assert not Path("sql").exists()


# -- names and columns --


def test_the_words_that_need_quotes_are_those_of_the_grammar() -> None:
    keywords = pytest.importorskip("pglast.keywords")
    expected = keywords.RESERVED_KEYWORDS | keywords.COL_NAME_KEYWORDS | keywords.TYPE_FUNC_NAME_KEYWORDS
    assert expected == KEYWORDS


@pytest.mark.parametrize(
    "name", ["orders", "Order", "order", "a b", 'a"b', "a.b", "9a", "select", "é", "_x1"]
)
def test_names_are_quoted_as_the_server_quotes_them(db: Database, name: str) -> None:
    assert db.connect().execute("select quote_ident(%s)", [name]).fetchone() == (quoted(name),)


def test_columns_are_described_with_types_of_any_form() -> None:
    table = described("t", 'a int, b numeric(10, 2), "C d" timestamp with time zone,e text[]')
    assert [(one.name, one.type) for one in table.columns] == [
        ("a", "int"), ("b", "numeric(10, 2)"), ("C d", "timestamp with time zone"), ("e", "text[]"),
    ]  # fmt: skip


# -- init --


def test_a_new_project_runs(db: Database, shell: Shell) -> None:
    out = shell("init", "shop")
    assert "written: shop/transformations.yaml" in out
    with db.connect() as connection:
        for name in ("bronze.sql", "silver.dim_customers.sql"):
            connection.execute((Path("shop/sql") / name).read_bytes())
            connection.execute((Path("shop/sql") / name).read_bytes())
    config = ("--config", "shop/transformations.yaml")
    assert shell("sync-config", *config).endswith("applied as version 1\n")
    assert "no check failed" in shell("test", "silver.dim_customers", *config)
    assert "1 succeeded" in shell("run")
    row = db.connect().execute("select count(*) from silver.dim_customers").fetchone()
    assert row == (3,)
    schema = json.loads(Path("shop/transformations.schema.json").read_text(encoding="utf-8"))
    assert schema["title"] == "b2s transformations"


def test_a_new_project_is_clean_for_lint(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")
    shell("init", "shop")
    monkeypatch.chdir("shop")
    assert shell("lint", "sql") == "nothing found in 1 routine of 2 sources\n"


def test_a_project_that_is_there_is_left_alone(shell: Shell) -> None:
    shell("init")
    Path("transformations.yaml").write_text("mine", encoding="utf-8")
    assert "transformations.yaml is there already" in shell("init", code=2)
    assert Path("transformations.yaml").read_text(encoding="utf-8") == "mine"
    assert "is no name for a pipeline" in shell("init", "other", "--pipeline", "No Name", code=2)
