"""The worked pipeline: tables and routines (`bronze.sql`, `silver.sql`), and data (`b2s.demo.generate`).

`install(conn)` creates schemas, tables, routines and materialized views; it can be called again at any time.
"""

from importlib.resources import files
from typing import Any

from psycopg import Connection

__all__ = ["install", "sql"]


def sql(name: str) -> str:
    """The text of `bronze.sql` or `silver.sql`."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def install(conn: Connection[Any]) -> None:
    """Create or update bronze, silver and mart in one transaction.

    The role `etl_owner` must exist (`b2s migrate` creates it), and the session must be a superuser or a
    member of it. Raises `psycopg.Error` as the server reports it; nothing is changed then.
    """
    with conn.transaction():
        for name in ("bronze.sql", "silver.sql"):
            conn.execute(sql(name).encode())
