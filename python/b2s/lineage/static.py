"""What the SQL of a procedure says it reads and writes, functions that it calls included."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from b2s.lineage.columns import ColumnReader, without_intermediates
from b2s.lint.access import HOLE
from b2s.lint.project import Project, Step, calls_of
from b2s.names import quoted

Tables = Mapping[str, Collection[str]]
"""The columns of tables and views, by full name, quoted where needed."""


@dataclass(slots=True)
class Static:
    """What one routine reads and writes, by full name. `is_complete`: nothing is known at run time only."""

    reads: dict[str, set[str]] = field(default_factory=dict)
    writes: dict[str, dict[str, set[tuple[str, str]]]] = field(default_factory=dict)
    is_complete: bool = True

    def document(self) -> dict[str, Any]:
        """The form in which etl.store_lineage takes it."""
        read = [
            {"relation": table, "access": "read", "columns": sorted(columns) or None}
            for table, columns in sorted(self.reads.items())
        ]
        written = [
            {
                "relation": table,
                "access": "write",
                "columns": sorted(columns) or None,
                "derived_from": {
                    name: sorted(f"{source}.{quoted(column)}" for source, column in sources)
                    for name, sources in sorted(columns.items())
                    if sources
                }
                or None,
            }
            for table, columns in sorted(self.writes.items())
        ]
        return {"is_complete": self.is_complete, "relations": [*read, *written]}


Lookup = Callable[[str], Iterable[Step]]
"""From the full name of a routine to those that have it."""


def lookup_in(project: Project) -> Lookup:
    """Finds routines among those of a project."""
    return lambda name: project.by_name.get(name, ())


class Analysis:
    """Lineage of routines. `lookup` finds the routines that they call; `tables` helps with `*`, with columns
    that have no alias, and with tables that have no schema.
    """

    def __init__(self, lookup: Lookup, tables: Tables | None = None, search_path: Iterable[str] = ()) -> None:
        self.tables = tables or {}
        self._lookup = lookup
        self._search_path = tuple(search_path)

    def of(self, step: Step) -> Static:
        """What a routine reads and writes, with what the routines that it calls do."""
        found = Static()
        for one in self.with_callees(step):
            self._add(one, found)
        return found

    def own(self, step: Step) -> Static:
        """What a routine itself reads and writes."""
        found = Static()
        self._add(step, found)
        return found

    def with_callees(self, step: Step) -> list[Step]:
        """A routine and those that it calls, directly or not."""
        found, waiting = [step], [step]
        while waiting:
            for callee in self.callees(waiting.pop()):
                if not any(callee is one for one in found):
                    found.append(callee)
                    waiting.append(callee)
        return found

    def callees(self, step: Step) -> Iterator[Step]:
        """The routines that a routine calls by name, as far as they can be found; overloads all count."""
        for _, name in calls_of(step, self._search_path):
            yield from self._lookup(name)

    def _path_of(self, step: Step) -> tuple[str, ...]:
        return step.routine.search_path or self._search_path

    def name_of(self, step: Step, schema: str, name: str) -> str:
        """The full name of a table as the routine means it, quoted where needed."""
        if schema:
            return f"{quoted(schema)}.{quoted(name)}"
        candidates = [f"{quoted(one)}.{quoted(name)}" for one in self._path_of(step) if one]
        return next((one for one in candidates if one in self.tables), quoted(name))

    def _add(self, step: Step, found: Static) -> None:
        if step.has_opaque_text or not step.routine.is_readable:
            found.is_complete = False
        temporary = {
            visit.node.relname
            for _, _, visit in step.find("RangeVar")
            if visit.node.relpersistence == "t" or visit.node.schemaname == "pg_temp"
        }
        reader = self._reader(step, temporary)
        derived = without_intermediates(reader.derived, {quoted(one) for one in temporary})
        for access in step.accesses:
            table = self.name_of(step, access.schema, access.name)
            if access.is_write:
                columns = found.writes.setdefault(table, {})
                for name, sources in derived.get(table, {}).items():
                    lasting = {(one, column) for one, column in sources if HOLE not in one}
                    columns.setdefault(name, set()).update(lasting)
            else:
                found.reads.setdefault(table, set()).update(reader.reads.get(table, ()))

    def _reader(self, step: Step, temporary: set[str]) -> ColumnReader:
        def name_of(node: Any) -> str:
            schema = node.schemaname or ""
            if schema in ("", "pg_temp") and node.relname in temporary:
                return quoted(node.relname)
            return self.name_of(step, schema, node.relname)

        hidden = {*step.routine.variables, *(argument.name for argument in step.routine.arguments)}
        reader = ColumnReader(name_of, self.tables, frozenset(hidden))
        for _, expr in step.routine.exprs:
            try:
                reader.read(expr.node)
            except RecursionError:
                continue
        return reader
