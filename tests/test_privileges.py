"""Who may use what: every routine, table and view against every role, as tests/privileges.yaml says it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import yaml

from tests.servers import Connection, Database

EXPECTED: Final = yaml.safe_load((Path(__file__).parent / "privileges.yaml").read_text(encoding="utf-8"))
INCLUDES: Final = {
    "etl_reader": {"etl_reader"},
    "etl_operator": {"etl_reader", "etl_operator"},
    "etl_admin": {"etl_reader", "etl_operator", "etl_admin"},
    "etl_owner": {"etl_reader", "etl_owner"},
    "etl_frontend": set[str](),
    "public": set[str](),
}
"""Each role, with the roles whose lines count for it."""
CALLERS: Final = [role for role in INCLUDES if role != "public"]
WRITES: Final = ("INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")

ROUTINES: Final = """
select p.proname, p.oid::int8, p.prokind, p.oid::regprocedure::text,
       array(select format_type(t, null)
               from unnest(coalesce(p.proallargtypes, p.proargtypes::oid[]), p.proargmodes) u(t, m)
              where m is null or m in ('i', 'b', 'v'))
  from pg_proc p where p.pronamespace = 'etl'::regnamespace"""
RELATIONS: Final = """
select relname, oid::int8, relkind from pg_class
 where relnamespace = 'etl'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'S', 'f')"""


def lines_of(name: str) -> set[str]:
    """The roles whose lines name a routine, and do not take it out again."""
    return {
        role
        for role, kinds in EXPECTED["routines"].items()
        for patterns in kinds.values()
        if f"!{name}" not in patterns and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def test_every_routine_may_be_called_by_exactly_those_whose_line_names_it(db: Database) -> None:
    conn = db.connect()
    found, expected = {}, {}
    for name, oid, _, signature, _ in conn.execute(ROUTINES.encode()).fetchall():
        for role, included in INCLUDES.items():
            query = "select has_function_privilege(%s, %s::oid, 'execute')"
            found[signature, role] = conn.execute(query, [role, oid]).fetchone() == (True,)
            expected[signature, role] = bool(lines_of(name) & included)
    assert found == expected
    assert len(found) > 1000


def test_no_line_names_a_routine_or_a_relation_that_is_not_there(db: Database) -> None:
    conn = db.connect()
    routines = {name for name, *_ in conn.execute(ROUTINES.encode())}
    patterns = [p for kinds in EXPECTED["routines"].values() for one in kinds.values() for p in one]
    assert [p for p in patterns if not any(fnmatchcase(name, p.removeprefix("!")) for name in routines)] == []
    assert {name for kinds in EXPECTED["routines"].values() for name in kinds.get("verbs", ())} == {
        name for name in routines if not name.startswith("_")
    }


def test_every_table_and_view_has_a_line_is_read_by_readers_and_written_by_nobody(db: Database) -> None:
    conn = db.connect()
    kinds = {"tables": {"r", "p", "m", "f"}, "views": {"v"}}
    relations = conn.execute(RELATIONS.encode()).fetchall()
    for title, relkinds in kinds.items():
        found = {name for name, _, kind in relations if kind in relkinds}
        months = {name for name in found if name.startswith("step_logs_p")}
        assert found - months == set(EXPECTED["relations"][title])
        assert len(months) == (2 if title == "tables" else 0)
    rights = [*WRITES, *(["MAINTAIN"] if db.server.major >= 17 else [])]
    wrong = []
    for name, oid, kind in relations:
        for role, included in INCLUDES.items():
            if kind == "S":
                query = "select has_sequence_privilege(%s, %s::oid, 'USAGE, SELECT, UPDATE')"
                wanted = [(query, False)]
            else:
                reads = bool(included)
                writes = f"select has_table_privilege(%s, %s::oid, '{', '.join(rights)}')"
                columns = "select has_any_column_privilege(%s, %s::oid, 'INSERT, UPDATE, REFERENCES')"
                wanted = [
                    ("select has_table_privilege(%s, %s::oid, 'SELECT')", reads),
                    ("select has_any_column_privilege(%s, %s::oid, 'SELECT')", reads),
                    (writes, False),
                    (columns, False),
                ]
            wrong += [
                (role, name, query)
                for query, right in wanted
                if conn.execute(query, [role, oid]).fetchone() != (right,)
            ]
    assert wrong == []


def test_nobody_but_the_engine_creates_anything_in_the_schema_and_types_are_not_public(db: Database) -> None:
    conn = db.connect()
    for role, included in INCLUDES.items():
        query = "select has_schema_privilege(%s, 'etl', 'usage'), has_schema_privilege(%s, 'etl', 'create')"
        assert conn.execute(query, [role, role]).fetchone() == (bool(included), False)
    open_types = """
      select t.typname from pg_type t
       where t.typnamespace = 'etl'::regnamespace and has_type_privilege('public', t.oid, 'usage')
         and (t.typtype in ('d', 'e')
              or exists (select from pg_class c where c.oid = t.typrelid and c.relkind = 'c'))"""
    assert conn.execute(open_types).fetchall() == []


def refusal(conn: Connection, kind: str, statement: str) -> psycopg.Error | None:
    """The error of a call; nothing of it stays. What ends transactions is called outside of one."""
    try:
        if kind == "p":
            conn.execute(statement.encode())
        else:
            with conn.transaction(force_rollback=True):
                conn.execute(statement.encode())
    except psycopg.Error as error:
        return error
    return None


@pytest.mark.parametrize("role", CALLERS)
def test_every_routine_called_as_every_role_is_refused_unless_it_is_granted(db: Database, role: str) -> None:
    """With null for each argument: what is granted answers something else than a missing right."""
    conn = db.connect(options="-c statement_timeout=20s")
    routines = conn.execute(ROUTINES.encode()).fetchall()
    conn.execute(f"set role {role}".encode())
    wrong: list[Any] = []
    for name, _, kind, signature, types in routines:
        # A call with constants alone may be answered before anybody looks at rights.
        arguments = ", ".join(f"null::{one}" if kind == "p" else f"(select null::{one})" for one in types)
        error = refusal(conn, kind, f"{'call' if kind == 'p' else 'select'} etl.{name}({arguments})")
        message = str(error.diag.message_primary) if error else ""
        is_denied = (
            error is not None and error.sqlstate == "42501" and message.startswith("permission denied")
        )
        if is_denied != (not lines_of(name) & INCLUDES[role]):
            wrong.append((signature, message))
    assert wrong == []


@pytest.mark.parametrize("role", CALLERS)
def test_every_table_and_view_is_read_by_those_who_may_and_written_by_none(db: Database, role: str) -> None:
    conn = db.connect()
    names = [(name, kind) for name, _, kind in conn.execute(RELATIONS.encode()) if kind != "S"]
    conn.execute(f"set role {role}".encode())
    for name, kind in names:
        error = refusal(conn, "f", f"select * from etl.{name} limit 1")
        assert (error is None) is bool(INCLUDES[role]), (name, error)
        statements = [f"delete from etl.{name}", f"insert into etl.{name} default values"]
        statements += [f"truncate etl.{name}"] if kind != "v" else []
        for statement in statements:
            error = refusal(conn, "f", statement)
            # A view that could not be written by anybody says so before it looks at rights.
            assert error is not None, statement
            assert error.sqlstate in (("42501", "55000") if kind == "v" else ("42501",)), (statement, error)
