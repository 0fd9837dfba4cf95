"""What to run: the options that `b2s run` and `b2s plan` share, and the request they become."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

_CASTS: Final = {
    "mode": "text", "procedures": "text[]", "groups": "text[]", "tags": "text[]", "with_upstream": "boolean",
    "with_downstream": "boolean", "as_of": "timestamptz", "params": "jsonb", "transaction_scope": "text",
    "mv_refresh": "jsonb", "idempotency_key": "text", "confirm_full_refresh": "boolean",
    "approved_by": "text", "reason": "text", "max_concurrency": "int", "pipeline": "text",
}  # fmt: skip
"""The arguments of etl.start_run, each with its type."""
_NOT_FOR_PLANS: Final = ("idempotency_key",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a request."""
    what = parser.add_argument_group("what to run (their union; nothing: all)")
    what.add_argument("words", nargs="*", metavar="PROCEDURE", help="names of procedures")
    what.add_argument("--procedures", action="append", default=[], metavar="A,B", help="the same, repeatable")
    what.add_argument(
        "--groups", action="append", default=[], metavar="A,B", help="all members of these groups"
    )
    what.add_argument(
        "--tags", action="append", default=[], metavar="A,B", help="everything with one of these tags"
    )
    what.add_argument("--with-upstream", action="store_true", help="and everything they need")
    what.add_argument("--with-downstream", action="store_true", help="and everything that needs them")
    what.add_argument(
        "--pipeline",
        default=os.environ.get("B2S_PIPELINE"),
        metavar="NAME",
        help="which pipeline (B2S_PIPELINE)",
    )
    how = parser.add_argument_group("how to run it")
    how.add_argument("--mode", choices=("incremental", "full"), help="default: each procedure's own")
    how.add_argument("--as-of", metavar="TIME", help="read nothing that is newer, e.g. '2026-11-21 02:00+00'")
    how.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="PROCEDURE.NAME=VALUE",
        help="a parameter, e.g. silver.fact_sales.country=DE; repeatable",
    )
    how.add_argument(
        "--params", metavar="JSON", help='parameters by procedure: {"silver.fact_sales": {"country": "DE"}}'
    )
    how.add_argument(
        "--transaction-scope", choices=("per_procedure", "per_group"), help="override the configuration"
    )
    how.add_argument(
        "--mv-refresh", metavar="true|false|NAME,..", help="materialized views: all due, none, or these"
    )
    how.add_argument("--max-concurrency", type=int, metavar="N", help="override the configuration")
    full = parser.add_argument_group("a full refresh needs")
    full.add_argument("--confirm-full-refresh", action="store_true", help="your confirmation")
    full.add_argument("--reason", metavar="TEXT", help="a reason, which is kept with the run")
    full.add_argument(
        "--approved-by",
        metavar="NAME",
        help="who approved it (default: you); with approvals: two_person, who alone may",
    )


def request_of(arguments: argparse.Namespace, declared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments for etl.start_run that were given; `declared`: the parameters of each procedure.

    Raises UsageError for options that cannot be understood; whether they are valid, the database says.
    """
    request: dict[str, Any] = {
        "mode": arguments.mode,
        "procedures": _names([*arguments.words, *arguments.procedures]),
        "groups": _names(arguments.groups),
        "tags": _names(arguments.tags),
        "with_upstream": arguments.with_upstream or None,
        "with_downstream": arguments.with_downstream or None,
        "as_of": arguments.as_of,
        "params": _params(arguments.params, arguments.param, declared),
        "transaction_scope": arguments.transaction_scope,
        "mv_refresh": _mv_refresh(arguments.mv_refresh),
        "idempotency_key": getattr(arguments, "idempotency_key", None),
        "confirm_full_refresh": arguments.confirm_full_refresh or None,
        "approved_by": arguments.approved_by,
        "reason": arguments.reason,
        "max_concurrency": arguments.max_concurrency,
        "pipeline": arguments.pipeline,
    }
    return {name: value for name, value in request.items() if value is not None}


def call_arguments(request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A request as named SQL arguments (`mode => %(mode)s::text, ...`) and their values."""
    text = ", ".join(f"{name} => %({name})s::{_CASTS[name]}" for name in request)
    return text, {
        name: json.dumps(value) if _CASTS[name] == "jsonb" else value for name, value in request.items()
    }


def request_arguments(request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A request as SQL arguments of etl._request, which has no defaults."""
    whole = {name: request.get(name) for name in _CASTS}
    text = ", ".join(f"{name} => %({name})s::{cast}" for name, cast in _CASTS.items())
    return text, {
        name: json.dumps(value) if _CASTS[name] == "jsonb" and value is not None else value
        for name, value in whole.items()
    }


def without_key(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as etl.plan_run takes it."""
    return {name: value for name, value in request.items() if name not in _NOT_FOR_PLANS}


def params_of(words: Iterable[str], declared: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Words like PROCEDURE.NAME=VALUE as parameters by procedure, each value as its declaration has it."""
    return _params(None, words, declared) or {}


def _names(words: Iterable[str]) -> list[str] | None:
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    return list(dict.fromkeys(names)) or None


def _mv_refresh(text: str | None) -> bool | list[str] | None:
    if text is None:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return _names([text]) or []


def _params(
    text: str | None, single: Iterable[str], declared: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    from b2s.errors import UsageError

    params: Any = {}
    if text is not None:
        try:
            params = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--params is not JSON: {error}", _EXAMPLE_OF_PARAMS) from None
        if not isinstance(params, dict) or not all(isinstance(value, dict) for value in params.values()):
            raise UsageError("--params must be an object of objects", _EXAMPLE_OF_PARAMS)
    for word in single:
        place, equals, value = word.partition("=")
        procedure, dot, name = place.strip().rpartition(".")
        if "" in (equals, dot, procedure, name):
            raise UsageError(
                f"--param {word} is not PROCEDURE.NAME=VALUE",
                "for example: --param silver.fact_sales.country=DE",
            )
        declaration = declared.get(procedure, {}).get(name, {})
        params.setdefault(procedure, {})[name] = _typed(value, declaration)
    return params or None


_EXAMPLE_OF_PARAMS: Final = """for example: --params '{"silver.fact_sales": {"country": "DE"}}'"""


def _typed(value: str, declaration: Mapping[str, Any]) -> Any:
    """The value as its declaration has it; what does not fit stays text, and the database says why."""
    kind = declaration.get("type", "string")
    if kind == "array":
        items = declaration.get("items", {"type": "string"})
        if not value.lstrip().startswith("["):
            return [_typed(part.strip(), items) for part in value.split(",")] if value else []
    elif kind == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
