"""The worked pipeline on a real CRM and ERP export, with every Silver row computed a second time, in Python.

The export is not part of the project. B2S_CRM_ERP names its directory (default: ../shared/data/crm_erp beside
the project); without it these tests are skipped. The pipeline is transformations.yaml as it is; what Silver
must hold is computed here from the CSV files alone.
"""

import csv
import os
from collections import Counter
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from b2s import demo
from b2s.sync import sync_config

Conn = psycopg.Connection[Any]
Record = dict[str, str]

PROJECT = Path(__file__).resolve().parents[1]
EXPORT = Path(os.environ.get("B2S_CRM_ERP") or PROJECT.parent / "shared" / "data" / "crm_erp")
FILES = {
    "crm_cust_info": "cust_info.csv",
    "crm_prd_info": "prd_info.csv",
    "crm_sales_details": "sales_details.csv",
    "erp_cust_az12": "cust_az12.csv",
    "erp_loc_a101": "loc_a101.csv",
    "erp_px_cat_g1v2": "px_cat_g1v2.csv",
}

pytestmark = pytest.mark.skipif(
    not all((EXPORT / name).is_file() for name in FILES.values()),
    reason=f"no CRM/ERP export in {EXPORT}: B2S_CRM_ERP names the directory of {', '.join(FILES.values())}",
)

LOADED = datetime(2025, 6, 1, tzinfo=UTC)
FIRST_RUN = datetime(2025, 6, 2, tzinfo=UTC)
CHANGED = datetime(2025, 6, 3, tzinfo=UTC)
SECOND_RUN = datetime(2025, 6, 4, tzinfo=UTC)

ORDER = (
    "silver.dim_categories",
    "silver.dim_locations",
    "silver.dim_customers",
    "silver.dim_products",
    "silver.fact_sales",
    "silver.fact_orders",
)


@cache
def records(table: str) -> tuple[Record, ...]:
    """The rows of a file, with column names as Bronze has them."""
    with (EXPORT / FILES[table]).open(encoding="utf-8-sig", newline="") as file:
        return tuple({name.lower(): text for name, text in row.items()} for row in csv.DictReader(file))


