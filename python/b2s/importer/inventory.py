"""What there is to import: routines with their lineage, tables, views and materialized views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from b2s.db import Connection
from b2s.lineage.static import Analysis, Static, lookup_in
from b2s.lint.access import accesses_of
from b2s.lint.database import read_sources
from b2s.lint.frontend import Parsed, read, type_name
from b2s.lint.model import Argument, Expr, Routine
from b2s.lint.parser import kind
from b2s.lint.project import Project, Step
from b2s.lint.sources import Source
from b2s.names import quoted

_TABLES: Final = """
select format('%I.%I', n.nspname, c.relname), a.attname, format_type(a.atttypid, null)
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relkind in ('r', 'p', 'v', 'm', 'f') and c.oid >= 16384 and c.relpersistence <> 't'
   and n.nspname not in ('etl', 'information_schema')
 order by 1, a.attnum"""
_KEYS: Final = """
select format('%I.%I', n.nspname, c.relname), format('%I.%I', m.nspname, r.relname)
  from pg_catalog.pg_constraint k
  join pg_catalog.pg_class c on c.oid = k.conrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_class r on r.oid = k.confrelid join pg_catalog.pg_namespace m on m.oid = r.relnamespace
 where k.contype = 'f'"""
_VIEWS: Final = """
select distinct format('%I.%I', n.nspname, v.relname), v.relkind = 'm', format('%I.%I', m.nspname, c.relname)
  from pg_catalog.pg_rewrite w
  join pg_catalog.pg_class v on v.oid = w.ev_class and v.relkind in ('v', 'm') and v.oid >= 16384
  join pg_catalog.pg_namespace n on n.oid = v.relnamespace and n.nspname <> 'etl'
  left join pg_catalog.pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = w.oid
   and d.refclassid = 'pg_class'::regclass and d.refobjid <> v.oid
  left join pg_catalog.pg_class c on c.oid = d.refobjid and c.relkind in ('r', 'p', 'v', 'm', 'f')
  left join pg_catalog.pg_namespace m on m.oid = c.relnamespace
 order by 1, 3"""
_OTHERS: Final = """
select format('%%I.%%I(%%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)), l.lanname
  from pg_catalog.pg_proc p
  join pg_catalog.pg_namespace n on n.oid = p.pronamespace
  join pg_catalog.pg_language l on l.oid = p.prolang
 where p.prokind in ('f', 'p') and l.lanname not in ('sql', 'plpgsql') and n.nspname = any (%s)
   and not exists (select from pg_catalog.pg_depend d where d.objid = p.oid and d.deptype = 'e')
 order by 1"""
_PATH: Final = "select array(select unnest(current_schemas(false)))"


@dataclass(frozen=True, slots=True)
class Found:
    """A routine with its place and its lineage. `signature` picks it among overloads; `static` counts what it
    calls, `own` does not.
    """

    step: Step
    name: str
    signature: str
    own: Static
    static: Static
    calls: tuple[str, ...]

    @property
    def routine(self) -> Routine:
        """The routine as it is written."""
        return self.step.routine


@dataclass(slots=True)
class Inventory:
    """Everything that was found. `views` and `materialized` say what each reads."""

    origin: str
    routines: list[Found] = field(default_factory=list)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    references: dict[str, set[str]] = field(default_factory=dict)
    views: dict[str, set[str]] = field(default_factory=dict)
    materialized: dict[str, set[str]] = field(default_factory=dict)
    search_path: tuple[str, ...] = ()
    foreign: list[tuple[str, str]] = field(default_factory=list)
    parsed: list[Parsed] = field(default_factory=list)

    def behind(self, relations: Iterable[str], *, through_materialized: bool = False) -> set[str]:
        """These relations and what is read by whoever reads them, through views."""
        found = set(relations)
        waiting = list(found)
        while waiting:
            name = waiting.pop()
            inner = set(self.views.get(name, ()))
            if through_materialized:
                inner |= self.materialized.get(name, set())
            waiting += inner - found
            found |= inner
        return found


# -- from a database --


def read_inventory(connection: Connection, schemas: Iterable[str]) -> Inventory:
    """What a database holds; of its routines those of these schemas, all if none is named."""
    wanted = list(schemas)
    inventory = Inventory(f"database {connection.info.dbname}")
    row = connection.execute(_PATH).fetchone()
    path = [one for one in (row[0] if row else ()) if one != "pg_catalog"]
    inventory.search_path = tuple(dict.fromkeys([*path, *wanted]))
    for table, column, type_ in connection.execute(_TABLES.encode()):
        inventory.columns.setdefault(table, {})[column] = type_
    for table, referenced in connection.execute(_KEYS.encode()):
        inventory.references.setdefault(table, set()).add(referenced)
    for view, is_materialized, relation in connection.execute(_VIEWS.encode()):
        target = inventory.materialized if is_materialized else inventory.views
        target.setdefault(view, set()).update([relation] if relation else [])
    sources = read_sources(connection)
    _add_routines(inventory, [read(source) for source in sources.values()], wanted)
    schemas_read = wanted or sorted({one.routine.schema for one in inventory.routines})
    inventory.foreign = connection.execute(_OTHERS, [schemas_read]).fetchall()
    return inventory


def _add_routines(inventory: Inventory, parsed: list[Parsed], schemas: list[str]) -> None:
    inventory.parsed = parsed
    project = Project(parsed)
    tables = {table: list(columns) for table, columns in inventory.columns.items()}
    analysis = Analysis(lookup_in(project), tables, inventory.search_path)
    signatures = {id(step): signature_of(step.routine) for step in project.steps}
    for step in project.steps:
        routine = step.routine
        if schemas and routine.schema not in schemas:
            continue
        calls = {signatures[id(one)] for one in analysis.callees(step)} - {signatures[id(step)]}
        name = f"{quoted(routine.schema)}.{quoted(routine.name)}" if routine.schema else quoted(routine.name)
        inventory.routines.append(
            Found(
                step, name, signatures[id(step)], analysis.own(step), analysis.of(step), tuple(sorted(calls))
            )
        )


def signature_of(routine: Routine) -> str:
    """schema.name(types of the inputs), as the server writes it."""
    if routine.source.is_database:
        return routine.source.path
    name = f"{quoted(routine.schema)}.{quoted(routine.name)}" if routine.schema else quoted(routine.name)
    return f"{name}({', '.join(_type(one) for one in routine.arguments if one.is_input)})"


_SPELLED: Final = {
    "int2": "smallint", "int4": "integer", "int8": "bigint", "bool": "boolean",
    "varchar": "character varying", "bpchar": "character", "float4": "real", "float8": "double precision",
    "timestamptz": "timestamp with time zone", "timestamp": "timestamp without time zone",
    "timetz": "time with time zone", "time": "time without time zone",
}  # fmt: skip


def _type(argument: Argument) -> str:
    base = argument.type.removesuffix("[]")
    return _SPELLED.get(base, base) + argument.type[len(base) :]


# -- from files --


def inventory_of(sources: Iterable[Source], schemas: Iterable[str]) -> Inventory:
    """What files of SQL hold: routines, and the tables and views that they create."""
    given = list(sources)
    inventory = Inventory(f"{given[0].path}" if len(given) == 1 else f"{len(given)} files")
    parsed = [read(source) for source in given]
    for one in parsed:
        for statement in one.statements:
            _add_statement(inventory, statement)
    inventory.search_path = tuple(schemas)
    _add_routines(inventory, parsed, list(schemas))
    return inventory


def _add_statement(inventory: Inventory, statement: Expr) -> None:
    node = statement.node.stmt if kind(statement.node) == "RawStmt" else statement.node
    if kind(node) == "CreateStmt":
        table = _name(node.relation)
        inventory.columns[table] = {
            one.colname: _SPELLED.get(type_name(one.typeName), type_name(one.typeName))
            for one in node.tableElts or ()
            if kind(one) == "ColumnDef"
        }
        inventory.references.setdefault(table, set()).update(_referenced(node))
    elif kind(node) == "AlterTableStmt":
        inventory.references.setdefault(_name(node.relation), set()).update(_referenced(node))
    elif kind(node) == "ViewStmt":
        inventory.views[_name(node.view)] = set(_reads(node.query))
    elif kind(node) == "CreateTableAsStmt" and node.objtype.name == "OBJECT_MATVIEW":
        inventory.materialized[_name(node.into.rel)] = set(_reads(node.query))


def _referenced(node: Any) -> Iterator[str]:
    from b2s.lint.parser import walk

    for visit in walk(node):
        if visit.kind == "Constraint" and visit.node.pktable is not None:
            yield _name(visit.node.pktable)


def _reads(query: Any) -> Iterator[str]:
    """The tables of a query: it is judged as a routine with this one statement would be."""
    from b2s.lint.model import Stmt

    probe = Routine(Source("", ""), 0, "", "", "function", "sql", [], None, False, False, None)
    probe.statements = [Stmt("execsql", 0, [Expr(query, lambda location: location, 0)])]
    for access in accesses_of(probe):
        yield f"{quoted(access.schema)}.{quoted(access.name)}" if access.schema else quoted(access.name)


def _name(relation: Any) -> str:
    return (
        f"{quoted(relation.schemaname)}.{quoted(relation.relname)}"
        if relation.schemaname
        else quoted(relation.relname)
    )
