"""The files of a new project: an example that runs, to be replaced by what is yours."""

from __future__ import annotations

import json
from typing import Final

from b2s.scaffold.entry import HEADER, entry_lines, grants_sql
from b2s.scaffold.patterns import Column, Design, routine_sql, table_sql

_BRONZE: Final = """\
-- Bronze: what comes from outside, as it comes. Each row says when it arrived.

create schema if not exists bronze;
create schema if not exists silver;

create table if not exists bronze.customers (
  customer_id text,
  name text,
  country text,
  ingested_at timestamptz not null default now()
);
create index if not exists customers_ingested_at_idx on bronze.customers (ingested_at);
create index if not exists customers_customer_id_idx on bronze.customers (customer_id);

insert into bronze.customers (customer_id, name, country, ingested_at)
select v.customer_id, v.name, v.country, now() - interval '1 hour'
  from (values ('1', 'Ada', 'GB'), ('2', 'Grace', 'US'), ('3', 'Linus', 'FI')) v(customer_id, name, country)
 where not exists (select from bronze.customers);
"""
_IGNORED: Final = ".venv/\n__pycache__/\nimport-report.md\n"
_COLUMNS: Final = (
    Column("customer_id", "text"),
    Column("name", "text"),
    Column("country", "text"),
    Column("ingested_at", "timestamptz"),
)
EXAMPLE: Final = Design(
    routine="silver.load_dim_customers",
    target="silver.dim_customers",
    source="bronze.customers",
    pattern="upsert",
    strategy="timestamp",
    columns=_COLUMNS,
    key=("customer_id",),
    watermark="ingested_at",
)


def files(pipeline: str) -> dict[str, str]:
    """Path and text of each file of a new project."""
    from b2s.config import json_schema

    entry = entry_lines(EXAMPLE, "silver.dim_customers", "dimension", [], "One row per customer, the newest.")
    config = [
        HEADER.rstrip("\n"),
        f"pipeline: {pipeline}",
        "",
        "procedures:",
        *(f"  {line}" for line in entry),
    ]
    routine = [
        "-- silver.dim_customers: one row per customer, the newest.",
        table_sql(EXAMPLE),
        routine_sql(EXAMPLE),
        grants_sql(EXAMPLE),
    ]
    return {
        "transformations.yaml": "\n".join(config) + "\n",
        "transformations.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        "sql/bronze.sql": _BRONZE,
        "sql/silver.dim_customers.sql": "\n\n".join(routine) + "\n",
        ".gitignore": _IGNORED,
    }
