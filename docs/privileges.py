"""The page that says who may use what: privileges.md, read from the catalog of a database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import psycopg

ROLES: Final = ("etl_reader", "etl_operator", "etl_admin", "etl_owner", "etl_frontend", "public")
"""Everybody but etl_engine, whose all of it is."""

_INTRODUCTION: Final = """\
# Privileges

Every routine, table and view of schema `etl`, and what each role may do with it, as the catalog has it.
Generated: `make docs`. What the roles are for: [install.md](install.md#roles).

`etl_engine` owns the schema; nobody logs in as it, and no step runs as it. `etl_owner` is the role as
which steps run. `etl_frontend` marks the login of a front end ([http-api.md](http-api.md)) and has no
right of its own. PUBLIC has none on anything.

Whoever is not granted a routine gets SQLSTATE 42501 from it. A helper that a role may call is one that
its verbs are made of: those that end transactions run as their caller, and PostgreSQL wants the caller
to have the right on what they call. Each of them refuses to be called out of turn (42501
`run.not_owned`), or does what the verb does and refuses what it refuses.
"""
_ROUTINES: Final = """
select p.proname, p.proname !~ '^_',
       array(select has_function_privilege(r, p.oid, 'execute')
               from unnest(%s::text[]) with ordinality u(r, n) order by n)
  from pg_proc p
 where p.pronamespace = 'etl'::regnamespace
 order by p.proname, p.oid::regprocedure::text"""
_RELATIONS: Final = """
with kinds(relkind, title, rights) as (
  values ('r', 'table', '{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]),
         ('v', 'view', '{SELECT,INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'),
         ('S', 'sequence', '{USAGE,SELECT,UPDATE}')
)
select c.relname, k.title,
       array(select coalesce((
               select string_agg(lower(q), ', ' order by o) from unnest(k.rights) with ordinality x(q, o)
                where case k.relkind when 'S' then has_sequence_privilege(r, c.oid, q)
                                     else has_table_privilege(r, c.oid, q) end), '')
               from unnest(%s::text[]) with ordinality u(r, n) order by n)
  from pg_class c join kinds k on k.relkind = c.relkind::text
 where c.relnamespace = 'etl'::regnamespace and not c.relispartition
 order by 2, 1"""


def privileges(connection: psycopg.Connection[Any]) -> str:
    """The whole of privileges.md."""
    routines = connection.execute(_ROUTINES.encode(), [list(ROLES)]).fetchall()
    verbs = [(name, held) for name, is_verb, held in routines if is_verb]
    helpers = [(name, held) for name, is_verb, held in routines if not is_verb and any(held)]
    private = [name for name, is_verb, held in routines if not is_verb and not any(held)]
    relations = connection.execute(_RELATIONS.encode(), [list(ROLES)]).fetchall()
    lines = [_INTRODUCTION, "## Verbs", "", *_table("routine", _marks(verbs)), ""]
    lines += ["## Helpers that some role may call", "", *_table("routine", _marks(helpers)), ""]
    lines += [
        "## Helpers that nobody but etl_engine may call",
        "",
        ", ".join(f"`{name}`" for name in private),
        "",
    ]
    for title, kind in (("Views", "view"), ("Tables", "table"), ("Sequences", "sequence")):
        found = [(name, held) for name, one, held in relations if one == kind]
        lines += [f"## {title}", "", *_table(kind, found), ""]
    return "\n".join(lines)


def _marks(rows: Iterable[tuple[str, Sequence[bool]]]) -> list[tuple[str, list[str]]]:
    return [(name, ["yes" if one else "" for one in held]) for name, held in rows]


def _table(title: str, rows: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    lines = [f"| {title} | {' | '.join(ROLES)} |", "|" + " --- |" * (len(ROLES) + 1)]
    return lines + [
        f"| `{name}` |{''.join(f' {one} |' if one else ' |' for one in held)}" for name, held in rows
    ]
