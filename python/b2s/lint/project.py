"""All routines at once: which of them are steps of the pipeline, what each reads and writes, and who writes
what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from b2s.lint.access import Access, accesses_of
from b2s.lint.dynamic import Folded, fold_all
from b2s.lint.flow import incremental_values, reachable
from b2s.lint.frontend import Parsed
from b2s.lint.model import Expr, Routine, Stmt
from b2s.lint.parser import Visit

if TYPE_CHECKING:
    from b2s.configmodel import Config, Procedure

OWN_SCHEMA: Final = "etl"
OLDEST_SERVER: Final = 15


@dataclass
class Step:
    """A routine under judgement; a step when a pipeline executes it, and `procedure` when the configuration
    says so.
    """

    routine: Routine
    procedure: Procedure | None = None
    is_step: bool = False
    folded: dict[int, tuple[Expr, Folded]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folded = fold_all(self.routine)

    @cached_property
    def accesses(self) -> list[Access]:
        """The tables it reads and writes, temporary ones left out."""
        return accesses_of(self.routine)

    @property
    def writes(self) -> list[Access]:
        """The tables it writes."""
        return [access for access in self.accesses if access.is_write]

    @property
    def reads(self) -> list[Access]:
        """The tables it reads."""
        return [access for access in self.accesses if not access.is_write]

    def argument(self, contract: str) -> str:
        """The name that the routine uses for an argument of the contract (p_mode, p_since ...)."""
        return self.procedure.args.get(contract, contract) if self.procedure else contract

    @cached_property
    def incremental(self) -> set[int]:
        """The ids of the statements that an incremental run can reach."""
        names = (self.argument(one) for one in ("p_mode", "p_since", "p_until"))
        return reachable(self.routine, incremental_values(*names))

    def is_incremental(self, statement: Stmt | None) -> bool:
        """Whether an incremental run can reach a statement."""
        return statement is None or id(statement) in self.incremental

    def find(self, *kinds: str) -> Iterator[tuple[Stmt | None, Expr, Visit]]:
        """Every node of these kinds, with its expression and statement."""
        for statement, expr in self.routine.exprs:
            for visit in expr.find(*kinds):
                yield statement, expr, visit

    def uses(self, name: str) -> bool:
        """Whether a variable or argument is mentioned anywhere, texts of EXECUTE included."""
        for _, _, visit in self.find("ColumnRef"):
            parts = [getattr(part, "sval", "") for part in visit.node.fields]
            if parts[-1] == name and len(parts) <= 2:
                return True
        return False

    @property
    def has_opaque_text(self) -> bool:
        """Whether it executes a text that is only known at run time."""
        statements = {id(one): one for one in self.routine.all_statements}
        return any(statements[key].dynamic is None for key in self.folded)


@dataclass(frozen=True, slots=True)
class Read:
    """A table that a step reads, itself or through a function that it calls: where, and which function."""

    offset: int
    access: Access
    through: Step | None = None

    @property
    def way(self) -> str:
        """Through which function, for a message; empty when it is read by the step itself."""
        return f" through {self.through.routine.full_name}()" if self.through else ""


def calls_of(step: Step, search_path: Iterable[str] = ()) -> Iterator[tuple[int, str]]:
    """Where a routine calls functions and procedures, with the full names that each may mean."""
    for _, expr, visit in step.find("FuncCall"):
        parts = [part.sval for part in visit.node.funcname]
        yield expr.offset_of(visit.node), ".".join(parts)
        if len(parts) == 1:
            for schema in step.routine.search_path or search_path:
                yield expr.offset_of(visit.node), f"{schema}.{parts[0]}"


class Project:
    """Everything that was read, and the configuration it belongs to."""

    def __init__(
        self, parsed: Iterable[Parsed], config: Config | None = None, target_version: int = OLDEST_SERVER
    ) -> None:
        self.parsed = list(parsed)
        self.config = config
        self.target_version = target_version
        self.steps = [self._step(routine) for one in self.parsed for routine in one.routines]

    def _step(self, routine: Routine) -> Step:
        if self.config is None:
            step = Step(routine)
            is_trigger = routine.returns in ("trigger", "event_trigger")
            step.is_step = not is_trigger and routine.schema != OWN_SCHEMA and bool(step.writes)
            return step
        procedure = next((one for one in self.config.procedures if _means(one, routine)), None)
        return Step(routine, procedure, procedure is not None)

    @property
    def bronze(self) -> tuple[str, ...]:
        """The schemas that nothing in the pipeline may write."""
        return self.config.lint.bronze if self.config else ("bronze",)

    @cached_property
    def by_name(self) -> dict[str, list[Step]]:
        """The routines by full name; overloads share one."""
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.routine.full_name, []).append(step)
        return found

    def reads(self, step: Step) -> Iterator[Read]:
        """What a step reads, functions that it calls included, as far as they are here."""
        for access in step.reads:
            yield Read(access.offset, access)
        path = self.config.search_path if self.config else ()
        seen = [step]
        waiting = [(offset, name) for offset, name in calls_of(step, path)]
        while waiting:
            offset, name = waiting.pop(0)
            for callee in self.by_name.get(name, ()):
                if not any(callee is one for one in seen):
                    seen.append(callee)
                    yield from (Read(offset, access, callee) for access in callee.reads)
                    waiting += [(offset, inner) for _, inner in calls_of(callee, path)]

    @cached_property
    def configured(self) -> dict[str, Step]:
        """The steps of the configuration by the name of the procedure."""
        return {one.procedure.name: one for one in self.steps if one.procedure}

    @cached_property
    def writers(self) -> dict[str, list[str]]:
        """For each table the procedures that write it; a procedure whose SQL is not here writes its
        namesake.
        """
        found: dict[str, list[str]] = {}
        for procedure in self.config.procedures if self.config else ():
            step = self.configured.get(procedure.name)
            tables = {self.table(access) for access in step.writes} if step else {procedure.name}
            for table in tables:
                found.setdefault(table, []).append(procedure.name)
        return found

    def table(self, access: Access) -> str:
        """The full name of a table; one without a schema is looked for in the search path of the pipeline."""
        if access.schema or self.config is None:
            return access.table
        names = {procedure.name for procedure in self.config.procedures}
        schemas = self.config.search_path
        return next((f"{s}.{access.name}" for s in schemas if f"{s}.{access.name}" in names), access.table)

    def requirements(self, name: str) -> set[str]:
        """The procedures that one depends on, directly or not."""
        direct = {one.name: one.dependencies for one in (self.config.procedures if self.config else ())}
        found: set[str] = set()
        waiting = list(direct.get(name, ()))
        while waiting:
            current = waiting.pop()
            if current not in found:
                found.add(current)
                waiting += direct.get(current, ())
        return found

    def procedure(self, name: str) -> Procedure | None:
        """The configured procedure of a name."""
        return next(
            (one for one in (self.config.procedures if self.config else ()) if one.name == name), None
        )


def _means(procedure: Procedure, routine: Routine) -> bool:
    wanted = procedure.routine or procedure.name
    name, _, types = wanted.partition("(")
    if name.strip() != routine.full_name:
        return False
    if not types:
        return True
    count = len([one for one in types.rstrip(") ").split(",") if one.strip()])
    return count == sum(one.is_input for one in routine.arguments)
