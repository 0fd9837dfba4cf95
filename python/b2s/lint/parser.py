"""The one module that knows pglast: everything else sees trees of nodes, told apart by `kind`.

pglast is GPL-3.0-or-later, so it is no dependency of b2s but of the extra `b2s[lint]`, and imported when it
is used.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

from b2s.errors import UsageError

_DEEPEST: Final = 1000
COMMENTS: Final = frozenset({"SQL_COMMENT", "C_COMMENT"})
"""The kinds of tokens that are comments."""
_WHITE: Final = re.compile(r"\s+")


class SqlError(Exception):
    """A text that cannot be parsed: why, and the offset where, if that is known."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.offset = offset


class Token(NamedTuple):
    """A token of SQL: `[start, end)`, its kind (IDENT, SCONST, SQL_COMMENT ...) and its text."""

    start: int
    end: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Visit:
    """A node of a tree and the way to it."""

    node: Any
    field: str
    parent: Visit | None

    @property
    def kind(self) -> str:
        """The kind of the node."""
        return type(self.node).__name__

    def ancestors(self) -> Iterator[Visit]:
        """The nodes around this one, the innermost first; `field` says in which part of the parent one
        stands.
        """
        current = self.parent
        while current is not None:
            yield current
            current = current.parent

    def path(self) -> Iterator[tuple[str, str]]:
        """(kind of the parent, field of it) for this node and all around it, from the inside out."""
        current: Visit = self
        while current.parent is not None:
            yield current.parent.kind, current.field
            current = current.parent


@cache
def _pglast() -> Any:
    try:
        import pglast
    except ImportError:
        raise UsageError(
            "reading SQL needs the parser pglast, which is not installed",
            "pip install 'b2s[lint]' (pglast is GPL-3.0-or-later, which is why b2s comes without it)",
        ) from None
    return pglast


def require() -> None:
    """Raises UsageError when the parser is not installed."""
    _pglast()


def is_installed() -> bool:
    """Whether the parser is there; importing it takes longer than looking."""
    return importlib.util.find_spec("pglast") is not None


def parse(sql: str) -> list[Any]:
    """The statements of a text, RawStmt nodes whose locations are offsets into it. Raises SqlError."""
    tokens = scan(sql)
    _refuse_depth(tokens)
    pglast = _pglast()
    try:
        return list(pglast.parse_sql(sql))
    except pglast.parser.ParseError as error:
        raise SqlError(_message(error), _offset(error, sql)) from None
    except (RecursionError, MemoryError, ValueError, pglast.Error) as error:
        raise SqlError(f"cannot be parsed: {error}") from None


def parse_plpgsql(sql: str) -> dict[str, Any]:
    """The one PL/pgSQL function of a CREATE FUNCTION statement, as libpg_query's JSON. Raises SqlError."""
    pglast = _pglast()
    try:
        found: dict[str, Any] = pglast.parse_plpgsql(sql)[0]["PLpgSQL_function"]
    except pglast.parser.ParseError as error:
        raise SqlError(_message(error)) from None
    except RecursionError:
        raise SqlError("blocks are nested too deeply to be read") from None
    except (ValueError, IndexError, KeyError, pglast.Error) as error:
        raise SqlError(f"cannot be parsed: {error}") from None
    return found


def scan(sql: str) -> list[Token]:
    """The tokens of a text, comments included. Raises SqlError for an unterminated one."""
    pglast = _pglast()
    try:
        found = pglast.scan(sql)
    except pglast.parser.ParseError as error:
        raise SqlError(_message(error), _offset(error, sql)) from None
    return [Token(t.start, t.end + 1, t.name, sql[t.start : t.end + 1]) for t in found]


def tokens_of(sql: str) -> list[Token]:
    """The tokens of a text without comments; none at all where it cannot be scanned."""
    try:
        return [token for token in scan(sql) if token.kind not in COMMENTS]
    except SqlError:
        return []


def walk(root: Any) -> Iterator[Visit]:
    """Every node under a root, itself first, parents before children, in the order of the fields."""
    stack = [Visit(root, "", None)]
    while stack:
        visit = stack.pop()
        yield visit
        found: list[Visit] = []
        for name in _fields(type(visit.node)):
            value = getattr(visit.node, name)
            if isinstance(value, tuple | list):
                found += [Visit(one, name, visit) for one in _flat(value)]
            elif _is_node(value):
                found.append(Visit(value, name, visit))
        stack += reversed(found)


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """The nodes right under a node, with the field each stands in."""
    for name in _fields(type(node)):
        value = getattr(node, name)
        if isinstance(value, tuple | list):
            for one in _flat(value):
                yield name, one
        elif _is_node(value):
            yield name, value


def kind(node: Any) -> str:
    """The kind of a node: the name of its type."""
    return type(node).__name__


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        elif _is_node(value):
            yield value


_FIELDS: Final[dict[Any, tuple[str, ...]]] = {}


def _fields(node_type: Any) -> tuple[str, ...]:
    """The names of the fields of a type of nodes."""
    if node_type not in _FIELDS:
        _FIELDS[node_type] = tuple(getattr(node_type, "__slots__", ()))
    return _FIELDS[node_type]


def _is_node(value: Any) -> bool:
    return isinstance(value, _pglast().ast.Node)


def _refuse_depth(tokens: list[Token]) -> None:
    """The parser's own stack is not Python's: what nests deeper than anybody writes is refused beforehand."""
    depth = 0
    for token in tokens:
        if token.text in ("(", "["):
            depth += 1
        elif token.text in (")", "]"):
            depth -= 1
        if depth > _DEEPEST:
            raise SqlError("parentheses are nested too deeply to be read", token.start)


def _message(error: Any) -> str:
    return _WHITE.sub(" ", str(error.args[0] if error.args else error)).strip()


def _offset(error: Any, sql: str) -> int | None:
    location = getattr(error, "location", None)
    if not isinstance(location, int):
        location = next((one for one in error.args[1:] if isinstance(one, int)), None)
    return None if location is None else max(0, min(location, len(sql)))