def day(text: str) -> date | None:
    """A day written YYYYMMDD or YYYY-MM-DD."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


@cache
def expected_locations() -> dict[str, str]:
    spelled_out = {"DE": "Germany", "US": "United States", "USA": "United States", "": "n/a"}
    return {
        row["cid"].replace("-", ""): spelled_out.get(row["cntry"].strip(), row["cntry"].strip())
        for row in records("erp_loc_a101")
    }


@cache
def expected_customers() -> dict[int, tuple[Any, ...]]:
    erp = {row["cid"].removeprefix("NAS"): row for row in records("erp_cust_az12")}
    genders = {"M": "Male", "MALE": "Male", "F": "Female", "FEMALE": "Female"}
    newest: dict[int, Record] = {}
    for row in sorted(records("crm_cust_info"), key=lambda row: row["cst_create_date"]):
        if row["cst_id"]:
            newest[int(row["cst_id"])] = row
    customers: dict[int, tuple[Any, ...]] = {}
    for number, row in newest.items():
        more = erp.get(row["cst_key"], {"bdate": "", "gen": ""})
        born = day(more["bdate"])
        customers[number] = (
            row["cst_key"],
            row["cst_firstname"].strip() or None,
            row["cst_lastname"].strip() or None,
            {"S": "Single", "M": "Married"}.get(row["cst_marital_status"].strip(), "n/a"),
            genders.get(row["cst_gndr"].strip().upper()) or genders.get(more["gen"].strip().upper()) or "n/a",
            born if born and born.year < 2030 else None,
            day(row["cst_create_date"]),
        )
    return customers


@cache
def expected_products() -> dict[int, tuple[Any, ...]]:
    lines = {"M": "Mountain", "R": "Road", "S": "Other sales", "T": "Touring"}
    products: dict[int, tuple[Any, ...]] = {}
    for row in records("crm_prd_info"):
        later = [
            other["prd_start_dt"]
            for other in records("crm_prd_info")
            if other["prd_key"] == row["prd_key"] and other["prd_start_dt"] > row["prd_start_dt"]
        ]
        starts = day(min(later)) if later else None
        products[int(row["prd_id"])] = (
            row["prd_key"][6:],
            row["prd_key"][:5].replace("-", "_"),
            row["prd_nm"].strip(),
            Decimal(row["prd_cost"] or 0),
            lines.get(row["prd_line"].strip(), "n/a"),
            day(row["prd_start_dt"]),
            date.fromordinal(starts.toordinal() - 1) if starts else None,
        )
    return products


@cache
def expected_sales() -> dict[tuple[str, str], tuple[Any, ...]]:
    lines: dict[tuple[str, str], tuple[Any, ...]] = {}
    for row in records("crm_sales_details"):
        sent_price = Decimal(row["sls_price"]) if row["sls_price"] else None
        sent_sales = Decimal(row["sls_sales"]) if row["sls_sales"] else None
        quantity = int(row["sls_quantity"])
        if sent_price:
            price = abs(sent_price)
            sales = quantity * price
        else:
            assert sent_sales is not None
            sales = abs(sent_sales)
            price = sales / quantity
        dates = [day(row[name]) for name in ("sls_order_dt", "sls_ship_dt", "sls_due_dt")]
        repairs = [
            name
            for name, is_repaired in (
                ("order_date", dates[0] is None),
                ("unit_price", sent_price != price),
                ("sales_amount", sent_sales != sales),
            )
            if is_repaired
        ]
        key = (row["sls_ord_num"], row["sls_prd_key"])
        lines[key] = (int(row["sls_cust_id"]), *dates, quantity, price, sales, repairs)
    return lines


@cache
def expected_orders() -> dict[str, tuple[Any, ...]]:
    lines_of: dict[str, list[tuple[Any, ...]]] = {}
    for (order, _), line in expected_sales().items():
        lines_of.setdefault(order, []).append(line)
    return {
        order: (
            lines[0][0],
            len(lines),
            sum(line[4] for line in lines),
            sum(line[6] for line in lines),
            min((line[1] for line in lines if line[1]), default=None),
            max((line[1] for line in lines if line[1]), default=None),
            any(line[7] for line in lines),
        )
        for order, lines in lines_of.items()
    }


@pytest.fixture
def conn(db: Any) -> Conn:
    """The export in Bronze, the pipeline installed and synced, nothing run yet."""
    connection: Conn = db.connect()
    demo.install(connection)
    for table in FILES:
        columns = list(records(table)[0])
        copy = sql.SQL("copy {} ({}, ingested_at) from stdin").format(
            sql.Identifier("bronze", table), sql.SQL(", ").join(map(sql.Identifier, columns))
        )
        with connection.cursor() as cur, cur.copy(copy) as out:
            for row in records(table):
                out.write_row([*(row[name] or None for name in columns), LOADED])
    connection.execute("analyze")
    sync_config(connection, PROJECT / "transformations.yaml")
    return connection


def run(conn: Conn, as_of: datetime) -> dict[str, int]:
    """One incremental run of everything, which must succeed; rows written per procedure, in order."""
    row = conn.execute("call etl.start_run(as_of => %s)", [as_of]).fetchone()
    assert row is not None
    run_id, status = row
    steps = conn.execute(
        """select procedure_name, status, rows_affected, error_message from etl.procedure_runs
            where run_id = %s order by order_index""",
        [run_id],
    ).fetchall()
    assert (status, {step[1] for step in steps}) == ("succeeded", {"succeeded"}), steps
    return {step[0]: step[2] for step in steps}


def silver(conn: Conn, table: str, columns: str, keys: int = 1) -> dict[Any, tuple[Any, ...]]:
    """A Silver table, by its key: the first `keys` of the columns named."""
    names = columns.split()
    rows = conn.execute(
        sql.SQL("select {} from {}").format(
            sql.SQL(", ").join(map(sql.Identifier, names)), sql.Identifier("silver", table)
        )
    ).fetchall()
    return {row[0] if keys == 1 else row[:keys]: row[keys:] for row in rows}


def locations(conn: Conn) -> dict[str, str]:
    return {key: country for key, (country,) in silver(conn, "dim_locations", "customer_key country").items()}


CUSTOMER = "customer_id customer_key first_name last_name marital_status gender birth_date created_on"
PRODUCT = "product_id product_number category_id product_name cost product_line valid_from valid_to"
SALE = (
    "order_number product_number customer_id order_date ship_date due_date"
    " quantity unit_price sales_amount repairs"
)
ORDERS = (
    "order_number customer_id line_count quantity order_amount first_order_date last_order_date is_repaired"
)


def test_the_first_run_makes_silver_exactly_what_the_files_say(conn: Conn) -> None:
    written = run(conn, FIRST_RUN)

    assert set(written) == set(ORDER)
    assert list(written)[-2:] == ["silver.fact_sales", "silver.fact_orders"]
    assert written == {
        "silver.dim_categories": len(records("erp_px_cat_g1v2")),
        "silver.dim_locations": len(expected_locations()),
        "silver.dim_customers": len(expected_customers()),
        "silver.dim_products": len(expected_products()),
        "silver.fact_sales": len(records("crm_sales_details")),
        "silver.fact_orders": len(expected_orders()),
    }

    assert silver(conn, "dim_categories", "category_id category subcategory has_maintenance") == {
        row["id"]: (row["cat"], row["subcat"], row["maintenance"].strip() == "Yes")
        for row in records("erp_px_cat_g1v2")
    }
    assert locations(conn) == expected_locations()
    countries = {"Australia", "Canada", "France", "Germany", "United Kingdom", "United States", "n/a"}
    assert set(expected_locations().values()) == countries
    assert silver(conn, "dim_customers", CUSTOMER) == expected_customers()
    assert silver(conn, "dim_products", PRODUCT) == expected_products()
    assert silver(conn, "fact_sales", SALE, keys=2) == expected_sales()
    assert silver(conn, "fact_orders", ORDERS) == expected_orders()


def test_the_repairs_are_those_the_files_need(conn: Conn) -> None:
    run(conn, FIRST_RUN)
    wrong = [
        row
        for row in records("crm_sales_details")
        if not row["sls_sales"]
        or not row["sls_price"]
        or int(row["sls_price"]) <= 0
        or int(row["sls_sales"]) != int(row["sls_quantity"]) * int(row["sls_price"])
    ]
    undated = [row for row in records("crm_sales_details") if day(row["sls_order_dt"]) is None]
    stored = conn.execute("""
        select order_number, product_number from silver.fact_sales
         where repairs && '{unit_price,sales_amount}'
    """).fetchall()
    assert sorted(stored) == sorted((row["sls_ord_num"], row["sls_prd_key"]) for row in wrong)
    counts = dict(
        conn.execute("select unnest(repairs), count(*) from silver.fact_sales group by 1").fetchall()
    )
    assert counts == Counter(name for line in expected_sales().values() for name in line[-1])
    assert counts["order_date"] == len(undated)
    total = conn.execute("select sum(sales_amount) from silver.fact_sales").fetchall()[0][0]
    assert total == sum(line[6] for line in expected_sales().values())


def test_the_views_are_refreshed_after_the_run(conn: Conn) -> None:
    run(conn, FIRST_RUN)
    by_month: Counter[tuple[date, str]] = Counter()
    countries = expected_locations()
    customers = expected_customers()
    for customer, ordered, *_, amount, _repairs in expected_sales().values():
        if ordered:
            by_month[ordered.replace(day=1), countries[customers[customer][0]]] += amount
    stored = conn.execute("select month, country, revenue from mart.sales_by_month").fetchall()
    assert {(month, country): revenue for month, country, revenue in stored} == by_month
    months = {month for month, _ in by_month}
    trend = conn.execute("select month, revenue_to_date from mart.sales_trend order by month").fetchall()
    assert [row[0] for row in trend] == sorted(months)
    assert trend[-1][1] == sum(by_month.values())


def test_a_run_without_news_writes_nothing_and_a_run_with_news_writes_only_those(conn: Conn) -> None:
    run(conn, FIRST_RUN)
    assert run(conn, FIRST_RUN) == dict.fromkeys(ORDER, 0)
    assert run(conn, CHANGED) == dict.fromkeys(ORDER, 0)

    key, line = next((key, line) for key, line in sorted(expected_sales().items()) if not line[-1])
    customer, *_ = line
    customer_key = expected_customers()[customer][0]
    dates = ["20140101", "20140108", "20140113"]
    with conn.cursor() as cur:
        cur.executemany(
            "insert into bronze.crm_sales_details values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                [*key, str(customer), *dates, "30", "3", "10", CHANGED],
                ["SO99999", key[1], str(customer), *dates, None, "2", "-9", CHANGED],
            ],
        )
    conn.execute(
        "insert into bronze.erp_loc_a101 (cid, cntry, ingested_at) values (%s, 'New Zealand', %s)",
        [customer_key.replace("AW", "AW-"), CHANGED],
    )
    conn.execute(
        "insert into bronze.erp_cust_az12 values (%s, '1950-05-05', 'Male', %s)",
        [f"NAS{customer_key}", CHANGED],
    )

    assert run(conn, SECOND_RUN) == {
        "silver.dim_categories": 0,
        "silver.dim_locations": 1,
        "silver.dim_customers": 1,
        "silver.dim_products": 0,
        "silver.fact_sales": 2,
        "silver.fact_orders": 2,
    }
    ordered, shipped, due = date(2014, 1, 1), date(2014, 1, 8), date(2014, 1, 13)
    assert silver(conn, "fact_sales", SALE, keys=2) == expected_sales() | {
        key: (customer, ordered, shipped, due, 3, 10, 30, []),
        ("SO99999", key[1]): (customer, ordered, shipped, due, 2, 9, 18, ["unit_price", "sales_amount"]),
    }
    assert locations(conn) == expected_locations() | {customer_key: "New Zealand"}
    born = silver(conn, "dim_customers", "customer_id birth_date")
    assert born[customer] == (date(1950, 5, 5),)
    assert run(conn, SECOND_RUN) == dict.fromkeys(ORDER, 0)
