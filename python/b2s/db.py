"""Connections: where the DSN comes from, and how every session of b2s is set up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import conninfo

from b2s.errors import DatabaseError, UsageError

Connection = psycopg.Connection[tuple[Any, ...]]


@contextmanager
def connect(dsn: str) -> Iterator[Connection]:
    """A session in autocommit mode, as the verbs that manage transactions need it.

    An empty dsn leaves everything to libpq: PG* variables, service file, password file.
    Raises UsageError for a malformed dsn; every database error inside the block becomes a DatabaseError.
    """
    try:
        with opened(dsn) as connection:
            yield connection
    except psycopg.Error as error:
        raise DatabaseError.of(error) from error


def opened(dsn: str) -> Connection:
    """The same session without an end, for who keeps it. Raises UsageError or DatabaseError."""
    try:
        parameters = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise UsageError(
            "the connection string is malformed",
            "write a URI (postgresql://user@host/database) or key=value pairs (host=... dbname=...)",
        ) from None
    parameters.setdefault("application_name", "b2s")
    parameters.setdefault("connect_timeout", "10")
    try:
        return psycopg.connect(conninfo.make_conninfo("", **parameters), autocommit=True)
    except psycopg.Error as error:
        raise DatabaseError.of(error) from error
