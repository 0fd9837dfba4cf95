"""The generated Bronze and the SQL that makes Silver of it, mostly by calling its routines directly."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from b2s import demo
from b2s.demo.generate import arrive, break_it, generate, repair
from b2s.demo.shop import CUSTOMER_FAULTS, SALES_FAULTS, TABLES, Fault, build
from b2s.sync import sync_config

Conn = psycopg.Connection[Any]

PROJECT = Path(__file__).resolve().parents[1]
FIRST = datetime(2025, 6, 1, tzinfo=UTC)
SECOND = datetime(2025, 6, 2, tzinfo=UTC)
THIRD = datetime(2025, 6, 3, tzinfo=UTC)
SMALL = {"customers": 80, "products": 20, "orders": 150}

TARGETS = {
    "dim_categories": "category_id",
    "dim_locations": "customer_key",
    "dim_customers": "customer_id",
    "dim_products": "product_id",
    "fact_sales": "order_number, product_number",
    "fact_orders": "order_number",
}


@pytest.fixture
def conn(db: Any) -> Conn:
    """A database with the demo's tables and routines; Bronze is empty."""
    connection: Conn = db.connect()
    demo.install(connection)
    return connection


@pytest.fixture
def shop(conn: Conn) -> Conn:
    """The same, with the first delivery in Bronze, not yet in Silver."""
    generate(conn, **SMALL, ingested_at=FIRST)
    return conn


def value(conn: Conn, query: str, *args: Any) -> Any:
    row = conn.execute(query.encode(), args).fetchone()
    assert row is not None
    return row[0]


def load(
    conn: Conn, mode: str = "incremental", since: datetime | None = None, until: datetime | None = None
) -> dict[str, int]:
    """Call every routine as the owner of the steps does; rows written per target."""
    window = (mode, since, until)
    with conn.transaction():
        conn.execute("set local role etl_owner")
        conn.execute("set local search_path = pg_catalog")
        return {
            "dim_categories": value(conn, "call silver.load_categories()"),
            "dim_locations": value(conn, "select silver.load_locations(%s, %s, %s)", *window),
            "dim_customers": value(conn, "select silver.load_customers(%s, %s, %s)", *window),
            "dim_products": value(conn, "select silver.load_products(%s, %s, %s)", *window),
            "fact_sales": value(conn, "select silver.load_sales(%s, %s, %s)", *window),
            "fact_orders": value(conn, "select silver.load_orders(%s)", mode),
        }


def contents(conn: Conn) -> dict[str, list[str]]:
    """Every Silver row as text, without the columns that say who wrote it when."""
    return {
        table: [
            row[0]
            for row in conn.execute(
                sql.SQL("select (to_jsonb(t) - 'run_id' - 'updated_at')::text from {} t order by {}").format(
                    sql.Identifier("silver", table), sql.SQL(", ").join(map(sql.Identifier, key.split(", ")))
                )
            )
        ]
        for table, key in TARGETS.items()
    }


def bronze(conn: Conn) -> dict[str, list[Any]]:
    return {
        table: conn.execute(
            sql.SQL("select * from {} order by ingested_at").format(sql.Identifier("bronze", table))
        ).fetchall()
        for table in TABLES
    }


def sell(conn: Conn, order: str = "SO1", *, at: datetime = FIRST, **columns: str | None) -> None:
    """One order line in Bronze: sound, but for the columns named."""
    line: dict[str, Any] = {
        "sls_ord_num": order, "sls_prd_key": "HE-1", "sls_cust_id": "11000", "sls_order_dt": "20250101",
        "sls_ship_dt": "20250108", "sls_due_dt": "20250113", "sls_sales": "20", "sls_quantity": "2",
        "sls_price": "10", "ingested_at": at,
    }  # fmt: skip
    line |= columns
    conn.execute(
        sql.SQL("insert into bronze.crm_sales_details ({}) values ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, line)), sql.SQL(", ").join(sql.Placeholder() * len(line))
        ),
        list(line.values()),
    )


def test_the_same_seed_gives_the_same_rows() -> None:
    assert build(7, 30, 10, 50) == build(7, 30, 10, 50)


