"""The column, trigger and index of the xid strategy: what a table has of them, and the steps to the rest.

`b2s.online` executes the steps, while the table is read and written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg.rows import dict_row

from b2s.db import Connection
from b2s.errors import DatabaseError, UsageError

COLUMN: Final = "etl_xid"
TRIGGER: Final = "etl_touch_xid"
DEFAULT: Final = "pg_catalog.pg_current_xact_id()"
_NAME_LENGTH: Final = 63
_TABLES: Final = ("r", "p")
_KINDS: Final = {
    "v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence", "i": "an index",
    "I": "an index", "c": "a type",
}  # fmt: skip
_TRIGGER_TYPE: Final = 1 | 2 | 4 | 16
"""pg_trigger.tgtype of a trigger for each row, before insert or update."""
_ALWAYS: Final = "A"

_INSTALLED: Final = """
select exists (select from pg_namespace where nspname = 'etl'),
       (select has_schema_privilege(p.pronamespace, 'usage') and has_function_privilege(p.oid, 'execute')
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace
         where n.nspname = 'etl' and p.proname = 'touch_xid')"""
_FOUND: Final = """
select c.oid::int8, format('%%I.%%I', n.nspname, c.relname), c.relkind::text,
       (select i.inhparent::regclass::text from pg_inherits i where i.inhrelid = c.oid and c.relispartition),
       c.relowner::regrole::text, pg_has_role(c.relowner, 'usage'),
       has_table_privilege('etl_owner', c.oid, 'select')
       and has_schema_privilege('etl_owner', n.oid, 'usage')
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where c.oid = to_regclass(%s)"""
_MEMBERS: Final = """
with recursive tree(oid, parent, depth) as (
  select %(oid)s::oid, null::oid, 0
  union all
  select i.inhrelid, i.inhparent, t.depth + 1 from pg_inherits i join tree t on i.inhparent = t.oid
)
select distinct on (t.oid) t.oid::int8, t.parent::int8, t.depth,
       format('%%I.%%I', n.nspname, c.relname) as name, quote_ident(n.nspname) as schema,
       c.relname as relation, c.relkind::text as kind, c.relispartition as is_partition,
       format_type(a.atttypid, null) as column_type,
       coalesce(a.attnotnull, false) as is_not_null, pg_get_expr(d.adbin, d.adrelid) as default,
       (select jsonb_agg(jsonb_build_object('name', quote_ident(g.tgname), 'enabled', g.tgenabled))
          from pg_trigger g
          join pg_proc f on f.oid = g.tgfoid
          join pg_namespace o on o.oid = f.pronamespace
         where g.tgrelid = t.oid and o.nspname = 'etl' and f.proname = 'touch_xid'
           and g.tgtype & 31 = %(tgtype)s) as triggers,
       (select jsonb_agg(jsonb_build_object(
                 'name', quote_ident(x.relname), 'oid', i.indexrelid::int8, 'is_valid', i.indisvalid,
                 'is_plain', i.indnatts = 1 and not i.indisunique,
                 'parent', (select h.inhparent::int8 from pg_inherits h where h.inhrelid = i.indexrelid),
                 'builder', (select max(p.pid) from pg_stat_progress_create_index p
                              where p.index_relid = i.indexrelid))
               order by i.indisvalid desc, i.indexrelid)
          from pg_index i
          join pg_class x on x.oid = i.indexrelid
          join pg_am m on m.oid = x.relam
         where i.indrelid = t.oid and i.indkey[0] = a.attnum and m.amname = 'btree'
           and i.indpred is null) as indexes
  from tree t
  join pg_class c on c.oid = t.oid
  join pg_namespace n on n.oid = c.relnamespace
  left join pg_attribute a on a.attrelid = t.oid and a.attname = %(column)s and not a.attisdropped
  left join pg_attrdef d on d.adrelid = t.oid and d.adnum = a.attnum
 order by t.oid, t.depth"""


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger that calls etl.touch_xid for every row inserted or updated."""

    name: str
    enabled: str
    """pg_trigger.tgenabled: A is always, also for what arrives by replication."""


@dataclass(frozen=True, slots=True)
class Index:
    """An index that leads with the column."""

    name: str
    oid: int
    is_valid: bool
    is_plain: bool
    """It is on this one column, as every part of a partitioned index must be."""
    parent: int | None
    builder: int | None
    """The backend that is building it now."""


