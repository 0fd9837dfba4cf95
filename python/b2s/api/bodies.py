"""What a request says, read and checked for its form; what it means is the database's to judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request

from b2s.api.problems import Problem, invalid

DEEPEST: Final = 32
"""How deep a document may be nested."""

_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= 255


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_TEXT: Final = ("is a text", _is_text)
_NAME: Final = ("is a text of 1 to 255 characters", _is_name)
_FLAG: Final = ("is true or false", _is_flag)
_NAMES: Final = ("is a list of names", _is_names)
RUN_FIELDS: Final[Mapping[str, tuple[str, _Check]]] = {
    "mode": _TEXT, "procedures": _NAMES, "groups": _NAMES, "tags": _NAMES, "with_upstream": _FLAG,
    "with_downstream": _FLAG, "as_of": ("is a time like 2026-11-21T02:00:00Z", _is_text),
    "params": ("is an object of objects", lambda value: isinstance(value, dict)), "transaction_scope": _TEXT,
    "mv_refresh": ("is true, false or a list of names", lambda value: _is_flag(value) or _is_names(value)),
    "idempotency_key": _NAME, "confirm_full_refresh": _FLAG, "approved_by": _NAME, "reason": _TEXT,
    "max_concurrency": (
        "is a whole number from 1 to 64",
        lambda value: not isinstance(value, bool) and value in range(1, 65),
    ),
    "pipeline": _TEXT, "dry_run": _FLAG,
}  # fmt: skip
CANCEL_FIELDS: Final[Mapping[str, tuple[str, _Check]]] = {"reason": _TEXT, "force": _FLAG}
APPROVE_FIELDS: Final[Mapping[str, tuple[str, _Check]]] = {"reason": _TEXT}


async def read_object(
    request: Request, fields: Mapping[str, tuple[str, _Check]], limit: int
) -> dict[str, Any]:
    """The JSON object in the body, without its nulls; no body at all is an empty one.

    Raises Problem: 400 for what is no JSON, 413, 415, and 422 with every field that is wrong.
    """
    content = await _content(request, limit)
    if not content.strip():
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Problem(415, "request.media_type", "the body has to be application/json")
    document = _parse(content)
    if not isinstance(document, dict):
        raise invalid([_error((), "the body is a JSON object")])
    given = {name: value for name, value in document.items() if value is not None}
    problems = [
        _error(
            (name,), f"{name[:100]} {fields[name][0] if name in fields else 'is no field of this request'}"
        )
        for name, value in given.items()
        if name not in fields or not fields[name][1](value)
    ]
    problems += [_error(path, message) for path, message in _unstorable(given)]
    if problems:
        raise invalid(problems, f"its fields are {', '.join(fields)}")
    return given


async def _content(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > 12 or int(length) > limit):
        raise _too_large(limit)
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise Problem(400, "request.malformed", "the body ended early") from None
    return bytes(content)


def _too_large(limit: int) -> Problem:
    return Problem(
        413, "request.too_large", f"the body may have {limit} bytes", headers={"Connection": "close"}
    )


def _parse(content: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError
        return found

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Problem(400, "request.malformed", "the body is not JSON, or names a field twice") from None


def _unstorable(document: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What Postgres cannot keep: text with a zero character or half a one, and what is nested too deep."""
    stack: list[tuple[tuple[str, ...], Any, int]] = [((name,), value, 1) for name, value in document.items()]
    stack += [((), name, 0) for name in document]
    while stack:
        path, value, depth = stack.pop()
        if depth > DEEPEST:
            yield path, f"{path[0]} is nested more than {DEEPEST} deep"
            return
        if isinstance(value, dict):
            stack += [(path, one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, list):
            stack += [(path, one, depth + 1) for one in value]
        elif isinstance(value, str) and not _is_storable(value):
            yield (
                path,
                f"{path[0] if path else 'the body'} holds a character that no text in Postgres can have",
            )
            return


def _is_storable(text: str) -> bool:
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _error(path: tuple[str, ...], message: str) -> dict[str, Any]:
    return {"loc": list(path), "code": "request.invalid", "message": message}


LIST_PARAMETERS: Final[Mapping[str, str]] = {
    "pipeline": "text", "status": "text[]", "kind": "text", "procedure": "text", "requested_by": "text",
    "since": "timestamptz", "until": "timestamptz", "before": "bigint", "page_size": "int",
}  # fmt: skip
"""The parameters of a page of runs, each with its type in etl.list_runs."""


def read_query(query: QueryParams, known: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of the query string. A list is repeated or has commas. Raises Problem 422."""
    found: dict[str, Any] = {}
    problems = []
    for name in dict.fromkeys(query):
        values = query.getlist(name)
        if name not in known:
            problems.append(_error((name,), f"there is no parameter {name[:100]}"))
        elif not all(_is_storable(value) for value in values):
            problems.append(_error((name,), f"{name} holds a character that no text in Postgres can have"))
        elif known[name] == "text[]":
            found[name] = [part for value in values for part in value.split(",")]
        elif len(values) > 1:
            problems.append(_error((name,), f"{name} is given once"))
        elif known[name] in ("bigint", "int") and not (number := _number(values[0], known[name])):
            problems.append(_error((name,), f"{name} is a whole number above 0"))
        else:
            found[name] = number if known[name] in ("bigint", "int") else values[0]
    if problems:
        raise invalid(problems, f"the parameters are {', '.join(known)}")
    return found


def _number(text: str, kind: str) -> int | None:
    largest = 2**63 - 1 if kind == "bigint" else 2**31 - 1
    is_number = text.isascii() and text.isdecimal() and len(text) < 20 and 0 < int(text) <= largest
    return int(text) if is_number else None
