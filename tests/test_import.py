"""`b2s import`: what it makes of hand-written routines passes sync-config and does what they did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s import demo
from b2s.config import load_config
from b2s.configmodel import Config, Procedure
from b2s.demo.generate import generate
from b2s.importer.infer import _cycles
from tests import test_crm_erp as export
from tests.servers import Connection, Database, Server
from tests.shell import Shell

CORPUS: Final = Path(__file__).resolve().parent / "import_corpus"
WAREHOUSE: Final = (CORPUS / "warehouse.sql").read_text(encoding="utf-8")
MONOLITH: Final = (CORPUS / "monolith.sql").read_text(encoding="utf-8")
SCHEMAS: Final = ("--schema", "silver,mart", "--schema", "Stage Area")
ROWS: Final = """
insert into bronze.crm_customers (cust_id, cust_name, country) values ('C1', ' ada ', 'de'), ('C2', 'GRACE', 'us'), ('C2', 'grace h', 'us'), ('x', 'nobody', 'de');
insert into bronze.crm_regions values ('de', 'Germany'), ('us', 'United States');
insert into bronze.erp_families values ('f1', 'Frames'), ('f2', 'Forks');
insert into bronze.erp_products (sku, title, price, family) values ('p1', 'Frame', '10,5', 'f1'), ('p2', 'Fork', '40', 'f2'), ('p3', 'Odd', 'n/a', 'f2');
insert into bronze.shop_orders (cust_id, sku, qty, status, ordered_on) values
  ('C1', 'p1', '2', 'ok', '20260101'), ('C2', 'p2', '3', 'ok', '20260101'), ('C2', 'p1', 'two', 'ok', '20260102'), ('C1', 'p2', '1', 'ok', '20260103');
