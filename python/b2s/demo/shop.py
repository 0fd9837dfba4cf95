"""The rows of a small bicycle shop: what its CRM and its ERP send, with the errors such systems have.

Everything is decided by the seed: the same call gives the same rows on every machine. No database is needed.
Every planted error is listed as a `Fault`, with what Silver must make of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import cycle
from random import Random

__all__ = ["TABLES", "Batch", "Fault", "build"]

Row = tuple[str | None, ...]

TABLES: Mapping[str, tuple[str, ...]] = {
    "crm_cust_info": (
        "cst_id", "cst_key", "cst_firstname", "cst_lastname", "cst_marital_status", "cst_gndr",
        "cst_create_date",
    ),
    "crm_prd_info": ("prd_id", "prd_key", "prd_nm", "prd_cost", "prd_line", "prd_start_dt", "prd_end_dt"),
    "crm_sales_details": (
        "sls_ord_num", "sls_prd_key", "sls_cust_id", "sls_order_dt", "sls_ship_dt", "sls_due_dt",
        "sls_sales", "sls_quantity", "sls_price",
    ),
    "erp_cust_az12": ("cid", "bdate", "gen"),
    "erp_loc_a101": ("cid", "cntry"),
    "erp_px_cat_g1v2": ("id", "cat", "subcat", "maintenance"),
}  # fmt: skip
"""The Bronze tables and the columns a source system fills, in order."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted error: its Silver row, and what that row must say (None: it must not exist)."""

    kind: str
    table: str
    key: Mapping[str, str]
    expected: Mapping[str, str | None] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One delivery: the rows of each Bronze table in the order they are sent, and the faults among them."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {table: [] for table in TABLES})
    faults: list[Fault] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rows per Bronze table."""
        return {table: len(rows) for table, rows in self.rows.items()}


FIRST_NAMES = (
    "Ada", "Ben", "Chloe", "David", "Elena", "Felix", "Grace", "Henry", "Ines", "Jonas", "Karin", "Liam",
    "Mona", "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tara", "Umar", "Vera", "Wanda", "Yusuf",
)  # fmt: skip
LAST_NAMES = (
    "Alvarez", "Brown", "Chen", "Diaz", "Evans", "Fischer", "Garcia", "Huang", "Ito", "Jensen", "King",
    "Lopez", "Moreau", "Nguyen", "Olsen", "Patel", "Reed", "Schmidt", "Torres", "Walker", "Xu", "Young",
)  # fmt: skip
COUNTRIES: Mapping[str, tuple[str, ...]] = {
    "Australia": ("Australia", "AU", " Australia "),
    "Canada": ("Canada", "CA"),
    "France": ("France", "FR", "france"),
    "Germany": ("Germany", "DE", "GERMANY"),
    "United Kingdom": ("United Kingdom", "UK"),
    "United States": ("United States", "US", "USA", "U.S.A."),
}
CATEGORIES: tuple[tuple[str, str, str, str], ...] = (
    ("AC_HE", "Accessories", "Helmets", "Yes"),
    ("AC_LI", "Accessories", "Lights", "Yes"),
    ("AC_TT", "Accessories", "Tires and Tubes", "Yes"),
    ("BI_MB", "Bikes", "Mountain Bikes", "Yes"),
    ("BI_RB", "Bikes", "Road Bikes", "Yes"),
    ("BI_TB", "Bikes", "Touring Bikes", "Yes"),
    ("CL_GL", "Clothing", "Gloves", "No"),
    ("CL_JE", "Clothing", "Jerseys", "No"),
    ("CO_FR", "Components", "Frames", "Yes"),
    ("CO_WH", "Components", "Wheels", "Yes"),
)
LINES: Mapping[str, str] = {"M": "Mountain", "R": "Road", "S": "Other sales", "T": "Touring"}
STATUS: Mapping[str, str] = {"S": "Single", "M": "Married"}
GENDERS: Mapping[str, str] = {"F": "Female", "M": "Male"}

CUSTOMER_FAULTS = (
    "padded_name", "blank_gender", "stray_gender", "stray_marital_status", "older_duplicate",
    "future_birth_date", "erp_prefix", "country_variant", "blank_country", "no_customer_number",
)  # fmt: skip
SALES_FAULTS = (
    "zero_date", "short_date", "impossible_date", "wrong_total", "missing_total", "negative_total",
    "negative_price", "missing_price", "zero_quantity", "sent_twice", "corrected_later",
)  # fmt: skip


def build(seed: int = 42, customers: int = 500, products: int = 60, orders: int = 2000) -> Batch:
    """The first delivery. Raises ValueError when there would be no customer or no product to order."""
    if customers < 1 or products < 1 or orders < 0:
        raise ValueError("customers and products must be at least 1, orders at least 0")
    rng = seeded(seed)
    batch = Batch()
    add_categories(batch)
    prices = add_products(batch, rng, products)
    ids = range(11000, 11000 + customers)
    add_customers(batch, rng, ids)
    add_orders(batch, rng, range(50001, 50001 + orders), ids, prices, date(2024, 1, 1), 730)
    return batch


def seeded(seed: int) -> Random:
    return Random(seed)  # noqa: S311  reproducible on purpose, nothing secret


def customer_key(customer_id: int) -> str:
    return f"AW{customer_id:08d}"


def erp_key(customer_id: int) -> str:
    return f"AW-{customer_id:08d}"


def _faulty(rng: Random, size: int, kinds: Sequence[str], share: float) -> dict[int, str]:
    """Which of `size` rows are faulty, and how: about `share` of them, each kind once if there is room."""
    count = min(size, max(len(kinds), round(size * share)))
    return dict(zip(rng.sample(range(size), count), cycle(kinds), strict=False))


def add_categories(batch: Batch) -> None:
    for row in CATEGORIES:
        batch.rows["erp_px_cat_g1v2"].append(row)
    padded = ("CL_SH ", " Clothing", "Shorts ", "No ")
    batch.rows["erp_px_cat_g1v2"].append(padded)
    batch.faults.append(
        Fault(
            "padded_category", "silver.dim_categories", {"category_id": "CL_SH"},
            {"category": "Clothing", "subcategory": "Shorts", "has_maintenance": "false"},
        )
    )  # fmt: skip


def add_products(batch: Batch, rng: Random, products: int) -> dict[str, int]:
    """Products, a third of them with an earlier version. Returns the price of each product number."""
    prices: dict[str, int] = {}
    prd_id = 200
    no_cost = set(rng.sample(range(products), max(1, products // 30)))
    for index in range(products):
        category, _, subcategory, _ = CATEGORIES[index % len(CATEGORIES)]
        number = f"{category[3:]}-{100 + index}-{rng.choice((38, 42, 46, 50))}"
        line = rng.choice("MRST")
        price = 5 * rng.randint(2, 400)
        prices[number] = price
        key = f"{category.replace('_', '-')}-{number}"
        name = f"{subcategory.removesuffix('s')} {100 + index}"
        table, where = "silver.dim_products", {"product_id": str(prd_id)}
        if index % 3 == 0:
            wrong_end = "2022-06-30"  # before the version begins, as the source really does it
            batch.rows["crm_prd_info"].append(
                (str(prd_id), key, name, str(price * 3 // 5), f"{line} ", "2023-01-01", wrong_end)
            )
            batch.faults.append(Fault("wrong_end_date", table, where, {"valid_to": "2023-12-31"}))
            batch.faults.append(Fault("padded_line", table, where, {"product_line": LINES[line]}))
            prd_id += 1
            where = {"product_id": str(prd_id)}
        cost = None if index in no_cost else str(price * 3 // 5)
        batch.rows["crm_prd_info"].append((str(prd_id), key, name, cost, line, "2024-01-01", None))
        if cost is None:
            batch.faults.append(Fault("missing_cost", table, where, {"cost": "0.00", "valid_to": None}))
        prd_id += 1
    return prices


def add_customers(batch: Batch, rng: Random, ids: Sequence[int]) -> None:
    """Customers of the CRM, and what the ERP knows of them."""
    faulty = _faulty(rng, len(ids), CUSTOMER_FAULTS, 0.2)
    for index, cid in enumerate(ids):
        first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
        status, gender = rng.choice("SM"), rng.choice("FM")
        born = (date(1950, 1, 1) + timedelta(days=rng.randrange(18000))).isoformat()
        created = date(2024, 1, 1) + timedelta(days=rng.randrange(700))
        country = rng.choice(list(COUNTRIES))
        crm: list[str | None] = [
            str(cid),
            customer_key(cid),
            first,
            last,
            status,
            gender,
            created.isoformat(),
        ]
        erp: list[str | None] = [customer_key(cid), born, GENDERS[gender]]
        location: list[str | None] = [erp_key(cid), country]
        kind = faulty.get(index, "")
        expected: dict[str, str | None] | None = None
        table, where = "silver.dim_customers", {"customer_id": str(cid)}
        match kind:
            case "padded_name":
                crm[2], crm[3] = f" {first}", f"{last}  "
                expected = {"first_name": first, "last_name": last}
            case "blank_gender":
                crm[5] = None
                expected = {"gender": GENDERS[gender]}
            case "stray_gender":
                crm[5], erp[2] = f"{gender.lower()} ", GENDERS["F" if gender == "M" else "M"]
                expected = {"gender": GENDERS[gender]}
            case "stray_marital_status":
                crm[4] = "?"
                expected = {"marital_status": "n/a"}
            case "future_birth_date":
                erp[1] = rng.choice(("2980-03-09", "9999-09-13"))
                expected = {"birth_date": None}
            case "erp_prefix":
                erp[0] = f"NAS{customer_key(cid)}"
                expected = {"birth_date": born}
            case "country_variant":
                location[1] = rng.choice(COUNTRIES[country][1:])
                table, where = "silver.dim_locations", {"customer_key": customer_key(cid)}
                expected = {"country": country}
            case "blank_country":
                location[1] = rng.choice((None, "  "))
                table, where = "silver.dim_locations", {"customer_key": customer_key(cid)}
                expected = {"country": "n/a"}
            case "older_duplicate":
                expected = {"first_name": first, "created_on": created.isoformat()}
            case "no_customer_number":
                lost = f"LOST{cid}"
                batch.rows["crm_cust_info"].append((None, lost, None, None, None, None, None))
                batch.faults.append(Fault(kind, table, {"customer_key": lost}, None))
        batch.rows["crm_cust_info"].append(tuple(crm))
        if kind == "older_duplicate":  # an incomplete version from two days before, sent after the newer one
            older = (created - timedelta(days=2)).isoformat()
            batch.rows["crm_cust_info"].append((str(cid), customer_key(cid), None, last, None, None, older))
        batch.rows["erp_cust_az12"].append(tuple(erp))
        batch.rows["erp_loc_a101"].append(tuple(location))
        if expected is not None:
            batch.faults.append(Fault(kind, table, where, expected))


def add_orders(
    batch: Batch,
    rng: Random,
    numbers: Sequence[int],
    customer_ids: Sequence[int],
    prices: Mapping[str, int],
    first_day: date,
    days: int,
) -> None:
    """Orders of one to four lines, the orders in the sequence of their dates."""
    lines: list[Row] = []
    for number, day in zip(numbers, sorted(rng.randrange(days) for _ in numbers), strict=True):
        ordered = first_day + timedelta(days=day)
        dates = [f"{ordered + timedelta(days=later):%Y%m%d}" for later in (0, 7, 12)]
        customer = str(rng.choice(customer_ids))
        for product in rng.sample(sorted(prices), min(len(prices), rng.choice((1, 1, 2, 3, 4)))):
            quantity = rng.choice((1, 1, 1, 2, 3))
            price = prices[product]
            lines.append(
                (f"SO{number}", product, customer, *dates, str(quantity * price), str(quantity), str(price))
            )
    faulty = _faulty(rng, len(lines), SALES_FAULTS, 0.05)
    for index, line in enumerate(lines):
        if index in faulty:
            batch.rows["crm_sales_details"].extend(_spoiled(line, faulty[index]))
            batch.faults.append(_sales_fault(line, faulty[index]))
        else:
            batch.rows["crm_sales_details"].append(line)


def _with(line: Row, **values: str | None) -> Row:
    names = TABLES["crm_sales_details"]
    return tuple(values.get(name, value) for name, value in zip(names, line, strict=True))


_SPOIL: Mapping[str, Callable[[Row], list[Row]]] = {
    "zero_date": lambda line: [_with(line, sls_order_dt="0")],
    "short_date": lambda line: [_with(line, sls_order_dt=str(line[3])[:5])],
    "impossible_date": lambda line: [_with(line, sls_order_dt=f"{str(line[3])[:4]}1301")],
    "wrong_total": lambda line: [_with(line, sls_sales=str(int(str(line[6])) + 7))],
    "missing_total": lambda line: [_with(line, sls_sales=None)],
    "negative_total": lambda line: [_with(line, sls_sales=f"-{line[6]}")],
    "negative_price": lambda line: [_with(line, sls_price=f"-{line[8]}")],
    "missing_price": lambda line: [_with(line, sls_price=None)],
    "zero_quantity": lambda line: [_with(line, sls_quantity="0")],
    "sent_twice": lambda line: [line, line],
    "corrected_later": lambda line: [_with(line, sls_quantity="10", sls_sales=f"{line[8]}0"), line],
}


def _spoiled(line: Row, kind: str) -> list[Row]:
    """What the source sends instead of `line`."""
    return _SPOIL[kind](line)


def _sales_fault(line: Row, kind: str) -> Fault:
    order, product, customer, ordered, _, _, total, quantity, price = (str(value) for value in line)
    repaired = {
        "zero_date": "order_date", "short_date": "order_date", "impossible_date": "order_date",
        "wrong_total": "sales_amount", "missing_total": "sales_amount", "negative_total": "sales_amount",
        "negative_price": "unit_price", "missing_price": "unit_price", "zero_quantity": "quantity",
    }.get(kind, "")  # fmt: skip
    expected: dict[str, str | None] = {
        "customer_id": customer,
        "order_date": None if repaired == "order_date" else f"{ordered[:4]}-{ordered[4:6]}-{ordered[6:]}",
        "quantity": quantity,
        "unit_price": f"{price}.00",
        "sales_amount": f"{total}.00",
        "repairs": f"{{{repaired}}}",
    }
    return Fault(kind, "silver.fact_sales", {"order_number": order, "product_number": product}, expected)
