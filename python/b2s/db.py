"""Connections: where the DSN comes from, and how every session of b2s is set up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import conninfo

from b2s.errors import DatabaseError, UsageError

Connection = psycopg.Connection[tuple[Any, ...]]


def parameters_of(dsn: str) -> dict[str, Any]:
    """A connection string, taken apart. Raises UsageError for a malformed one, and does not tell it.

    Where the password of a URI has characters that should have been encoded, libpq takes a part of it for a
    host or a port, and would tell it in its errors.
    """
    try:
        parameters = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise UsageError("the connection string is malformed", _HOW_TO_WRITE_IT) from None
    place = f"{parameters.get('host') or ''}{parameters.get('dbname') or ''}" if "://" in dsn else ""
    ports = str(parameters.get("port") or "0").split(",")
    if "@" in place or not all(port.strip().isdecimal() for port in ports if port.strip()):
        raise UsageError(
            "the connection string is malformed: it has an @ or a : where none belongs",
            "in a URI, special characters of a password are percent-encoded: @ is %40, : is %3A, / is %2F",
        )
    return parameters


_HOW_TO_WRITE_IT: Final = (
    "write a URI (postgresql://user@host/database) or key=value pairs (host=... dbname=...)"
)


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
    parameters = parameters_of(dsn)
    parameters.setdefault("application_name", "b2s")
    parameters.setdefault("connect_timeout", "10")
    # Nothing is prepared: a routine of the team could put a statement of its own in the place of one that
    # this login executes again.
    try:
        return psycopg.connect(
            conninfo.make_conninfo("", **parameters), autocommit=True, prepare_threshold=None
        )
    except psycopg.Error as error:
        raise DatabaseError.of(error) from error