@dataclass(frozen=True, slots=True)
class Member:
    """The table, or one of its partitions or children. Names may stand in SQL, but for `relation`."""

    oid: int
    parent: int | None
    depth: int
    name: str
    schema: str
    relation: str
    kind: str
    is_partition: bool
    column_type: str | None
    is_not_null: bool
    default: str | None
    triggers: tuple[Trigger, ...]
    indexes: tuple[Index, ...]

    @property
    def index(self) -> Index | None:
        """The index that serves here; that of a partitioned table is complete only with all its parts."""
        is_part = self.is_partition or self.kind == "p"
        usable = [one for one in self.indexes if one.is_valid or self.kind == "p"]
        return next((one for one in usable if one.is_plain or not is_part), None)


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can have the column, and what it consists of: itself first, then by depth."""

    root: Member
    members: tuple[Member, ...]
    is_readable: bool
    """Whether steps, which run as etl_owner, may read it."""


@dataclass(frozen=True, slots=True)
class Step:
    """Statements that belong together: brief ones in one transaction, others one by one outside any."""

    purpose: str
    statements: tuple[str, ...]
    is_brief: bool


def find_table(connection: Connection, name: str) -> Table:
    """Looks at a table and all that belongs to it.

    Raises UsageError when it cannot have the column, DatabaseError when b2s is not installed or the role
    may not change the table.
    """
    _check_installed(connection)
    try:
        row = connection.execute(_FOUND.encode(), [name]).fetchone()
    except (psycopg.errors.SyntaxError, psycopg.errors.InvalidName):
        row = None
    except psycopg.errors.InsufficientPrivilege as error:
        raise DatabaseError(
            error.diag.message_primary or str(error), f"let the owner of {name} do this", sqlstate="42501"
        ) from error
    if row is None:
        raise UsageError(f"there is no table {name}", "write it as SQL does: schema.table")
    oid, title, kind, parent, owner, is_owner, is_readable = row
    if kind not in _TABLES:
        raise UsageError(
            f"{title} is {_KINDS.get(kind, 'no table')}", "name the table that its rows come from"
        )
    if parent:
        raise UsageError(f"{title} is a partition of {parent}", f"b2s watermark add-column {parent}")
    if not is_owner:
        user = connection.info.user
        raise DatabaseError(
            f"{title} belongs to {owner}, and {user} may not change it",
            f"let its owner do this, or ask for it: grant {owner} to {user}",
            sqlstate="42501",
        )
    members = sorted(_members(connection, oid), key=lambda member: (member.depth, member.name))
    for member in members:
        _check_member(member)
    return Table(members[0], tuple(members), is_readable)


def _check_installed(connection: Connection) -> None:
    row = connection.execute(_INSTALLED.encode()).fetchone()
    has_schema, is_allowed = row or (False, None)
    if is_allowed is None:
        what = "an older release of b2s is installed" if has_schema else "b2s is not installed"
        raise DatabaseError(f"{what} in this database", "b2s migrate", sqlstate="42883")
    if not is_allowed:
        user = connection.info.user
        raise DatabaseError(
            f"{user} may not use schema etl, which holds the trigger function of the column",
            f"let an administrator run: grant etl_reader to {user}",
            sqlstate="42501",
        )


def _members(connection: Connection, oid: int) -> Iterator[Member]:
    arguments = {"oid": oid, "column": COLUMN, "tgtype": _TRIGGER_TYPE}
    with connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(_MEMBERS.encode(), arguments):
            triggers = tuple(Trigger(**one) for one in row.pop("triggers") or ())
            indexes = tuple(Index(**one) for one in row.pop("indexes") or ())
            yield Member(**row, triggers=triggers, indexes=indexes)


def _check_member(member: Member) -> None:
    """Raises UsageError or DatabaseError for what a person has to solve first."""
    if member.kind not in _TABLES:
        raise UsageError(
            f"{member.name}, a part of the table, is {_KINDS.get(member.kind, 'no table')}",
            "its rows carry no transaction of this server: use another strategy",
        )
    if member.column_type not in (None, "xid8"):
        raise UsageError(
            f"{member.name} has a column {COLUMN} of type {member.column_type}",
            f"rename it: alter table {member.name} rename column {COLUMN} to ...",
        )
    if member.column_type and not member.is_not_null:
        raise UsageError(
            f"column {COLUMN} of {member.name} may be null, and a row where it is would never be read",
            f"set it to pg_current_xact_id() in those rows, then: "
            f"alter table {member.name} alter column {COLUMN} set not null",
        )
    for index in member.indexes:
        if index.builder is not None:
            raise DatabaseError(
                f"backend {index.builder} is building index {index.name} on {member.name} now",
                "wait for it: select * from pg_stat_progress_create_index",
                sqlstate="55006",
            )


def plan(table: Table, *, is_insert_only: bool) -> list[Step]:
    """What is missing, in the order in which it is to be done; nothing when all is there."""
    return [*_column_step(table, is_insert_only=is_insert_only), *_index_steps(table)]


def _column_step(table: Table, *, is_insert_only: bool) -> Iterator[Step]:
    """One transaction, so that no row is written with the column and without the trigger.

    The default is one value for all rows that are there: the server notes it once and rewrites nothing.
    """
    root = table.root
    parts, statements = [], []
    if root.column_type is None:
        parts.append(f"column {COLUMN}")
        statements.append(
            f"alter table {root.name} add column if not exists {COLUMN} xid8 not null default {DEFAULT}"
        )
    elif "pg_current_xact_id()" not in (root.default or ""):
        parts.append(f"default of {COLUMN}")
        statements.append(f"alter table {root.name} alter column {COLUMN} set default {DEFAULT}")
    if not is_insert_only:
        triggers = [statement for member in table.members for statement in _trigger(member)]
        parts += ["trigger"] if triggers else []
        statements += triggers
    if statements:
        yield Step(" and ".join(parts), tuple(statements), is_brief=True)


def _trigger(member: Member) -> Iterator[str]:
    """Partitions, those to come too, get the trigger of their parent; other children have their own."""
    if any(one.enabled == _ALWAYS for one in member.triggers):
        return
    if not member.triggers:
        if member.is_partition:
            return
        yield (
            f"create or replace trigger {TRIGGER} before insert or update on {member.name} for each row "
            f"when (new.{COLUMN} is distinct from {DEFAULT}) execute function etl.touch_xid()"
        )
    name = member.triggers[0].name if member.triggers else TRIGGER
    yield f"alter table {member.name} enable always trigger {name}"


def _index_steps(table: Table) -> Iterator[Step]:
    """Partitioned tables first, so that partitions made meanwhile have the index from the start."""
    if table.root.kind == "p" and any(index.is_valid for index in table.root.indexes):
        return
    for member in table.members:
        if member.index is None and member.kind == "p":
            statement = f"create index {_index_name(member)} on only {member.name} ({COLUMN})"
            yield Step(f"index of {member.name}", (statement,), is_brief=True)
    for member in table.members:
        if member.index is None and member.kind == "r":
            unfinished = [one.name for one in member.indexes if not one.is_valid and one.is_plain]
            drops = [f"drop index concurrently {member.schema}.{name}" for name in unfinished]
            create = f"create index concurrently {_index_name(member)} on {member.name} ({COLUMN})"
            yield Step(f"index on {member.name}", (*drops, create), is_brief=False)
    by_oid = {member.oid: member for member in table.members}
    for member in sorted(table.members, key=lambda one: -one.depth):
        if member.is_partition and member.parent is not None:
            yield from _attach(member, by_oid[member.parent])


def _attach(member: Member, parent: Member) -> Iterator[Step]:
    """The index of a partition becomes a part of that of its parent."""
    own, above = member.index, parent.index
    if own and above and own.parent == above.oid:
        return
    name, target = (
        f"{one.schema}.{one.index.name if one.index else _index_name(one)}" for one in (member, parent)
    )
    statement = f"alter index {target} attach partition {name}"
    yield Step(f"index of {member.name} into that of {parent.name}", (statement,), is_brief=True)


def _index_name(member: Member) -> str:
    """`orders_etl_xid_idx`, ready to stand in SQL; a long name is cut and gets its hash, to stay its own."""
    suffix = f"_{COLUMN}_idx"
    name = member.relation + suffix
    if len(name.encode()) > _NAME_LENGTH:
        suffix = f"_{hashlib.sha256(name.encode()).hexdigest()[:8]}{suffix}"
        name = member.relation.encode()[: _NAME_LENGTH - len(suffix)].decode(errors="ignore") + suffix
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'