def test_another_seed_gives_other_rows() -> None:
    assert build(7, 30, 10, 50).rows != build(8, 30, 10, 50).rows


def test_every_kind_of_fault_is_planted() -> None:
    planted = {fault.kind for fault in build(1, 50, 10, 40).faults}
    assert planted >= {*CUSTOMER_FAULTS, *SALES_FAULTS}
    assert planted >= {"padded_category", "wrong_end_date", "padded_line", "missing_cost"}


@pytest.mark.parametrize("size", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_a_shop_without_customers_or_products_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        build(1, *size)


def test_the_smallest_shop_can_be_built() -> None:
    assert build(1, 1, 1, 0).counts()["crm_sales_details"] == 0


def test_the_sql_can_be_installed_again_over_data(shop: Conn) -> None:
    load(shop)
    before = contents(shop)
    demo.install(shop)
    assert contents(shop) == before
    assert all(before.values())


def test_everything_belongs_to_the_owner_of_the_steps(conn: Conn) -> None:
    foreign = conn.execute("""
        select c.oid::regclass::text from pg_class c
         where c.relnamespace in ('bronze'::regnamespace, 'silver'::regnamespace, 'mart'::regnamespace)
           and c.relowner <> 'etl_owner'::regrole
        union all
        select p.oid::regprocedure::text from pg_proc p
         where p.pronamespace = 'silver'::regnamespace and p.proowner <> 'etl_owner'::regrole
        union all
        select n.nspname from pg_namespace n
         where n.nspname in ('bronze', 'silver', 'mart') and n.nspowner <> 'etl_owner'::regrole
    """).fetchall()
    assert foreign == []


def test_nobody_else_may_call_the_routines(conn: Conn) -> None:
    query = """
        select p.oid::regprocedure::text
          from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
         where p.pronamespace = 'silver'::regnamespace and a.grantee = 0
    """
    assert conn.execute(query).fetchall() == []


def test_the_materialized_views_are_populated_from_the_start(conn: Conn) -> None:
    populated = conn.execute("""
        select c.relname, c.relispopulated from pg_class c
         where c.relnamespace = 'mart'::regnamespace and c.relkind = 'm' order by 1
    """).fetchall()
    assert populated == [("sales_by_month", True), ("sales_trend", True)]


def found(conn: Conn, fault: Fault) -> dict[str, str | None] | None:
    """The Silver row of a fault, in the columns it has an opinion on, as text."""
    columns = list(fault.expected or fault.key)
    row = conn.execute(
        sql.SQL("select {} from {} where {}").format(
            sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in columns),
            sql.Identifier(*fault.table.split(".")),
            sql.SQL(" and ").join(
                sql.SQL("{}::text = %s").format(sql.Identifier(name)) for name in fault.key
            ),
        ),
        list(fault.key.values()),
    ).fetchone()
    return None if row is None else dict(zip(columns, row, strict=True))


def test_every_planted_fault_is_repaired(shop: Conn) -> None:
    load(shop)
    faults = build(42, **SMALL).faults
    wrong = [(fault, found(shop, fault)) for fault in faults if found(shop, fault) != fault.expected]
    assert wrong == []
    assert len(faults) > 40


def test_nothing_but_the_planted_faults_is_repaired(shop: Conn) -> None:
    load(shop)
    planted = {
        (fault.key["order_number"], fault.key["product_number"])
        for fault in build(42, **SMALL).faults
        if fault.table == "silver.fact_sales" and (fault.expected or {}).get("repairs") != "{}"
    }
    repaired = set(
        shop.execute(
            "select order_number, product_number from silver.fact_sales where repairs <> '{}'"
        ).fetchall()
    )
    assert repaired == planted


def test_routines_called_again_change_nothing(shop: Conn) -> None:
    first = load(shop)
    stamps = shop.execute("select updated_at, ctid from silver.fact_sales order by 1, 2").fetchall()
    assert all(first.values())
    assert set(load(shop).values()) == {0}
    assert shop.execute("select updated_at, ctid from silver.fact_sales order by 1, 2").fetchall() == stamps