insert into bronze.shop_returns (order_no, qty) values (1, 1), (1, 1);
insert into bronze.fx_rates values ('2026-01-01', 'EUR', 1.1), ('2026-01-02', 'EUR', 1.2);
insert into bronze.clicks values (1, 'C1', now() - interval '1 day'), (2, 'C1', now() - interval '1 day');
insert into bronze."Legacy Stores" values ('7', ' Bern ');
update bronze.erp_products set loaded_at = now() - interval '1 hour';
"""
TABLES: Final = (
    "silver.regions", "silver.dim_customers", "silver.families", "silver.products", "silver.orders", "silver.returns",
    "silver.fx", "silver.customer_value", "silver.segments", "silver.fact_daily_sales", 'silver."Stores"',
    '"Stage Area"."Raw Copy"', "silver.alerts", "mart.top_customers", "mart.kpis", "mart.kpi_notes", "silver.stg_prices",
)  # fmt: skip


@pytest.fixture
def warehouse(db: Database) -> Connection:
    """The warehouse with rows in Bronze."""
    connection = db.connect()
    connection.execute(WAREHOUSE.encode())
    connection.execute(ROWS.encode())
    return connection


def config() -> Config:
    return load_config(Path("transformations.yaml"), {}).config


def procedures() -> dict[str, Procedure]:
    return {one.name: one for one in config().procedures}


def report() -> str:
    return Path("import-report.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", report(), flags=re.MULTILINE | re.DOTALL)


def contents(connection: Connection, tables: tuple[str, ...]) -> dict[str, list[str]]:
    """The rows of tables, in an order of their own."""
    return {
        table: sorted(row[0] for row in connection.execute(f"select t::text from {table} t".encode()))
        for table in tables
    }


# -- a warehouse as it grew --


def test_the_warehouse_has_thirty_routines() -> None:
    assert len(re.findall(r"^create (?:function|procedure)", WAREHOUSE, flags=re.MULTILINE)) >= 30


def test_what_is_imported_runs_as_it_is_and_does_what_was_done_by_hand(
    warehouse: Connection, server: Server, template: str, shell: Shell
) -> None:
    shell("import", *SCHEMAS)
    warehouse.execute(blocks("sql")[0].encode())
    assert shell("sync-config").endswith("applied as version 1\n")
    by_hand = server.create_database(template=template)
    try:
        hand = by_hand.connect()
        hand.execute(WAREHOUSE.encode())
        hand.execute(ROWS.encode())
        for _ in range(2):
            assert "succeeded" in shell("run")
            hand.execute("call silver.load_everything()")
            assert contents(warehouse, TABLES) == contents(hand, TABLES)
    finally:
        by_hand.drop()
    assert shell("doctor").count("fail") == 0
    views = warehouse.execute("select count(*) from mart.mv_sales").fetchone()
    assert views == (2,)
    sessions = warehouse.execute("select clicks from silver.sessions").fetchall()
    assert sessions == [(2,)]


def test_a_second_run_is_clean_of_undeclared_reads(warehouse: Connection, shell: Shell) -> None:
    """What was inferred from the SQL is what the locks show, but for the circles, which are said."""
    shell("import", *SCHEMAS)
    warehouse.execute(blocks("sql")[0].encode())
    shell("sync-config")
    shell("run")
    found = json.loads(shell("lineage", "--check", "--json", code=1))["findings"]
    assert {(one["finding"], one["name"]) for one in found if one["severity"] == "error"} == {
        ("undeclared_read", "silver.regions"), ("undeclared_read", "silver.customer_value"),
    }  # fmt: skip


def test_dependencies_types_and_targets(warehouse: Connection, shell: Shell) -> None:
    shell("import", *SCHEMAS)
    found = procedures()
    needs = {name: sorted(one.dependencies) for name, one in found.items() if one.dependencies}
    assert needs == {
        "silver.dim_customers": ["silver.regions"],
        "silver.products": ["silver.families"],
        "silver.orders": ["silver.dim_customers", "silver.products"],
        "silver.customer_value": ["silver.orders"],
        "silver.segments": ["silver.customer_value"],
        "silver.fact_daily_sales": ["silver.orders"],
        "silver.order_flags": ["silver.orders", "silver.returns"],
        "silver.alerts": ["silver.orders"],
        "stage_area.raw_copy": ["silver.products"],
        "mart.load_kpis": ["silver.orders"],
        "mart.kpis": ["mart.load_kpis", "silver.dim_customers"],
        "mart.top_customers": ["silver.customer_value"],
    }
    facts = {name for name, one in found.items() if one.type == "fact"}
    assert facts == {
        "silver.orders", "silver.customer_value", "silver.segments", "silver.fact_daily_sales", "silver.order_flags",
        "silver.alerts", "stage_area.raw_copy", "mart.load_kpis", "mart.kpis", "mart.top_customers",
    }  # fmt: skip
    refreshed = {
        name: [view.name for view in one.mv_refresh] for name, one in found.items() if one.mv_refresh
    }
    assert refreshed == {
        "silver.fact_daily_sales": ["mart.mv_sales", "mart.mv_share"],
        "silver.orders": ['mart."MV Customers"'],
        "silver.dim_customers": ['mart."MV Customers"'],
    }


def test_circles_are_groups_in_the_order_of_today(warehouse: Connection, shell: Shell) -> None:
    shell("import", *SCHEMAS)
    members: dict[str, list[str]] = {}
    for one in config().procedures:
        if one.group:
            members.setdefault(one.group, []).append(one.name)
    assert sorted(map(sorted, members.values())) == [
        ["silver.customer_value", "silver.segments"],
        ["silver.dim_customers", "silver.regions"],
    ]
    assert all(group.transaction_scope == "per_group" for group in config().groups.values())
    assert "silver.regions reads silver.dim_customers, which silver.dim_customers loads after it" in report()


def test_windows_are_recognised_by_what_is_compared_with_the_arguments(
    warehouse: Connection, shell: Shell
) -> None:
    shell("import", *SCHEMAS)
    watermarks = {
        name: (one.watermark.strategy, one.watermark.source, dict(one.args))
        for name, one in procedures().items()
        if one.watermark
    }
    assert watermarks == {
        "silver.price_history": ("timestamp", ("bronze.erp_products.loaded_at",), {}),
        "silver.sessions": ("timestamp", ("bronze.clicks.at",), {"p_since": "in_from", "p_until": "in_to"}),
    }


def test_an_overload_and_names_with_quotes_are_named_so_that_the_server_finds_them(
    warehouse: Connection, shell: Shell
) -> None:
    shell("import", *SCHEMAS)
    found = procedures()
    assert found["silver.returns"].routine == "silver.load_returns()"
    assert found["silver.stores"].routine == 'silver."Load Stores"'
    assert found["stage_area.raw_copy"].routine == '"Stage Area"."Copy Products"'
    assert config().search_path == ("silver",)


def test_every_routine_is_accounted_for(warehouse: Connection, shell: Shell) -> None:
    document = json.loads(shell("import", *SCHEMAS, "--json"))
    roles: dict[str, set[str]] = {}
    for one in document["routines"]:
        roles.setdefault(one["role"], set()).add(one["routine"].partition("(")[0])
    assert roles["blocked"] == {
        "silver.load_clicks", "silver.load_calendar", "silver.purge_orders", "silver.run_from_table",
    }  # fmt: skip
    assert roles["trigger"] == {"silver.touch_audit"}
    assert roles["orchestrator"] == {"silver.load_everything"}
    assert roles["reader"] == {"silver.to_number", "silver.customer_key", "silver.log", "silver.current_rate"}
    assert roles["overload"] == {"silver.load_returns"}
    assert len(document["routines"]) == sum(len(names) for names in roles.values()) + 1 - 1
    assert len(document["procedures"]) == len(roles["transformation"]) == 19
    text = report()
    for one in document["routines"]:
        assert one["routine"] in text or one["routine"].removesuffix("()") in text, one


def test_what_cannot_run_says_why_and_what_to_do(warehouse: Connection, shell: Shell) -> None:
    shell("import", *SCHEMAS)
    text = report()
    for line in (
        "it ends its own transaction (commit in line 6): take COMMIT and ROLLBACK out",
        "argument p_before date needs a value: give it a default, or declare it: params: {before: {type: string, format: date, required: true}}",
        "it executes text that is known at run time only",
    ):
        assert line in text
        assert line in Path("transformations.yaml").read_text(encoding="utf-8")


def test_files_tell_the_same_as_the_database(warehouse: Connection, shell: Shell) -> None:
    shell("import", *SCHEMAS)
    from_database = procedures()
    shell("import", str(CORPUS / "warehouse.sql"), *SCHEMAS, "--force")
    from_files = procedures()
    assert from_files.keys() == from_database.keys()
    for name, one in from_files.items():
        other = from_database[name]
        assert (one.type, one.routine, one.group, sorted(one.dependencies)) == (
            other.type, other.routine, other.group, sorted(other.dependencies),
        )  # fmt: skip
        assert one.mv_refresh == other.mv_refresh
        assert one.watermark == other.watermark


# -- one routine that loads everything --


@pytest.fixture(params=["generated", "export"])
def monolith(request: pytest.FixtureRequest, db: Database) -> Connection:
    """Bronze of the worked pipeline, generated or as a real export has it, and one routine that loads all of Silver."""
    connection = db.connect()
    connection.execute(demo.sql("bronze.sql").encode())
    if request.param == "generated":
        generate(connection)
    elif not all((export.EXPORT / name).is_file() for name in export.FILES.values()):
        pytest.skip("no CRM/ERP export: B2S_CRM_ERP names its directory")
    else:
        for table in export.FILES:
            rows = export.records(table)
            columns = ", ".join(rows[0])
            copied = f"copy bronze.{table} ({columns}) from stdin"
            with connection.cursor() as cursor, cursor.copy(copied.encode()) as copy:
                for row in rows:
                    copy.write_row([value or None for value in row.values()])
    connection.execute(MONOLITH.encode())
    return connection


PIECES: Final = (
    "silver.crm_cust_info", "silver.crm_prd_info", "silver.crm_sales_details", "silver.erp_cust_az12", "silver.erp_loc_a101",
    "silver.customer_totals",
)  # fmt: skip


def data(connection: Connection) -> dict[str, list[str]]:
    """What the pieces loaded, without the time at which they did."""
    connection.execute("update silver.crm_cust_info set dwh_create_date = null")
    return contents(connection, PIECES)


def test_a_split_loads_what_the_whole_loaded(monolith: Connection, shell: Shell) -> None:
    notices: list[str] = []
    monolith.add_notice_handler(lambda one: notices.append(one.message_primary or ""))
    monolith.execute("call silver.load_silver()")
    assert [one for one in notices if "ERROR" in one] == [], "the routine swallows its errors"
    expected = data(monolith)
    assert all(expected.values())
    shell("import", "--schema", "silver")
    grants, skeletons = blocks("sql")
    monolith.execute(skeletons.encode())
    monolith.execute(grants.encode())
    monolith.execute(f"truncate {', '.join(PIECES)}".encode())
    Path("transformations.yaml").write_text(f"version: 1\nprocedures:\n{blocks('yaml')[0]}", encoding="utf-8")
    shell("sync-config")
    assert "6 succeeded" in shell("run")
    assert data(monolith) == expected


def test_the_whole_runs_as_it_is_too(monolith: Connection, shell: Shell) -> None:
    shell("import", "--schema", "silver")
    monolith.execute(blocks("sql")[0].encode())
    shell("sync-config")
    shell("run")
    assert all(data(monolith).values())


def test_a_split_says_which_statements_and_what_needs_what(shell: Shell) -> None:
    shell("import", str(CORPUS / "monolith.sql"))
    text = report()
    first = (
        MONOLITH[: MONOLITH.index("truncate table silver.erp_cust_az12, silver.erp_loc_a101")].count("\n") + 1
    )
    assert f"| silver.erp_loc_a101 | {first}, " in text
    assert "| silver.customer_totals |" in text
    row = next(line for line in text.splitlines() if line.startswith("| silver.customer_totals |"))
    assert row.endswith("| silver.crm_cust_info, silver.crm_sales_details |")
    assert re.search(r"silver\.customer_totals: a statement stood under: if of line \d+", text)
    assert "cutoff date := date '2050-01-01';   -- of silver.load_silver" in text


@pytest.mark.parametrize(
    ("statements", "note"),
    [
        ("v := 1; insert into silver.a (x) select v from bronze.b; insert into silver.c (x) select 1 from bronze.b;",
         "silver.a: variable v is computed elsewhere in the routine"),
        ("insert into silver.a (x) select x from silver.c; insert into silver.c (x) select 1 from bronze.b;",
         "silver.a: reads silver.c before the routine loads it"),
        ("create temp table s as select 1 as x from bronze.b; insert into silver.a (x) select x from s; insert into silver.c (x) select x from s;",
         "silver.a: s is made in several pieces: each makes its own"),
        ("call silver.other(); insert into silver.a (x) select 1 from bronze.b;",
         "silver.c: its statements are in routines that are called"),
    ],
)  # fmt: skip
def test_what_a_split_cannot_decide_is_said(shell: Shell, statements: str, note: str) -> None:
    Path("x.sql").write_text(
        "create procedure silver.other() language sql as 'insert into silver.c (x) select 2 from bronze.b';\n"
        f"create procedure silver.load() language plpgsql as $$ declare v int; begin {statements} end $$;",
        encoding="utf-8",
    )
    shell("import", "x.sql")
    assert note in report()


# -- what can go wrong --


def test_no_file_is_overwritten(shell: Shell) -> None:
    Path("import-report.md").write_text("mine", encoding="utf-8")
    assert "import-report.md is there already" in shell("import", str(CORPUS), code=2)
    assert not Path("transformations.yaml").exists()
    assert Path("import-report.md").read_text(encoding="utf-8") == "mine"
    shell("import", str(CORPUS), "--force")
    assert Path("transformations.yaml").exists()


def test_an_empty_schema_is_said(db: Database, shell: Shell) -> None:
    assert "holds no function or procedure of schema nothing" in shell(
        "import", "--schema", "nothing", code=2
    )
    assert not Path("transformations.yaml").exists()


def test_nothing_that_can_run_is_still_a_report(shell: Shell) -> None:
    Path("x.sql").write_text(
        "create procedure s.load() language plpgsql as $$ begin insert into s.t select 1; commit; end $$",
        encoding="utf-8",
    )
    shell("import", "x.sql")
    assert "it ends its own transaction" in report()
    assert "procedures: []" in Path("transformations.yaml").read_text(encoding="utf-8")


def test_broken_sql_is_reported_and_hides_nothing(shell: Shell) -> None:
    Path("x.sql").write_text(
        "create function s.a() returns int language plpgsql as $$ begin selec; end $$;\n"
        "create function s.b() returns bigint language sql as $$ with n as (insert into s.t (x) select x from b.t returning 1) select count(*) from n $$;\n"
        "this is no SQL;\n",
        encoding="utf-8",
    )
    shell("import", "x.sql")
    assert list(procedures()) == ["s.t"]
    assert "`s.a()`: syntax error" in report()


def test_yaml_goes_to_stdout_for_a_dash(shell: Shell) -> None:
    out = shell("import", str(CORPUS / "monolith.sql"), "--output", "-")
    assert "  - name: silver.load_silver" in out
    assert not Path("transformations.yaml").exists()


def test_routines_of_other_languages_are_named(db: Database, shell: Shell) -> None:
    with db.connect() as connection:
        connection.execute(
            "create schema s; create function s.a() returns int language internal as 'pg_backend_pid'"
        )
        connection.execute("create function s.b() returns bigint language sql as $$ select 1::bigint $$")
    shell("import", "--schema", "s")
    assert "`s.a()`: it is written in internal" in report()


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": ["b"], "b": []}, []),
        ({"a": ["b"], "b": ["a"]}, [["a", "b"]]),
        ({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}, [["a", "b", "c"]]),
        ({"a": ["b"], "b": ["a"], "c": ["d", "a"], "d": ["c"]}, [["a", "b"], ["c", "d"]]),
    ],
)
def test_circles_of_any_length_are_found(graph: dict[str, list[str]], found: list[list[str]]) -> None:
    assert sorted(_cycles(graph)) == found


def test_a_circle_of_thousands_is_found_in_a_moment() -> None:
    names = [f"p{number:05}" for number in range(5000)]
    assert _cycles({name: [names[number - 1]] for number, name in enumerate(names)}) == [names]
