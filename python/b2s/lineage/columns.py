"""Which columns a statement reads, and from which columns those that it writes are computed.

A column counts where it can be told whose it is: by its alias, by the columns that a table is known to have,
or because there is only one table. What cannot be told is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from b2s.lint.parser import children, kind

Column = tuple[str, str]
"""A table and a column of it."""
Sources = frozenset[Column]
Output = list[tuple[str, Sources]]
"""The columns of a query in order, each with what it is computed from."""

_NOTHING: Final[Sources] = frozenset()
_WRITES: Final = frozenset({"InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt"})


@dataclass(frozen=True, slots=True)
class Relation:
    """Something in a FROM clause: a table whose columns are known or not, or a query with its columns."""

    table: str | None
    columns: Mapping[str, Sources] | None

    def find(self, name: str) -> Sources | None:
        """What a column is computed from; None when there is no such column, as far as is known."""
        if self.columns is not None:
            return self.columns.get(name)
        return frozenset({(self.table, name)}) if self.table else None


Scope = dict[str, Relation]
Ctes = dict[str, Output | None]


@dataclass
class ColumnReader:
    """Reads statements one after the other and gathers what they say.

    `name_of` turns a RangeVar into the full name of its table, `known` has the columns of tables, `hidden`
    are the names of variables.
    """

    name_of: Callable[[Any], str]
    known: Mapping[str, Collection[str]] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    reads: dict[str, set[str]] = field(default_factory=dict)
    derived: dict[str, dict[str, set[Column]]] = field(default_factory=dict)

    def read(self, node: Any) -> None:
        """Reads one statement, or one expression in the SELECT that it was parsed in."""
        while kind(node) in ("RawStmt", "ExplainStmt", "DeclareCursorStmt", "PrepareStmt", "CopyStmt"):
            node = getattr(node, "stmt", None) or getattr(node, "query", None)
            if node is None:
                return
        if kind(node) == "CreateTableAsStmt":
            self._created(node.into.rel, node.query)
        elif kind(node) == "SelectStmt":
            output = self._query(node, {}, ())
            if node.intoClause is not None and output is not None:
                self._note(self.name_of(node.intoClause.rel), output)
        elif kind(node) in _WRITES:
            self._write(node, {}, ())
        elif kind(node) == "CallStmt":
            self._sources(node.funccall, {}, ())

    def _created(self, target: Any, query: Any) -> None:
        output = self._query(query, {}, ()) if kind(query) == "SelectStmt" else None
        if output is not None:
            self._note(self.name_of(target), output)

    def _note(self, table: str, pairs: Iterable[tuple[str, Sources]]) -> None:
        for column, sources in pairs:
            if column:
                self.derived.setdefault(table, {}).setdefault(column, set()).update(sources)

    # -- queries --

    def _query(self, node: Any, ctes: Ctes, outer: tuple[Scope, ...]) -> Output | None:
        """The columns of a SELECT; None when they cannot be counted, because of a `*` of who knows what."""
        ctes = self._with(node, ctes, outer)
        if node.larg is not None:
            left, right = self._query(node.larg, ctes, outer), self._query(node.rarg, ctes, outer)
            if left is None or right is None or len(left) != len(right):
                return None
            return [(name, one | other) for (name, one), (_, other) in zip(left, right, strict=True)]
        if node.valuesLists:
            rows = [[self._sources(one, ctes, outer) for one in row] for row in node.valuesLists]
            return [
                (f"column{number}", _NOTHING.union(*one))
                for number, one in enumerate(zip(*rows, strict=False), 1)
            ]
        scope = self._scope(node.fromClause or (), ctes, outer)
        scopes = (scope, *outer)
        output: Output | None = []
        for target in node.targetList or ():
            found = self._target(target, ctes, scopes)
            output = None if output is None or found is None else [*output, *found]
        for name, child in children(node):
            if name not in ("targetList", "fromClause", "withClause", "intoClause", "larg", "rarg"):
                self._sources(child, ctes, scopes)
        return output

    def _with(self, node: Any, ctes: Ctes, outer: tuple[Scope, ...]) -> Ctes:
        clause = getattr(node, "withClause", None)
        if clause is None:
            return ctes
        found = dict(ctes)
        for cte in clause.ctes:
            if clause.recursive:
                found[cte.ctename] = None
            query = cte.ctequery
            output = (
                self._query(query, found, outer)
                if kind(query) == "SelectStmt"
                else self._write(query, found, outer)
            )
            names = [one.sval for one in cte.aliascolnames or ()]
            found[cte.ctename] = _renamed(output, names)
        return found

    def _target(self, target: Any, ctes: Ctes, scopes: tuple[Scope, ...]) -> Output | None:
        value = target.val
        if kind(value) == "ColumnRef" and kind(value.fields[-1]) == "A_Star":
            return self._star([one.sval for one in value.fields[:-1]], scopes[0])
        sources = self._sources(value, ctes, scopes)
        return [(target.name or _implied_name(value), sources)]

    def _star(self, prefix: list[str], scope: Scope) -> Output | None:
        wanted = [scope.get(prefix[-1])] if prefix else list(scope.values())
        output: Output = []
        for relation in wanted:
            if relation is None or relation.columns is None:
                return None
            self._reading(_NOTHING.union(*relation.columns.values()))
            output += relation.columns.items()
        return output

    # -- FROM --

    def _scope(self, items: Iterable[Any], ctes: Ctes, outer: tuple[Scope, ...]) -> Scope:
        scope: Scope = {}
        for item in items:
            _put(scope, self._relations(item, ctes, (scope, *outer)))
        return scope

    def _relations(self, item: Any, ctes: Ctes, scopes: tuple[Scope, ...]) -> Iterator[tuple[str, Relation]]:
        name = kind(item)
        alias = item.alias.aliasname if getattr(item, "alias", None) else None
        names = [one.sval for one in item.alias.colnames or ()] if alias else []
        if name == "RangeVar":
            yield alias or item.relname, self._table(item, ctes, names)
        elif name == "RangeSubselect":
            output = _renamed(self._query(item.subquery, ctes, scopes), names)
            yield alias or "", Relation(None, dict(output) if output is not None else {})
        elif name == "JoinExpr":
            sides: Scope = {}
            _put(sides, self._relations(item.larg, ctes, scopes))
            _put(sides, self._relations(item.rarg, ctes, ({**scopes[0], **sides}, *scopes[1:])))
            if item.quals is not None:
                self._sources(item.quals, ctes, ({**scopes[0], **sides}, *scopes[1:]))
            yield from sides.items()
        else:
            self._sources(item, ctes, scopes)
            yield alias or "", Relation(None, {})

    def _table(self, item: Any, ctes: Ctes, names: list[str]) -> Relation:
        if not item.schemaname and item.relname in ctes:
            output = _renamed(ctes[item.relname], names)
            return Relation(None, dict(output) if output is not None else {})
        return self._stored(self.name_of(item))

    def _stored(self, table: str) -> Relation:
        columns = self.known.get(table)
        if columns is None:
            return Relation(table, None)
        return Relation(table, {one: frozenset({(table, one)}) for one in columns})

    # -- expressions --

    def _sources(self, node: Any, ctes: Ctes, scopes: tuple[Scope, ...]) -> Sources:
        """The columns that a value is computed from; each of them is read."""
        name = kind(node)
        if name == "ColumnRef":
            found = self._column(node, scopes)
            self._reading(found)
            return found
        if name == "SelectStmt":
            output = self._query(node, ctes, scopes)
            return _NOTHING.union(*(sources for _, sources in output or ()))
        if name in _WRITES:
            self._write(node, ctes, scopes)
            return _NOTHING
        return _NOTHING.union(*(self._sources(child, ctes, scopes) for _, child in children(node)))

    def _column(self, node: Any, scopes: tuple[Scope, ...]) -> Sources:
        parts = [getattr(part, "sval", "*") for part in node.fields]
        column = parts[-1]
        if len(parts) > 1:
            relation = next((scope[parts[-2]] for scope in scopes if parts[-2] in scope), None)
            return (relation.find(column) if relation else None) or _NOTHING
        for scope in scopes:
            closed = [one for one in scope.values() if one.columns is not None and column in one.columns]
            if closed:
                return closed[0].find(column) or _NOTHING if len(closed) == 1 else _NOTHING
            is_known = all(one.columns is not None for one in scope.values())
            if not is_known:
                only = list(scope.values())
                is_column = len(only) == 1 and column not in self.hidden
                return only[0].find(column) or _NOTHING if is_column else _NOTHING
        return _NOTHING

    def _reading(self, found: Sources) -> None:
        for table, column in found:
            self.reads.setdefault(table, set()).add(column)

    # -- statements that write --

    def _write(self, node: Any, ctes: Ctes, outer: tuple[Scope, ...]) -> Output | None:
        """Notes what is written; returns the columns of RETURNING."""
        ctes = self._with(node, ctes, outer)
        table = self.name_of(node.relation)
        alias = node.relation.alias.aliasname if node.relation.alias else node.relation.relname
        scope: Scope = {alias: self._stored(table)}
        name = kind(node)
        if name == "InsertStmt":
            self._insert(node, table, scope, ctes, outer)
        elif name == "UpdateStmt":
            scope.update(self._scope(node.fromClause or (), ctes, (scope, *outer)))
            self._set(table, node.targetList, ctes, (scope, *outer))
        elif name == "MergeStmt":
            scope.update(self._relations(node.sourceRelation, ctes, (scope, *outer)))
            self._merge(node, table, ctes, (scope, *outer))
        else:
            scope.update(self._scope(node.usingClause or (), ctes, (scope, *outer)))
        for condition in (getattr(node, "whereClause", None), getattr(node, "joinCondition", None)):
            if condition is not None:
                self._sources(condition, ctes, (scope, *outer))
        return self._returning(node, ctes, (scope, *outer))

    def _returning(self, node: Any, ctes: Ctes, scopes: tuple[Scope, ...]) -> Output | None:
        clause = getattr(node, "returningClause", None)
        targets = getattr(clause, "exprs", None) or getattr(node, "returningList", None) or ()
        output: Output | None = []
        for target in targets:
            found = self._target(target, ctes, scopes)
            output = None if output is None or found is None else [*output, *found]
        return output

    def _insert(self, node: Any, table: str, scope: Scope, ctes: Ctes, outer: tuple[Scope, ...]) -> None:
        output = self._query(node.selectStmt, ctes, outer) if node.selectStmt is not None else []
        names = [one.name for one in node.cols or ()] or list(self.known.get(table, ()))
        pairs = list(zip(names, (sources for _, sources in output or ()), strict=False))
        self._note(table, pairs)
        clause = node.onConflictClause
        if clause is not None and clause.targetList:
            excluded = Relation(None, dict(pairs))
            scopes = ({**scope, "excluded": excluded}, *outer)
            self._set(table, clause.targetList, ctes, scopes)
            if clause.whereClause is not None:
                self._sources(clause.whereClause, ctes, scopes)

    def _merge(self, node: Any, table: str, ctes: Ctes, scopes: tuple[Scope, ...]) -> None:
        for clause in node.mergeWhenClauses or ():
            if clause.condition is not None:
                self._sources(clause.condition, ctes, scopes)
            if clause.values:
                names = [one.name for one in clause.targetList or ()] or list(self.known.get(table, ()))
                values = [self._sources(one, ctes, scopes) for one in clause.values]
                self._note(table, zip(names, values, strict=False))
            elif clause.targetList:
                self._set(table, clause.targetList, ctes, scopes)

    def _set(self, table: str, targets: Iterable[Any], ctes: Ctes, scopes: tuple[Scope, ...]) -> None:
        for target in targets:
            sources = self._sources(target.val, ctes, scopes) if target.val is not None else _NOTHING
            self._note(table, [(target.name, sources)])


def _put(scope: Scope, relations: Iterable[tuple[str, Relation]]) -> None:
    """Adds relations; tables of one name and several schemas are all there, and their columns told apart."""
    for name, relation in list(relations):
        scope[name if name not in scope else f"{name} {len(scope)}"] = relation


def _renamed(output: Output | None, names: list[str]) -> Output | None:
    if output is None or not names:
        return output
    return [
        (names[index] if index < len(names) else name, sources)
        for index, (name, sources) in enumerate(output)
    ]


def _implied_name(value: Any) -> str:
    while kind(value) == "TypeCast":
        value = value.arg
    if kind(value) == "ColumnRef":
        return str(getattr(value.fields[-1], "sval", ""))
    if kind(value) == "FuncCall":
        return str(value.funcname[-1].sval)
    return {"CoalesceExpr": "coalesce", "CaseExpr": "case"}.get(kind(value), "")


def without_intermediates(
    derived: Mapping[str, Mapping[str, Collection[Column]]], temporary: Collection[str]
) -> dict[str, dict[str, set[Column]]]:
    """What lasting tables are computed from; in place of temporary ones what those are computed from."""

    def origin(column: Column, seen: frozenset[Column]) -> set[Column]:
        if column[0] not in temporary:
            return {column}
        inner = derived.get(column[0], {}).get(column[1], ())
        return {found for one in inner if one not in seen for found in origin(one, seen | {column})}

    return {
        table: {
            name: {found for one in sources for found in origin(one, frozenset())}
            for name, sources in columns.items()
        }
        for table, columns in derived.items()
        if table not in temporary
    }
