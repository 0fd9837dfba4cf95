"""`b2s lineage` as a person meets it: what it lists, checks and scans; what sync-config notes by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from psycopg.conninfo import make_conninfo

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.lint import parser
from tests.pipelines import Pipeline
from tests.servers import Database
from tests.shell import Result, Shell

SQL: Final = """
create table bronze.orders (id bigint, amount numeric);
create table silver.orders (id bigint primary key, amount numeric);
create table silver.totals (id bigint primary key, amount numeric);
insert into bronze.orders values (1, 10);
create function silver.load_orders() returns bigint language sql as $$
  with new as (insert into silver.orders (id, amount) select b.id, b.amount from bronze.orders b
               on conflict (id) do update set amount = excluded.amount returning 1) select count(*) from new $$;
create function silver.load_totals() returns bigint language plpgsql as $$ begin
  insert into silver.totals select id, sum(amount) from silver.orders group by id on conflict (id) do update set amount = excluded.amount;
  return 1; end $$;
"""
CONFIG: Final = """\
version: 1
procedures:
  - {name: silver.orders, routine: silver.load_orders, type: fact}
  - {name: silver.totals, routine: silver.load_totals, type: fact}
"""


Cli = Callable[..., Result]


@pytest.fixture
def cli(db: Database, shell: Shell) -> Iterator[Cli]:
    """`b2s` in a folder with a configuration that is not applied yet."""
    Path("transformations.yaml").write_text(CONFIG, encoding="utf-8")
    with Pipeline(db) as pipeline:
        pipeline.sql(SQL)
        yield shell.result


def edges(cli: Cli, *words: str) -> list[tuple[Any, ...]]:
    document = json.loads(cli("lineage", "--json", *words).out)
    return [(one["name"], one["access"], one["relation"], one["sources"]) for one in document]


def test_sync_config_notes_what_the_sql_says(cli: Cli) -> None:
    assert cli("sync-config").code == 0
    assert edges(cli) == [
        ("silver.orders", "read", "bronze.orders", ["static"]),
        ("silver.orders", "write", "silver.orders", ["static"]),
        ("silver.totals", "read", "silver.orders", ["static"]),
        ("silver.totals", "write", "silver.totals", ["static"]),
    ]
    cli("run")
    assert {sources for *_, sources in [(*one[:3], tuple(one[3])) for one in edges(cli)]} == {
        ("observed", "static")
    }


def test_sync_config_needs_no_right_on_the_schemas_of_the_team(cli: Cli, db: Database) -> None:
    with Pipeline(db) as pipeline:
        admin = pipeline.login("etl_admin")
        own = make_conninfo(db.dsn, user=admin.info.user, password=admin.info.password)
        done = cli("sync-config", "--dsn", own)
        assert (done.code, done.err) == (0, "")
    assert len(edges(cli)) == 4


def test_without_the_parser_sync_config_works_and_observation_goes_on(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "is_installed", lambda: False)
    assert cli("sync-config").code == 0
    assert cli("lineage").err.startswith("nothing is known yet")
    cli("run")
    assert edges(cli, "silver.totals") == [
        ("silver.totals", "read", "silver.orders", ["observed"]),
        ("silver.totals", "write", "silver.totals", ["observed"]),
    ]


def test_the_list_can_be_narrowed_and_shows_columns(cli: Cli) -> None:
    cli("sync-config")
    assert [one[0] for one in edges(cli, "bronze.orders")] == ["silver.orders"]
    lines = cli("lineage", "silver.orders", "--columns").out.splitlines()
    assert lines[0].split("  ")[0] == "name"
    assert any("amount <- bronze.orders.amount, id <- bronze.orders.id" in line for line in lines)


def test_check_ends_with_1_and_says_what_to_do(cli: Cli) -> None:
    cli("sync-config")
    result = cli("lineage", "--check")
    assert result.code == 1
    assert result.out.splitlines() == [
        "error[undeclared_read]: silver.totals reads silver.orders, which silver.orders writes, and does not depend on it (static)",
        "  hint: add to silver.totals: dependencies: [silver.orders]",
    ]
    assert result.err == "1 finding\n"
    document = json.loads(cli("lineage", "--check", "--json").out)
    assert (document["is_clean"], len(document["findings"])) == (False, 1)


def test_check_is_clean_once_it_is_declared_or_left_out(cli: Cli) -> None:
    cli("sync-config")
    assert cli("lineage", "--check", "--ignore", "undeclared_read").code == 0
    assert cli("lineage", "--check", "--ignore", "undeclared_read=silver.orders").code == 0
    assert cli("lineage", "--check", "--ignore", "undeclared_read=silver.other").code == 1
    Path("transformations.yaml").write_text(
        CONFIG.replace(
            "silver.load_totals, type: fact", "silver.load_totals, type: fact, dependencies: [silver.orders]"
        ),
        encoding="utf-8",
    )
    cli("sync-config")
    assert cli("lineage", "--check").err == "what is declared is what was found\n"


def test_check_says_of_whom_nothing_is_known(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "is_installed", lambda: False)
    cli("sync-config")
    assert "nothing is known of 2 procedures" in cli("lineage", "--check").err


def test_a_scan_follows_functions_that_changed_behind_the_routine(cli: Cli, db: Database) -> None:
    cli("sync-config")
    with db.connect() as connection:
        connection.execute("create function silver.rate() returns int language sql as 'select 1'")
        connection.execute(
            "create or replace function silver.load_totals() returns bigint language sql as 'select silver.rate()'"
        )
    cli("sync-config")
    assert edges(cli, "silver.totals") == []
    with db.connect() as connection:
        connection.execute(
            "create or replace function silver.rate() returns int language sql as 'select count(*)::int from bronze.orders'"
        )
    cli("sync-config")
    assert edges(cli, "silver.totals") == [], "the routine itself is the same"
    result = cli("lineage", "--scan")
    assert result.out == "bronze_to_silver: 3 edges of 2 procedures\n"
    assert edges(cli, "silver.totals") == [("silver.totals", "read", "bronze.orders", ["static"])]


def test_a_scan_names_what_it_cannot_know(cli: Cli, db: Database) -> None:
    cli("sync-config")
    with db.connect() as connection:
        connection.execute(
            "create or replace function silver.load_totals() returns bigint language plpgsql as"
            " $$ begin execute current_setting('x.y'); return 1; end $$"
        )
    out = cli("lineage", "--scan").out
    assert "text known at run time only, a run shows the rest: silver.totals" in out
    document = json.loads(cli("lineage", "--scan", "--json").out)
    assert document[0]["incomplete"] == ["silver.totals"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--scan", "--pipeline", "nope"], 2, "there is no pipeline nope"),
        (["--check", "--scan"], 2, "not allowed with"),
        (["--cursor", "x"], 2, "--cursor says which runs to send"),
    ],
)
def test_what_cannot_be_meant(cli: Cli, words: list[str], code: int, message: str) -> None:
    cli("sync-config")
    result = cli("lineage", *words)
    assert (result.code, message in result.err) == (code, True), result.err