def test_a_full_load_gives_what_the_windows_gave(shop: Conn) -> None:
    load(shop, until=SECOND)
    arrive(shop, ingested_at=SECOND)
    load(shop, since=SECOND, until=THIRD)
    before = contents(shop)
    written = load(shop, "full", until=THIRD)
    assert contents(shop) == before
    assert written["fact_sales"] == len(before["fact_sales"])


def test_a_full_load_drops_what_bronze_no_longer_has(shop: Conn) -> None:
    load(shop)
    shop.execute("delete from bronze.erp_loc_a101")
    load(shop, "full")
    assert contents(shop)["dim_locations"] == []


def test_every_row_says_which_run_wrote_it(conn: Conn) -> None:
    sell(conn)
    conn.execute("select silver.load_sales(p_run_id => 7)")
    conn.execute("select silver.load_orders(p_run_id => 8)")
    assert value(conn, "select run_id from silver.fact_sales") == 7
    assert value(conn, "select run_id from silver.fact_orders") == 8


def test_a_window_holds_its_start_and_not_its_end(conn: Conn) -> None:
    sell(conn, "SO1", at=FIRST)
    sell(conn, "SO2", at=SECOND)
    assert value(conn, "select silver.load_sales(p_since => %s, p_until => %s)", FIRST, SECOND) == 1
    assert value(conn, "select order_number from silver.fact_sales") == "SO1"
    assert value(conn, "select silver.load_sales(p_since => %s, p_until => %s)", SECOND, THIRD) == 1


def test_a_late_correction_wins(conn: Conn) -> None:
    sell(conn, at=FIRST)
    load(conn, until=SECOND)
    sell(conn, at=SECOND, sls_quantity="5", sls_sales="50")
    assert load(conn, since=SECOND, until=THIRD)["fact_sales"] == 1
    assert value(conn, "select order_amount from silver.fact_orders") == 50


def test_reading_an_old_window_again_does_not_bring_back_an_old_version(conn: Conn) -> None:
    sell(conn, at=FIRST)
    sell(conn, at=SECOND, sls_quantity="5", sls_sales="50")
    load(conn)
    assert load(conn, since=FIRST, until=SECOND)["fact_sales"] == 0
    assert value(conn, "select quantity from silver.fact_sales") == 5


def test_news_of_the_erp_alone_reaches_the_customer(shop: Conn) -> None:
    load(shop, until=SECOND)
    shop.execute(
        """insert into bronze.erp_cust_az12 (cid, bdate, gen, ingested_at)
           values ('NASAW00011003', '1961-02-03', 'F', %s)""",
        [SECOND],
    )
    assert load(shop, since=SECOND, until=THIRD)["dim_customers"] == 1
    born = value(shop, "select birth_date::text from silver.dim_customers where customer_id = 11003")
    assert born == "1961-02-03"


def test_a_new_version_of_a_product_ends_the_one_before(conn: Conn) -> None:
    insert = """insert into bronze.crm_prd_info (prd_id, prd_key, prd_nm, prd_line, prd_start_dt, ingested_at)
                values (%s, 'AC-HE-HE-1', 'Helmet', 'S ', %s, %s)"""
    conn.execute(insert, ["1", "2024-01-01", FIRST])
    load(conn, until=SECOND)
    conn.execute(insert, ["2", "2025-01-01", SECOND])
    assert load(conn, since=SECOND, until=THIRD)["dim_products"] == 2
    versions = conn.execute(
        "select product_id, valid_from::text, valid_to::text from silver.dim_products order by 1"
    ).fetchall()
    assert versions == [(1, "2024-01-01", "2024-12-31"), (2, "2025-01-01", None)]


