"""Bronze rows of a small bicycle shop, sent to a database (`b2s.demo.shop` says what they are).

    generate(conn)     the first delivery
    arrive(conn)       a later one: new customers and orders, and corrections of earlier rows
    break_it(conn)     one order line that makes `silver.fact_orders`, and nothing else, fail
    repair(conn)       the source system corrects that line

The seed, and for later deliveries the rows that are there already, decide everything. Bronze is only ever
added to.

Each function takes `ingested_at`: the time of the first row it sends to a table (each further row is one
microsecond later). Without it the server's clock is used, as it is for any other loader; a run reads such
rows once its safe bound, a little behind the clock, has passed them.
"""

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

from psycopg import Connection
from psycopg import sql as pgsql
from psycopg.rows import tuple_row

from b2s.demo.shop import (
    FIRST_NAMES,
    TABLES,
    Batch,
    Row,
    add_customers,
    add_orders,
    build,
    customer_key,
    erp_key,
    seeded,
)

__all__ = ["arrive", "break_it", "generate", "repair"]


def generate(
    conn: Connection[Any],
    *,
    seed: int = 42,
    customers: int = 500,
    products: int = 60,
    orders: int = 2000,
    ingested_at: datetime | None = None,
) -> dict[str, int]:
    """Send the first delivery to Bronze in one transaction, and analyze the tables.

    The rows are those of `shop.build()`; returns how many there are per Bronze table. Bronze should be empty:
    rows that are there already stay.
    """
    batch = build(seed, customers, products, orders)
    with conn.transaction():
        _send(conn, batch, ingested_at)
        for table in TABLES:
            conn.execute(pgsql.SQL("analyze {}").format(pgsql.Identifier("bronze", table)))
    return batch.counts()


