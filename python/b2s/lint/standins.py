"""Stand-ins for the types that libpg_query does not know, so that a PL/pgSQL body can be parsed all the same.

It resolves the types of pg_catalog only. A type of the user becomes a record or text, whichever the body
needs. The number of lines stays; everything else is looked up in the text as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from b2s.lint.model import Argument, Routine
from b2s.lint.parser import SqlError, Token, parse_plpgsql, tokens_of

_ATTEMPTS: Final = 12
_NOT_SCALAR: Final = re.compile(r'"([^".]+)" is not a scalar variable|variable "([^"]+)" has pseudo-type')
_NOT_RECORD: Final = re.compile(r'"([^".]+)\.[^"]*" is not a known variable|"([^".]+)" is not a record')
_KEPT: Final = frozenset({"pg_catalog", "public"})


def parse_body(routine: Routine, body: str, returns: str) -> dict[str, Any]:
    """Parses a body, and again with other types while the only complaint is about a type that is a
    stand-in.
    """
    masks = _Masks(body)
    arguments = {one.name: _argument_type(one) for one in routine.arguments if one.name}
    for _ in range(_ATTEMPTS):
        try:
            return parse_plpgsql(_create(routine, arguments, returns, masks.apply(body)))
        except SqlError as error:
            scalar, record = _NOT_SCALAR.search(error.message), _NOT_RECORD.search(error.message)
            match, wanted = (scalar, "text") if scalar else (record, "b2s_record")
            if match is None:
                raise
            name = match[1] or match[2]
            if arguments.get(name, wanted) != wanted:
                arguments[name] = wanted
            elif not masks.change(name, wanted):
                raise
    raise SqlError("the types of its variables cannot be made out")


def _argument_type(argument: Argument) -> str:
    base = argument.type.removesuffix("[]")
    is_known = re.fullmatch(r"(pg_catalog\.)?[a-z_][a-z0-9_ ]*", base) and base.split(".")[-1] in _BUILTIN
    if not is_known:
        return "text[]" if argument.type.endswith("[]") else "text"
    return argument.type


_BUILTIN: Final = frozenset(
    [
        "text",
        "bool",
        "boolean",
        "int2",
        "int4",
        "int8",
        "smallint",
        "integer",
        "int",
        "bigint",
        "numeric",
        "float4",
        "float8",
        "date",
        "time",
        "timetz",
        "timestamp",
        "timestamptz",
        "interval",
        "json",
        "jsonb",
        "uuid",
        "bytea",
        "varchar",
        "bpchar",
        "char",
        "name",
        "oid",
        "xid8",
        "pg_snapshot",
        "regclass",
        "regproc",
        "regtype",
        "regrole",
        "inet",
        "cidr",
        "record",
        "refcursor",
    ]
)


def _create(routine: Routine, arguments: dict[str, str], returns: str, body: str) -> str:
    """A synthetic CREATE whose body begins as the true one does."""
    tag = "$b2s_body$"
    while tag in body:
        tag = f"{tag[:-1]}_$"
    modes = {"i": "in", "o": "out", "b": "inout", "v": "in", "t": "out"}
    shown = ", ".join(
        f"{modes[one.mode]} {_quoted(one.name)} {arguments[one.name] if one.name else _argument_type(one)}"
        for one in routine.arguments
        if one.mode != "t"
    )
    return f"create {routine.kind} b2s_routine({shown}) {returns} language plpgsql as {tag}{body}{tag}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if name else ""


class _Masks:
    """The types of declared variables that libpg_query does not know, each with what stands in for it."""

    def __init__(self, body: str) -> None:
        self._types: dict[int, tuple[int, str]] = {}
        self._names: dict[str, list[int]] = {}
        for name, tokens in _declarations(tokens_of(body)):
            if not tokens:
                continue
            start, end = tokens[0].start, tokens[-1].end
            self._names.setdefault(name, []).append(start)
            text = body[start:end]
            self._types[start] = (end, _stand_in(text))

    def change(self, name: str, wanted: str) -> bool:
        """Gives a variable another stand-in; False when it has it already, or is none."""
        is_changed = False
        for start in self._names.get(name, ()):
            end, known = self._types[start]
            if known != wanted:
                self._types[start] = (end, wanted)
                is_changed = True
        return is_changed

    def apply(self, body: str) -> str:
        """The body with stand-ins; the number of lines stays."""
        parts, done = [], 0
        for start, (end, stand_in) in sorted(self._types.items()):
            parts += [
                body[done:start],
                stand_in,
                "\n" * (body.count("\n", start, end) - stand_in.count("\n")),
            ]
            done = end
        return "".join([*parts, body[done:]])


def _stand_in(text: str) -> str:
    bare = re.sub(r"\s+", "", text.lower()).replace('"', "")
    base = bare.split("[")[0].removesuffix("array")
    if base.endswith("%rowtype"):
        return "b2s_record"
    is_qualified = "." in base and not base.endswith("%type") and base.split(".")[0] not in _KEPT
    if (bare != base and base not in _BUILTIN) or base.endswith("%type[]"):
        return "text[]"
    return "b2s_record" if is_qualified else text


def _declarations(tokens: list[Token]) -> Iterator[tuple[str, list[Token]]]:
    """Each declared variable with the tokens of its type."""
    index = 0
    while index < len(tokens):
        if tokens[index].kind != "DECLARE":
            index += 1
            continue
        index += 1
        while index < len(tokens) and tokens[index].kind != "BEGIN_P":
            end = index
            while end < len(tokens) and tokens[end].text != ";":
                end += 1
            yield from _declaration(tokens[index:end])
            index = end + 1
            if index < len(tokens) and tokens[index].kind == "DECLARE":
                index += 1


def _declaration(tokens: list[Token]) -> Iterator[tuple[str, list[Token]]]:
    words = [token.text.lower() for token in tokens]
    if len(tokens) < 2 or "cursor" in words[1:4] or "alias" in words[1:2]:
        return
    begin = 2 if words[1] == "constant" else 1
    end = begin
    while end < len(tokens) and words[end] not in (":=", "=", "default", "not", "collate"):
        end += 1
    yield words[0].strip('"'), tokens[begin:end]