def test_the_newer_create_date_wins_over_the_later_arrival(conn: Conn) -> None:
    for name, created, at in [("New", "2025-02-02", FIRST), ("Old", "2025-02-01", SECOND)]:
        conn.execute(
            """insert into bronze.crm_cust_info (cst_id, cst_key, cst_firstname, cst_create_date, ingested_at)
               values ('1', 'AW00000001', %s, %s, %s)""",
            [name, created, at],
        )
    load(conn)
    assert value(conn, "select string_agg(first_name, ',') from silver.dim_customers") == "New"


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20250131", "2025-01-31"),
        (" 2025-01-31 ", "2025-01-31"),
        ("20240229", "2024-02-29"),
        ("20250229", None),
        ("20251301", None),
        ("20250100", None),
        ("0", None),
        ("5489", None),
        ("202501011", None),
        ("", None),
        (None, None),
    ],
)
def test_a_day_is_read_or_left_out_but_never_an_error(conn: Conn, text: str | None, day: str | None) -> None:
    assert value(conn, "select silver.to_day(%s)::text", text) == day


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        # sales, quantity, price as sent; quantity, unit price, sales amount, repairs as stored
        (("20", "2", "10"), (2, 10, 20, [])),
        (("20", "2", None), (2, 10, 20, ["unit_price"])),
        (("10", "3", "0"), (3, 3.33, 10, ["unit_price"])),
        (("-20", "2", "-10"), (2, 10, 20, ["unit_price", "sales_amount"])),
        (("7", "2", "10"), (2, 10, 20, ["sales_amount"])),
        (("x", "2", "10"), (2, 10, 20, ["sales_amount"])),
        (("20", None, "10"), (2, 10, 20, ["quantity"])),
        (("25", "0", "10"), (None, 10, 25, ["quantity"])),
        (("20", "5000", "10"), (2, 10, 20, ["quantity"])),
        ((None, "2", None), (2, None, None, [])),
    ],
)
def test_amounts_are_repaired_from_each_other(
    conn: Conn, sent: tuple[Any, ...], stored: tuple[Any, ...]
) -> None:
    sell(conn, sls_sales=sent[0], sls_quantity=sent[1], sls_price=sent[2])
    load(conn)
    row = conn.execute(
        "select quantity, unit_price::float, sales_amount::float, repairs from silver.fact_sales"
    ).fetchone()
    assert row == stored


def test_the_ship_date_stands_in_for_the_order_date_on_request(conn: Conn) -> None:
    sell(conn, sls_order_dt="0")
    query = "select order_date::text from silver.fact_sales"
    conn.execute("select silver.load_sales()")
    assert value(conn, query) is None
    conn.execute("select silver.load_sales(order_date_fallback => 'ship_date')")
    assert value(conn, query) == "2025-01-08"
    assert value(conn, "select repairs from silver.fact_sales") == ["order_date"]


def test_a_line_of_an_unknown_customer_is_counted(conn: Conn) -> None:
    sell(conn)
    load(conn)
    assert value(conn, "select silver.sales_without_customer()") == 1


def test_no_line_of_the_first_delivery_lacks_its_customer(shop: Conn) -> None:
    load(shop)
    assert value(shop, "select silver.sales_without_customer()") == 0


def test_the_views_sum_up_all_dated_lines(shop: Conn) -> None:
    load(shop)
    shop.execute("refresh materialized view mart.sales_by_month")
    shop.execute("refresh materialized view concurrently mart.sales_trend")
    total = value(shop, "select sum(sales_amount) from silver.fact_sales where order_date is not null")
    assert value(shop, "select sum(revenue) from mart.sales_by_month") == total
    assert value(shop, "select max(revenue_to_date) from mart.sales_trend") == total


def test_a_later_delivery_adds_and_corrects_what_it_says(shop: Conn) -> None:
    load(shop, until=SECOND)
    customers = value(shop, "select count(*) from silver.dim_customers")
    sent = arrive(shop, customers=5, orders=20, corrections=10, ingested_at=SECOND)
    written = load(shop, since=SECOND, until=THIRD)
    assert value(shop, "select count(*) from silver.dim_customers") == customers + sent["new_customers"] == 85
    assert written["dim_customers"] == sent["new_customers"] + sent["renamed_customers"]
    assert written["dim_locations"] == sent["new_customers"] + sent["moved_customers"]
    assert written["dim_products"] == sent["new_product_versions"] + 1
    assert written["fact_sales"] == sent["new_lines"] + sent["corrected_lines"]
    assert written["dim_categories"] == 0
    assert sent["corrected_lines"] == 10
    assert value(shop, "select count(*) from silver.fact_orders") == SMALL["orders"] + sent["new_orders"]