def arrive(
    conn: Connection[Any],
    *,
    seed: int = 43,
    customers: int = 20,
    orders: int = 100,
    corrections: int = 30,
    ingested_at: datetime | None = None,
) -> dict[str, int]:
    """Send a later delivery, in one transaction: new customers, new orders, and corrections of earlier rows.

    `corrections` order lines are sent again with another quantity; a fifth as many customers have a new
    family name, and as many have moved (news of the ERP alone). One product becomes dearer from 2026 on.
    Returns how many of each. Raises ValueError when Bronze has no customers or no products.
    """
    rng = seeded(seed)
    known = _known(conn)
    batch = Batch()
    new_ids = range(max(known.customer_ids) + 1, max(known.customer_ids) + 1 + customers)
    first_order = max((int(line[0].removeprefix("SO")) for line in known.lines), default=50000) + 1
    add_customers(batch, rng, new_ids)
    add_orders(
        batch, rng, range(first_order, first_order + orders), [*known.customer_ids, *new_ids], known.prices,
        date(2026, 1, 1), 30,
    )  # fmt: skip
    new_lines = len({row[:2] for row in batch.rows["crm_sales_details"]})

    sound = [line for line in known.lines if _is_sound(line)]
    corrected = rng.sample(sound, min(corrections, len(sound)))
    for order, product, customer, ordered, shipped, due, _, quantity, price in corrected:
        changed = int(quantity) + 1
        batch.rows["crm_sales_details"].append(
            (order, product, customer, ordered, shipped, due, str(changed * int(price)), str(changed), price)
        )
    few = min(len(known.customer_ids), corrections // 5)
    renamed = rng.sample(known.customer_ids, few)
    for cid in renamed:
        batch.rows["crm_cust_info"].append(
            (
                str(cid),
                customer_key(cid),
                rng.choice(FIRST_NAMES),
                "Newman",
                "M",
                rng.choice("MF"),
                "2026-01-15",
            )
        )
    moved = rng.sample(known.customer_ids, few)
    for cid in moved:
        batch.rows["erp_loc_a101"].append((erp_key(cid), "New Zealand"))
    prd_key, name, code = rng.choice(known.products)
    dearer = known.prices[prd_key[6:]] + 50
    batch.rows["crm_prd_info"].append(
        (str(known.last_product_id + 1), prd_key, name, str(dearer * 3 // 5), code, "2026-01-01", None)
    )
    _send(conn, batch, ingested_at)
    return {
        "new_customers": customers,
        "new_orders": orders,
        "new_lines": new_lines,
        "corrected_lines": len(corrected),
        "renamed_customers": len(renamed),
        "moved_customers": len(moved),
        "new_product_versions": 1,
    }


def break_it(conn: Connection[Any], *, ingested_at: datetime | None = None) -> dict[str, int]:
    """Send one more line of an order, under the number of another customer. Returns the rows sent.

    The line itself is sound, so `silver.fact_sales` takes it; `silver.fact_orders` refuses an order of two
    customers (constraint `an_order_has_one_customer`) until `repair()` is called. Raises ValueError when
    Bronze holds too little for that: an order, a product it does not have, and a second customer.
    """
    known = _known(conn)
    batch = Batch()
    for order, _, customer, ordered, shipped, due, *_ in known.lines[:1]:
        taken = {line[1] for line in known.lines if line[0] == order}
        product = next((number for number in sorted(known.prices) if number not in taken), None)
        other = next((cid for cid in known.customer_ids if str(cid) != customer), None)
        if product and other:
            price = str(known.prices[product])
            batch.rows["crm_sales_details"].append(
                (order, product, str(other), ordered, shipped, due, price, "1", price)
            )
    if not batch.rows["crm_sales_details"]:
        raise ValueError("bronze needs an order, a product that it does not have, and a second customer")
    _send(conn, batch, ingested_at)
    return {"crm_sales_details": 1}


def repair(conn: Connection[Any], *, ingested_at: datetime | None = None) -> dict[str, int]:
    """Send each line again, corrected, that names another customer than the first line of its order does.

    Returns the rows sent: 0 when nothing is to be repaired.
    """
    batch = Batch()
    first: dict[str, str] = {}
    for line in sorted(_known(conn).lines_by_arrival, key=lambda found: found[0]):
        customer = first.setdefault(line[0], line[2])
        if line[2] != customer:
            batch.rows["crm_sales_details"].append((*line[:2], customer, *line[3:]))
    _send(conn, batch, ingested_at)
    return {"crm_sales_details": len(batch.rows["crm_sales_details"])}


class _Known(NamedTuple):
    """What Bronze holds, each thing in its newest version."""

    customer_ids: list[int]
    products: list[tuple[str, str, str]]
    prices: dict[str, int]
    last_product_id: int
    lines: list[tuple[str, ...]]
    lines_by_arrival: list[tuple[str, ...]]


_NEWEST_LINES = """
select sls_ord_num, sls_prd_key, sls_cust_id, sls_order_dt, sls_ship_dt, sls_due_dt,
       sls_sales, sls_quantity, sls_price
  from (select distinct on (sls_ord_num, sls_prd_key)
               *, min(ingested_at) over (partition by sls_ord_num, sls_prd_key) as first_seen
          from bronze.crm_sales_details
         order by sls_ord_num, sls_prd_key, ingested_at desc, ctid desc) as newest
 order by first_seen, sls_ord_num, sls_prd_key
"""

_PRODUCTS = """
select distinct on (prd_key) prd_key, prd_nm, prd_line, coalesce(prd_cost::integer * 5 / 3, 25)
  from bronze.crm_prd_info
 order by prd_key, prd_start_dt desc, prd_id::integer desc
"""


def _known(conn: Connection[Any]) -> _Known:
    with conn.transaction(), conn.cursor(row_factory=tuple_row) as cur:
        ids = cur.execute(
            "select distinct cst_id::integer from bronze.crm_cust_info where cst_id is not null order by 1"
        ).fetchall()
        products = cur.execute(_PRODUCTS).fetchall()
        arrivals = cur.execute(_NEWEST_LINES).fetchall()
        last = cur.execute("select max(prd_id::integer) from bronze.crm_prd_info").fetchone()
    if not ids or not products or last is None:
        raise ValueError("bronze has no customers or no products yet: call generate() first")
    return _Known(
        customer_ids=[row[0] for row in ids],
        products=[row[:3] for row in products],
        prices={row[0][6:]: row[3] for row in products},
        last_product_id=last[0],
        lines=sorted(arrivals, key=lambda line: line[:2]),
        lines_by_arrival=arrivals,
    )


def _is_sound(line: Sequence[str | None]) -> bool:
    """True for a line whose amounts agree, so that a correction of its quantity alone makes sense."""
    amounts = line[6:9]
    if not all(value and value.isdigit() for value in amounts):
        return False
    sales, quantity, price = (int(str(value)) for value in amounts)
    return sales == quantity * price > 0


def _send(conn: Connection[Any], batch: Batch, ingested_at: datetime | None) -> None:
    """Append the batch to Bronze, in one transaction."""
    with conn.transaction(), conn.cursor() as cur:
        for table, columns in TABLES.items():
            names = columns if ingested_at is None else (*columns, "ingested_at")
            copy = pgsql.SQL("copy {} ({}) from stdin").format(
                pgsql.Identifier("bronze", table), pgsql.SQL(", ").join(map(pgsql.Identifier, names))
            )
            with cur.copy(copy) as out:
                for row in _stamped(batch.rows[table], ingested_at):
                    out.write_row(row)


def _stamped(
    rows: Iterable[Row], ingested_at: datetime | None
) -> Iterable[tuple[str | datetime | None, ...]]:
    if ingested_at is None:
        return rows
    return ((*row, ingested_at + timedelta(microseconds=index)) for index, row in enumerate(rows))
