"""Which column a routine compares with its arguments: that is its window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from b2s.importer.inventory import Found
from b2s.lineage.columns import ColumnReader
from b2s.lint.idioms import in_predicate
from b2s.lint.parser import kind
from b2s.names import quoted

_LOWER: Final = frozenset({">=", ">"})
_UPPER: Final = frozenset({"<", "<="})
_TURNED: Final = {">=": "<=", ">": "<", "<=": ">=", "<": ">"}
_STRATEGIES: Final = {"timestamptz": "timestamp", "int8": "id", "numeric": "id", "pg_snapshot": "xid"}
_COLUMN_TYPES: Final = {
    "timestamp": ("timestamp with time zone", "timestamp without time zone"),
    "id": ("bigint", "integer", "smallint"),
    "xid": ("xid8",),
}


@dataclass(slots=True)
class Window:
    """The watermark of a routine: strategy, columns, and the names it has for p_since and p_until."""

    strategy: str = ""
    sources: list[str] = field(default_factory=list)
    args: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    remedy: str = ""


def window_of(found: Found, columns: Mapping[str, Mapping[str, str]]) -> Window | None:
    """The window that a routine reads; None when it reads none. With a problem: it asks for one that cannot
    be told.
    """
    lower: dict[str, set[str]] = {}
    upper: dict[str, set[str]] = {}
    for argument, operator, column in _comparisons(found, columns):
        (lower if operator in _LOWER else upper).setdefault(argument, set()).add(column)
    since = "p_since" if found.routine.argument("p_since") else _pick(lower)
    until = "p_until" if found.routine.argument("p_until") else _pick(upper)
    is_asked = since == "p_since" or until == "p_until"
    sources = sorted(lower.get(since or "", set()) | upper.get(until or "", set()))
    if not is_asked and (since is None or until is None or lower[since] != upper[until]):
        return None
    types = {one.type for one in found.routine.arguments if one.name in (since, until)}
    strategy = _STRATEGIES.get(types.pop()) if len(types) == 1 else None
    if strategy is not None and sources and all(_fits(one, strategy, columns) for one in sources):
        names = {"p_since": since, "p_until": until}
        args = {contract: name for contract, name in names.items() if name and name != contract}
        return Window(strategy, sources, args)
    if not is_asked:
        return None
    return Window(
        problem="it reads a window (p_since, p_until), and which column that is about cannot be told",
        remedy="add watermark: {strategy: timestamp, source: schema.table.column}",
    )


def _pick(found: Mapping[str, set[str]]) -> str | None:
    return next(iter(found)) if len(found) == 1 else None


def _fits(column: str, strategy: str, columns: Mapping[str, Mapping[str, str]]) -> bool:
    table, _, name = column.rpartition(".")
    type_ = columns.get(table, {}).get(name.strip('"'))
    return type_ is None or type_ in _COLUMN_TYPES[strategy]


def _comparisons(found: Found, columns: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(argument, operator, column): column operator argument, as it stands in a predicate."""
    names = {one.name for one in found.routine.arguments if one.is_input and one.name}
    for _, expr, visit in found.step.find("A_Expr", "FuncCall"):
        if not in_predicate(visit):
            continue
        if visit.kind == "FuncCall":
            yield from _arrived(found, expr, visit.node, names, columns)
            continue
        operator = visit.node.name[-1].sval
        if operator not in _TURNED or visit.node.lexpr is None:
            continue
        for column, value, way in (
            (visit.node.lexpr, visit.node.rexpr, operator),
            (visit.node.rexpr, visit.node.lexpr, _TURNED[operator]),
        ):
            argument = _argument(value, names)
            if argument and kind(column) == "ColumnRef":
                yield from ((argument, way, one) for one in _resolved(found, expr, column, columns))


def _arrived(
    found: Found, expr: Any, call: Any, names: set[str], columns: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[str, str, str]]:
    """etl.arrived(column, since, until)."""
    if call.funcname[-1].sval != "arrived" or len(call.args or ()) != 3:
        return
    column, since, until = call.args
    for one in _resolved(found, expr, column, columns):
        for value, operator in ((since, ">="), (until, "<")):
            argument = _argument(value, names)
            if argument:
                yield argument, operator, one


def _argument(node: Any, names: set[str]) -> str | None:
    """The argument that a value is, casts and a default for null left aside."""
    while kind(node) in ("TypeCast", "CoalesceExpr"):
        node = node.arg if kind(node) == "TypeCast" else node.args[0]
    if kind(node) != "ColumnRef":
        return None
    name = getattr(node.fields[-1], "sval", "")
    return name if name in names and len(node.fields) <= 2 else None


def _resolved(
    found: Found, expr: Any, column: Any, columns: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """The full name of a column as the statement means it."""
    reader = _Watching(found, columns, column)
    reader.read(expr.node)
    for table, name in reader.seen:
        yield f"{table}.{quoted(name)}"


class _Watching(ColumnReader):
    """A reader that notes what one mention of a column is."""

    def __init__(self, found: Found, columns: Mapping[str, Mapping[str, str]], column: Any) -> None:
        def name_of(node: Any) -> str:
            if node.schemaname:
                return f"{quoted(node.schemaname)}.{quoted(node.relname)}"
            known = [one for one in found.own.reads if one.endswith(f".{quoted(node.relname)}")]
            return known[0] if len(known) == 1 else quoted(node.relname)

        hidden = frozenset({*found.routine.variables, *(one.name for one in found.routine.arguments)})
        super().__init__(name_of, {table: list(names) for table, names in columns.items()}, hidden)
        self._wanted = column
        self.seen: set[tuple[str, str]] = set()

    def _column(self, node: Any, scopes: Any) -> Any:
        found = super()._column(node, scopes)
        if node is self._wanted:
            self.seen.update(one for one in found if "." in one[0])
        return found
