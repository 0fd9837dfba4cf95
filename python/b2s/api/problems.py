"""Errors as RFC 9457 documents (application/problem+json) that carry the stable codes of docs/errors.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import psycopg
from psycopg_pool import PoolClosed, PoolTimeout, TooManyRequests
from starlette.responses import JSONResponse, Response

from b2s.errors import detail_of

MEDIA_TYPE: Final = "application/problem+json"
_RETRY: Final = {"Retry-After": "1"}
_AWAY: Final = ("08", "57P", "28", "3D", "53", "25006")
"""SQLSTATEs, or how they begin: the database is away, full, or does not let the front end in."""
_BUSY: Final = ("40001", "40P01", "55P03")
_UNREADABLE: Final = ("22", "54001")


@dataclass(slots=True)
class Problem(Exception):
    """A request that is answered with an error."""

    status: int
    code: str
    message: str
    hint: str | None = None
    errors: Sequence[Mapping[str, Any]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The body of the response."""
        found: dict[str, Any] = {
            "type": f"urn:b2s:error:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.message,
            "code": self.code,
        }
        if self.hint:
            found["hint"] = self.hint
        if self.errors:
            found["errors"] = [dict(one) for one in self.errors]
        return found

    def response(self) -> Response:
        """The response itself."""
        return JSONResponse(self.document(), self.status, dict(self.headers), MEDIA_TYPE)


def invalid(errors: Sequence[Mapping[str, Any]], hint: str | None = None) -> Problem:
    """A request that does not have the form of one: 422 request.invalid with every problem found."""
    message = "; ".join(str(one["message"]) for one in errors)
    return Problem(422, "request.invalid", message, hint, errors)


def of_database(error: psycopg.Error) -> Problem:
    """What an error of the database, or of the way to it, means for whoever asked.

    An error that is none of b2s's own is told without its text, which may hold names and values.
    """
    if isinstance(error, TooManyRequests):
        return Problem(503, "api.busy", "too many requests wait for the database", headers=_RETRY)
    if isinstance(error, PoolTimeout | PoolClosed):
        return _away()
    sqlstate = error.sqlstate or ""
    if sqlstate.startswith("PT4"):
        found = detail_of(error)
        errors = found.get("errors", ())
        return Problem(
            int(sqlstate[2:]),
            str(found.get("code", "request.refused")),
            error.diag.message_primary or "",
            error.diag.message_hint,
            [one for one in errors if isinstance(one, dict)] if isinstance(errors, list) else (),
        )
    if sqlstate == "42501":
        return Problem(403, "role.not_granted", "your role may not do that", "ask for another role")
    if sqlstate == "57014":
        return Problem(504, "api.timeout", "the database did not answer in time", headers=_RETRY)
    if sqlstate in _BUSY:
        return Problem(503, "database.busy", "the database is busy with the same rows", headers=_RETRY)
    if sqlstate.startswith(_UNREADABLE):
        return Problem(422, "request.invalid", f"the request holds a value that is out of range ({sqlstate})")
    if sqlstate in ("3F000", "42883", "42P01"):
        return Problem(
            503, "database.not_installed", "the database has no b2s, or an older one", "b2s migrate"
        )
    if isinstance(error, psycopg.OperationalError) or sqlstate.startswith(_AWAY):
        return _away()
    return _internal()


def _away() -> Problem:
    return Problem(503, "database.unavailable", "the database cannot be reached", headers=_RETRY)


def _internal() -> Problem:
    return Problem(500, "internal", "the request failed; the log of the API says why")
