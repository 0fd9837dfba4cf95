"""What several rules ask about a piece of SQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from b2s.lint.access import Access
from b2s.lint.model import Expr
from b2s.lint.parser import Visit, kind, walk
from b2s.lint.project import Step

PREDICATES: Final = frozenset({"whereClause", "havingClause", "quals", "joinCondition", "condition"})
"""The fields of nodes that hold what decides about rows."""
CLOCKS: Final = frozenset(
    {"now", "clock_timestamp", "statement_timestamp", "transaction_timestamp", "timeofday"}
)
_JOINED: Final = frozenset({"JOIN_LEFT", "JOIN_FULL", "JOIN_RIGHT"})


def names_in(root: Any) -> set[str]:
    """The names of columns and variables that are mentioned."""
    return {
        parts[-1].sval
        for one in walk(root)
        if one.kind == "ColumnRef"
        for parts in [one.node.fields]
        if hasattr(parts[-1], "sval")
    }


def is_name(node: Any, name: str) -> bool:
    """Whether a node is this name, casts left aside."""
    while kind(node) == "TypeCast":
        node = node.arg
    return kind(node) == "ColumnRef" and getattr(node.fields[-1], "sval", None) == name


def in_predicate(visit: Visit) -> bool:
    """Whether a node takes part in choosing rows: it stands in WHERE, ON, HAVING or the like."""
    for parent, field in visit.path():
        if field in PREDICATES and parent not in ("WindowDef",):
            return True
        if field == "targetList" and parent in ("SelectStmt", "InsertStmt", "UpdateStmt"):
            return False
    return False


def written_before(step: Step, access: Access) -> bool:
    """Whether an incremental run deletes rows of the same table before this access."""
    for earlier in step.writes:
        if earlier is access or earlier.expr is access.expr:
            return _deletes_beside(access)
        is_same = (earlier.schema, earlier.name) == (access.schema, access.name)
        if (
            is_same
            and earlier.verb in ("delete", "truncate", "drop", "merge")
            and step.is_incremental(earlier.statement)
        ):
            return True
    return False


def _deletes_beside(access: Access) -> bool:
    """A data-modifying WITH query of the same statement deletes what is inserted anew."""
    return any(
        visit.node.relation.relname == access.name
        for visit in access.expr.find("DeleteStmt")
        if visit.node.relation
    )


def looks_at_target(step: Step, access: Access) -> bool:
    """Whether the rows of an INSERT are chosen by what its target holds already (NOT EXISTS, LEFT JOIN,
    EXCEPT).
    """
    return any(
        other.expr is access.expr and (other.schema, other.name) == (access.schema, access.name)
        for other in step.reads
    )


def is_repeatable(step: Step, access: Access) -> bool:
    """Whether an INSERT that runs twice leaves what it leaves when it runs once, as far as its form tells."""
    insert = access.owner
    if getattr(insert, "onConflictClause", None) is not None:
        return True
    return written_before(step, access) or looks_at_target(step, access)


def inserted_from_tables(insert: Any) -> bool:
    """Whether an INSERT takes its rows from a query that reads something."""
    query = insert.selectStmt
    if query is None or getattr(query, "valuesLists", None):
        return False
    return any(one.kind in ("RangeVar", "RangeFunction", "RangeSubselect") for one in walk(query))


def function_name(node: Any) -> str:
    """The name of the function that a FuncCall calls, without its schema."""
    return str(node.funcname[-1].sval)


def clocks(expr: Expr) -> Iterator[tuple[Visit, str]]:
    """Every mention of the current time or day, with how it is written."""
    for visit in expr.find("SQLValueFunction", "FuncCall"):
        if visit.kind == "FuncCall":
            if function_name(visit.node) in CLOCKS:
                yield visit, f"{function_name(visit.node)}()"
        elif "TIME" in visit.node.op.name or "DATE" in visit.node.op.name:
            yield visit, visit.node.op.name.removeprefix("SVFOP_").removesuffix("_N").lower()