def test_the_same_deliveries_give_the_same_bronze(conn: Conn) -> None:
    pictures = []
    for _ in range(2):
        for table in TABLES:
            conn.execute(sql.SQL("truncate {}").format(sql.Identifier("bronze", table)))
        generate(conn, **SMALL, ingested_at=FIRST)
        arrive(conn, ingested_at=SECOND)
        break_it(conn, ingested_at=THIRD)
        pictures.append(bronze(conn))
    assert pictures[0] == pictures[1]


def test_without_a_time_the_clock_of_the_server_is_used(conn: Conn) -> None:
    before = value(conn, "select clock_timestamp()")
    generate(conn, customers=3, products=2, orders=4)
    first, last = conn.execute(
        "select min(ingested_at), max(ingested_at) from bronze.crm_sales_details"
    ).fetchall()[0]
    assert before < first <= last < before + timedelta(minutes=5)


def test_one_bad_line_stops_the_orders_and_nothing_else_until_it_is_repaired(shop: Conn) -> None:
    load(shop, until=SECOND)
    assert break_it(shop, ingested_at=SECOND) == {"crm_sales_details": 1}
    assert value(shop, "select silver.load_sales(p_since => %s)", SECOND) == 1
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        shop.execute("select silver.load_orders()")
    assert refused.value.diag.constraint_name == "an_order_has_one_customer"

    assert repair(shop, ingested_at=THIRD) == {"crm_sales_details": 1}
    assert load(shop, since=THIRD) == {**dict.fromkeys(TARGETS, 0), "fact_sales": 1, "fact_orders": 1}
    assert repair(shop) == {"crm_sales_details": 0}


def test_in_a_run_one_bad_line_undoes_the_orders_alone(shop: Conn) -> None:
    sync_config(shop, PROJECT / "transformations.yaml")

    def run(as_of: datetime) -> dict[str, tuple[str, int | None, str | None]]:
        """Status, rows and SQLSTATE per procedure of one run."""
        row = shop.execute("call etl.start_run(as_of => %s)", [as_of]).fetchone()
        assert row is not None
        steps = shop.execute(
            """select procedure_name, status, rows_affected, sqlstate
                 from etl.procedure_runs where run_id = %s""",
            [row[0]],
        ).fetchall()
        return {name.removeprefix("silver."): (status, rows, code) for name, status, rows, code in steps}

    assert {status for status, _, _ in run(SECOND).values()} == {"succeeded"}
    before = contents(shop)

    break_it(shop, ingested_at=SECOND)
    idle = ("succeeded", 0, None)
    assert run(THIRD) == {
        **dict.fromkeys(TARGETS, idle),
        "fact_sales": ("succeeded", 1, None),
        "fact_orders": ("failed", None, "23514"),
    }
    assert contents(shop)["fact_orders"] == before["fact_orders"]
    assert len(contents(shop)["fact_sales"]) == len(before["fact_sales"]) + 1

    repair(shop, ingested_at=THIRD)
    assert run(THIRD + timedelta(days=1)) == {
        **dict.fromkeys(TARGETS, idle),
        "fact_sales": ("succeeded", 1, None),
        "fact_orders": ("succeeded", 1, None),
    }


def test_deliveries_into_an_empty_bronze_say_what_to_do_first(conn: Conn) -> None:
    for late in (arrive, break_it, repair):
        with pytest.raises(ValueError, match="call generate"):
            late(conn)


def test_deliveries_are_committed_on_a_connection_without_autocommit(conn: Conn, db: Any) -> None:
    with db.connect(autocommit=False) as other:
        sent = generate(other, customers=3, products=2, orders=4)
        arrive(other, customers=1, orders=1, corrections=0)
    assert value(conn, "select count(*) from bronze.erp_loc_a101") == sent["erp_loc_a101"] + 1
