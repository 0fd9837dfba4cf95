"""What rules look at: routines, their statements and expressions, each of which knows its place in the
file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from b2s.lint.parser import Visit, walk
from b2s.lint.sources import Source

NUMBERS: Final = frozenset(
    {"int2", "int4", "int8", "numeric", "smallint", "integer", "int", "bigint", "decimal"}
)
HARMLESS: Final = NUMBERS | {
    "float4",
    "float8",
    "bool",
    "boolean",
    "date",
    "timestamp",
    "timestamptz",
    "time",
    "timetz",
    "interval",
    "oid",
    "xid8",
    "pg_snapshot",
    "uuid",
    "regclass",
    "regproc",
    "regprocedure",
    "regtype",
    "regrole",
    "regnamespace",
}
"""Types whose text cannot hold SQL of somebody else, by their names in pg_type and in SQL."""


class Expr:
    """One parsed piece of SQL in a body: a statement, or an expression as the target list of a SELECT."""

    def __init__(
        self, node: Any, place: Callable[[int], int], offset: int, *, is_dynamic: bool = False
    ) -> None:
        self.node = node
        self.offset = offset
        self.is_dynamic = is_dynamic
        self._place = place

    @cached_property
    def visits(self) -> list[Visit]:
        """All nodes, parents before children."""
        return list(walk(self.node))

    def find(self, *kinds: str) -> Iterator[Visit]:
        """The nodes of these kinds."""
        return (visit for visit in self.visits if visit.kind in kinds)

    def offset_of(self, node: Any) -> int:
        """Where in the file a node stands: its own place, else that of the first node in it that has one."""
        for visit in walk(node):
            location = getattr(visit.node, "location", None)
            if isinstance(location, int) and location >= 0 and visit.kind != "RawStmt":
                return self._place(location)
        return self.offset

    @property
    def value(self) -> Any:
        """The node of an expression, out of the SELECT that it was parsed in; None for a statement."""
        targets = getattr(self.node, "targetList", None)
        return targets[0].val if targets and len(targets) == 1 else None


@dataclass(slots=True)
class Branch:
    """A block inside a statement: `then`, `else`, `when`, `loop`, `body` or `handler`."""

    role: str
    body: list[Stmt]
    condition: Expr | None = None
    errors: tuple[str, ...] = ()
    offset: int = 0


@dataclass(slots=True)
class Stmt:
    """A statement of a body: `if`, `execsql`, `assign` ... as PL/pgSQL itself calls them."""

    kind: str
    offset: int
    exprs: list[Expr] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    targets: tuple[str, ...] = ()
    is_error: bool = False
    dynamic: Expr | None = None

    def nested(self) -> Iterator[Stmt]:
        """This statement and all inside it, in order."""
        yield self
        for branch in self.branches:
            for one in branch.body:
                yield from one.nested()


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a routine; mode is i, o, b (inout), v or t, as in pg_proc."""

    name: str
    type: str
    mode: str
    has_default: bool
    offset: int

    @property
    def is_input(self) -> bool:
        """Whether a caller passes it."""
        return self.mode in "ibv"


@dataclass(slots=True)
class Variable:
    """A declared variable."""

    name: str
    type: str
    default: Expr | None = None
    is_argument: bool = False


@dataclass
class Routine:
    """A function or procedure as it is written."""

    source: Source
    offset: int
    schema: str
    name: str
    kind: str
    language: str
    arguments: list[Argument]
    returns: str | None
    returns_set: bool
    is_definer: bool
    search_path: tuple[str, ...] | None
    body: str = ""
    is_bound: bool = False
    statements: list[Stmt] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    failures: list[tuple[int, str]] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        """schema.name, or the name alone where no schema is written."""
        return f"{self.schema}.{self.name}" if self.schema else self.name

    @property
    def is_readable(self) -> bool:
        """Whether the body could be read to the end."""
        return self.language in ("sql", "plpgsql") and not self.failures

    def argument(self, name: str) -> Argument | None:
        """The argument of a name."""
        return next((one for one in self.arguments if one.name == name), None)

    @cached_property
    def all_statements(self) -> list[Stmt]:
        """Every statement at any depth, in order."""
        return [one for statement in self.statements for one in statement.nested()]

    @cached_property
    def exprs(self) -> list[tuple[Stmt | None, Expr]]:
        """Every expression with the statement that it belongs to; defaults of variables belong to none."""
        found: list[tuple[Stmt | None, Expr]] = [
            (None, variable.default) for variable in self.variables.values() if variable.default
        ]
        for statement in self.all_statements:
            found += [(statement, expr) for expr in statement.exprs]
            found += [(statement, branch.condition) for branch in statement.branches if branch.condition]
            if statement.dynamic:
                found.append((statement, statement.dynamic))
        return found

    @cached_property
    def assignments(self) -> dict[str, list[Expr | None]]:
        """What each variable is given: expressions; None for a value that comes from a query or a loop."""
        found: dict[str, list[Expr | None]] = {}
        for variable in self.variables.values():
            if variable.default is not None:
                found.setdefault(variable.name, []).append(variable.default)
        for statement in self.all_statements:
            for target in statement.targets:
                value = statement.exprs[0] if statement.kind == "assign" and statement.exprs else None
                found.setdefault(target, []).append(value)
        return found
