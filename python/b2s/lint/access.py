"""Which tables a statement reads and writes. Names of WITH queries are no tables, where they can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from b2s.lint.model import Expr, Routine, Stmt
from b2s.lint.parser import children, kind

HOLE: Final = "b2s_hole"
"""Stands in a folded text for what is only known at run time."""
TOO_DEEP: Final = "expressions are nested too deeply to be judged"
_TARGETS: Final = {
    "InsertStmt": "insert", "UpdateStmt": "update", "DeleteStmt": "delete", "MergeStmt": "merge",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Access:
    """One mention of a table: read (`select`) or written (`insert`, `update`, `truncate`, `drop` ...)."""

    schema: str
    name: str
    verb: str
    node: Any
    owner: Any
    expr: Expr
    statement: Stmt | None

    @property
    def is_write(self) -> bool:
        """Whether the table is written."""
        return self.verb != "select"

    @property
    def table(self) -> str:
        """schema.name, or the name as it is written."""
        return f"{self.schema}.{self.name}" if self.schema else self.name

    @property
    def offset(self) -> int:
        """Where the table is named."""
        return self.expr.offset_of(self.node)


def mentions_of(routine: Routine) -> list[Access]:
    """All accesses of a routine to tables, temporary ones and those of the system included."""
    found: list[Access] = []
    for statement, expr in routine.exprs:
        try:
            found += _of(expr.node, frozenset(), _Context(expr, statement))
        except RecursionError:
            routine.failures.append((expr.offset, TOO_DEEP))
    return found


def accesses_of(routine: Routine) -> list[Access]:
    """All accesses of a routine to tables that outlive it."""
    found = mentions_of(routine)
    temporary = {access.name for access in found if is_temporary(access)}
    return [
        access
        for access in found
        if access.schema not in ("pg_temp", "pg_catalog", "information_schema")
        and not (access.schema == "" and (access.name in temporary or access.name.startswith("pg_")))
        and HOLE not in access.table
    ]


def is_temporary(access: Access) -> bool:
    """Whether a temporary table is made here, or named as one."""
    return access.schema == "pg_temp" or getattr(access.node, "relpersistence", "p") == "t"


@dataclass(frozen=True, slots=True)
class _Context:
    expr: Expr
    statement: Stmt | None

    def access(self, node: Any, verb: str, owner: Any) -> Access:
        return Access(node.schemaname or "", node.relname, verb, node, owner, self.expr, self.statement)


def _of(node: Any, hidden: frozenset[str], context: _Context) -> Iterator[Access]:
    name = kind(node)
    if name == "RangeVar":
        if node.schemaname or node.relname not in hidden:
            yield context.access(node, "select", None)
        return
    clause = getattr(node, "withClause", None)
    if clause is not None:
        hidden = yield from _with(clause, hidden, context)
    written: tuple[Any, ...] = ()
    if name in _TARGETS:
        written = (node.relation,)
        yield context.access(node.relation, _TARGETS[name], node)
    elif name == "TruncateStmt":
        written = tuple(node.relations)
        yield from (context.access(one, "truncate", node) for one in written)
    elif name == "DropStmt":
        yield from _dropped(node, context)
    elif name in ("CreateTableAsStmt", "CopyStmt", "CreateStmt", "RefreshMatViewStmt", "IntoClause"):
        target, verb = _created(name, node)
        if target is not None:
            written = (target,)
            yield context.access(target, verb, node)
    elif name == "LockStmt":
        return
    for field, child in children(node):
        is_target = any(child is one for one in written) or (name == "CreateTableAsStmt" and field == "into")
        if field != "withClause" and not is_target:
            yield from _of(child, hidden, context)


def _created(name: str, node: Any) -> tuple[Any, str]:
    if name == "CreateTableAsStmt":
        return node.into.rel, "create"
    if name == "IntoClause":
        return node.rel, "create"
    if name == "CopyStmt":
        return (node.relation, "copy") if node.is_from else (None, "")
    return node.relation, "create" if name == "CreateStmt" else "refresh"


def _with(clause: Any, hidden: frozenset[str], context: _Context) -> Any:
    """The accesses of the WITH queries; returns the names that what follows cannot see behind."""
    if clause.recursive:
        hidden |= {cte.ctename for cte in clause.ctes}
    for cte in clause.ctes:
        yield from _of(cte.ctequery, hidden, context)
        hidden |= {cte.ctename}
    return hidden


def _dropped(node: Any, context: _Context) -> Iterator[Access]:
    if node.removeType.name != "OBJECT_TABLE":
        return
    for names in node.objects:
        parts = [part.sval for part in names]
        schema = parts[-2] if len(parts) > 1 else ""
        yield Access(schema, parts[-1], "drop", node, node, context.expr, context.statement)
