"""From a source to its routines: CREATE FUNCTION and CREATE PROCEDURE, whichever way the body is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from b2s.lint.model import Argument, Expr, Routine, Stmt
from b2s.lint.parser import SqlError, kind, parse, tokens_of
from b2s.lint.plpgsql import read_body
from b2s.lint.sources import Source
from b2s.lint.sqltext import Piece, pieces

_QUOTED: Final = re.compile(r"(?:[eE])?'")
_DOLLAR: Final = re.compile(r"\$(?:[a-zA-Z_\x80-\uffff]\w*)?\$")
_MODES: Final = {"d": "i", "i": "i", "o": "o", "b": "b", "v": "v", "t": "t"}


@dataclass(slots=True)
class Parsed:
    """What a source holds: routines, other statements, and what could not be read."""

    source: Source
    routines: list[Routine] = field(default_factory=list)
    statements: list[Expr] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)

    @property
    def all_failures(self) -> list[tuple[int, str]]:
        """What could not be read, inside routines and outside."""
        return [*self.failures, *(one for routine in self.routines for one in routine.failures)]


def read(source: Source) -> Parsed:
    """Reads a source; what cannot be parsed is recorded, never raised."""
    parsed = Parsed(source)
    for piece in pieces(source.text):
        if piece.failure is not None:
            parsed.failures.append((piece.failure_offset, piece.failure))
        elif kind(piece.node) == "CreateFunctionStmt":
            parsed.routines.append(_routine(source, piece))
        else:
            parsed.statements.append(Expr(piece.node, _shifted(piece.offset), piece.offset))
    return parsed


def _routine(source: Source, piece: Piece) -> Routine:
    node = piece.node
    names = [part.sval for part in node.funcname]
    options: dict[str, list[Any]] = {}
    for option in node.options or ():
        options.setdefault(option.defname, []).append(option)
    routine = Routine(
        source=source,
        offset=piece.offset,
        schema=names[-2] if len(names) > 1 else "",
        name=names[-1],
        kind="procedure" if node.is_procedure else "function",
        language=options["language"][0].arg.sval.lower() if "language" in options else "sql",
        arguments=[_argument(one, piece.offset) for one in node.parameters or ()],
        returns=type_name(node.returnType) if node.returnType else None,
        returns_set=bool(node.returnType and node.returnType.setof),
        is_definer=any(option.arg.boolval for option in options.get("security", ())),
        search_path=_search_path(options.get("set", [])),
        is_bound=bool(node.sql_body),
    )
    if node.sql_body:
        _read_bound(routine, piece)
    elif "as" in options and routine.language in ("sql", "plpgsql"):
        _read_text(routine, piece, options["as"][0])
    return routine


def _argument(node: Any, shift: int) -> Argument:
    mode = _MODES.get(node.mode.value, "i")
    return Argument(
        node.name or "",
        type_name(node.argType),
        mode,
        node.defexpr is not None,
        shift + max(node.location or 0, 0),
    )


def type_name(node: Any) -> str:
    """A type as text, without schema pg_catalog and without modifiers: int8, text[], silver.state."""
    name = ".".join(part.sval for part in node.names if part.sval != "pg_catalog")
    if node.pct_type:
        name += "%type"
    return name + "[]" * len(node.arrayBounds or ())


def _search_path(options: list[Any]) -> tuple[str, ...] | None:
    for option in options:
        if getattr(option.arg, "name", None) == "search_path":
            values: list[Any] = [getattr(one, "val", None) for one in option.arg.args or ()]
            return tuple(value.sval for value in values if hasattr(value, "sval"))
    return None


# -- bodies --


def _read_bound(routine: Routine, piece: Piece) -> None:
    """A body that was parsed with its CREATE: BEGIN ATOMIC ... END, or RETURN expression."""

    def place(location: int) -> int:
        return location + piece.offset

    begins = _bound_statements(piece.text)
    for node in _flat(piece.node.sql_body):
        expr = Expr(node, place, routine.offset)
        first = expr.offset_of(node)
        expr.offset = max(
            (piece.offset + one for one in begins if piece.offset + one <= first), default=first
        )
        routine.statements.append(Stmt("execsql", expr.offset, [expr]))


def _bound_statements(text: str) -> list[int]:
    """Where the statements of a BEGIN ATOMIC body begin: behind ATOMIC, and behind each semicolon."""
    tokens = tokens_of(text)
    atomic = next((index for index, token in enumerate(tokens) if token.kind == "ATOMIC"), len(tokens))
    return [
        token.start
        for before, token in pairwise(tokens[atomic:])
        if before.kind == "ATOMIC" or before.text == ";"
    ]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [node for one in value for node in _flat(one)]
    return [value] if value is not None else []


def _read_text(routine: Routine, piece: Piece, option: Any) -> None:
    """A body that is a string: dollar quoted, or in quotes, where each character may be written as two."""
    parts = option.arg if isinstance(option.arg, tuple | list) else (option.arg,)
    routine.body = parts[0].sval
    begin = option.arg_location if isinstance(option.arg_location, int) else option.location
    place = _places(piece.text, begin, routine.body, piece.offset)
    if routine.language == "plpgsql":
        read_body(routine, place, _returns(routine))
        return
    for inner in pieces(routine.body):
        if inner.failure is not None:
            routine.failures.append((place(inner.failure_offset), inner.failure))
            continue
        expr = Expr(inner.node, _shifted(inner.offset, place), place(inner.offset))
        routine.statements.append(Stmt("execsql", expr.offset, [expr]))


def _returns(routine: Routine) -> str:
    if routine.kind == "procedure":
        return ""
    if any(one.mode == "t" for one in routine.arguments):
        columns = ", ".join(f'"{one.name}" text' for one in routine.arguments if one.mode == "t")
        return f"returns table ({columns})"
    if routine.returns is None or any(one.mode in "ob" for one in routine.arguments):
        return "returns setof record" if routine.returns_set else ""
    if routine.returns in ("void", "trigger", "event_trigger", "record"):
        return f"returns {'setof ' * routine.returns_set}{routine.returns}"
    return f"returns {'setof ' * routine.returns_set}text"


def _places(text: str, begin: int, body: str, shift: int) -> Callable[[int], int]:
    """From an offset in the body to one in the file."""
    dollar = _DOLLAR.match(text, begin)
    if dollar:
        return lambda offset: shift + dollar.end() + min(offset, len(body))
    quoted = _QUOTED.match(text, begin)
    if not quoted:
        return lambda _offset: shift + begin
    is_escaped = quoted[0][0] in "eE"
    offsets: list[int] = []
    index = quoted.end()
    while index < len(text) and len(offsets) <= len(body):
        offsets.append(shift + index)
        is_pair = text.startswith("''", index) or (is_escaped and text[index] == "\\")
        if text[index] == "'" and not is_pair:
            break
        index += 2 if is_pair else 1
    offsets.append(shift + index)
    return lambda offset: offsets[max(0, min(offset, len(offsets) - 1))]


def _shifted(shift: int, place: Callable[[int], int] | None = None) -> Callable[[int], int]:
    """From an offset in a piece to one in what it is a piece of, and from there on."""
    return lambda offset: place(offset + shift) if place else offset + shift


def fragment(sql: str, offset: int) -> Expr | None:
    """A text that EXECUTE would run, parsed; None when it is no single statement. All of it stands at one
    place.
    """
    try:
        found = parse(sql)
    except SqlError:
        return None
    if len(found) != 1:
        return None
    return Expr(found[0].stmt, lambda _location: offset, offset, is_dynamic=True)
