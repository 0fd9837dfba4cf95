"""What can go wrong for a user, each with an exit code and no traceback."""

from __future__ import annotations

import json
from typing import Any

import psycopg


class B2SError(Exception):
    """A failure that a user can do something about: message, optional hint, exit code."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(B2SError):
    """The command line or the configuration is wrong (exit code 2)."""


class DatabaseError(B2SError):
    """The database is unreachable, or refused what was asked of it (exit code 3)."""

    exit_code = 3

    def __init__(
        self, message: str, hint: str | None = None, *, code: str | None = None, sqlstate: str | None = None
    ) -> None:
        super().__init__(message, hint)
        self.code = code
        self.sqlstate = sqlstate

    @classmethod
    def of(cls, error: psycopg.Error) -> DatabaseError:
        """The error of a server or of the way to it, in b2s's words where the server has none of its own."""
        diagnostic = error.diag
        if diagnostic.sqlstate is None:
            return cls(
                _first_line(error), "check --dsn, B2S_DSN or the PG* variables, and that the server runs"
            )
        hint = diagnostic.message_hint or _HINTS.get(diagnostic.sqlstate)
        message = diagnostic.message_primary or _first_line(error)
        return cls(message, hint, code=detail_of(error).get("code"), sqlstate=diagnostic.sqlstate)


_HINTS = {
    "3F000": "b2s is not installed in this database: b2s migrate",
    "42883": "b2s is not installed in this database, or an older release is: b2s migrate",
    "42P01": "b2s is not installed in this database, or an older release is: b2s migrate",
    "42501": "ask an administrator to grant your role etl_reader, etl_operator or etl_admin",
    "25006": "connect to the primary server: this one only reads",
    "57P01": "the server ended the session; see b2s status once it is back",
}


def detail_of(error: psycopg.Error) -> dict[str, Any]:
    """The JSON object that an error of b2s carries in DETAIL; empty for any other error."""
    try:
        found = json.loads(error.diag.message_detail or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: psycopg.Error) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
