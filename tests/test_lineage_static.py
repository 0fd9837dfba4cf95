"""Lineage out of the SQL: tables and columns, read and written, through temporary tables and called functions."""

from __future__ import annotations

from typing import Any, Final

import pytest

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.importer.classify import classify
from b2s.importer.document import document
from b2s.importer.infer import infer
from b2s.importer.inventory import inventory_of
from b2s.importer.split import split
from b2s.lineage.static import Analysis, Static, lookup_in
from b2s.lint.frontend import read
from b2s.lint.project import Project
from b2s.lint.sources import Source
from b2s.names import parts_of
from tests.test_lint_robustness import mutations

TABLES: Final = {"silver.known": ["id", "name", "amount"], "bronze.known": ["id", "label"]}


def static(sql: str, tables: dict[str, list[str]] | None = None, search_path: tuple[str, ...] = ()) -> Static:
    """The lineage of the last routine of a text."""
    project = Project([read(Source("x.sql", sql))])
    assert [routine.failures for one in project.parsed for routine in one.routines] == [[]] * len(
        project.steps
    )
    return Analysis(lookup_in(project), TABLES if tables is None else tables, search_path).of(
        project.steps[-1]
    )


def body(statements: str, more: str = "") -> str:
    return (
        f"create function silver.load(p_since timestamptz) returns void language plpgsql {more} as $$"
        f" declare v bigint; r record; begin {statements}; end $$;"
    )


def reads(statements: str, **options: Any) -> dict[str, list[str]]:
    return {table: sorted(columns) for table, columns in static(body(statements), **options).reads.items()}


def derived(statements: str, **options: Any) -> dict[str, dict[str, list[str]]]:
    """For each table what its columns are made of."""
    writes = static(body(statements), **options).writes
    return {
        table: {name: sorted(".".join(one) for one in sources) for name, sources in columns.items()}
        for table, columns in writes.items()
    }


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("perform a.x, b.y from bronze.a a join bronze.b b on a.k = b.k where a.z > p_since",
         {"bronze.a": ["k", "x", "z"], "bronze.b": ["k", "y"]}),
        ("perform x from bronze.a where y = v and p_since is null", {"bronze.a": ["x", "y"]}),
        ("perform x from bronze.a, bronze.b", {"bronze.a": [], "bronze.b": []}),
        ("perform label from bronze.known, silver.known", {"bronze.known": ["label"], "silver.known": []}),
        ("perform id from bronze.known, silver.known", {"bronze.known": [], "silver.known": []}),
        ("perform * from bronze.known", {"bronze.known": ["id", "label"]}),
        ("perform k.* from bronze.known k", {"bronze.known": ["id", "label"]}),
        ("perform * from bronze.a", {"bronze.a": []}),
        ("perform q.n from (select name as n from silver.known) q", {"silver.known": ["name"]}),
        ("with a as (select id from bronze.known) select max(a.id) into v from a", {"bronze.known": ["id"]}),
        ("perform from bronze.a where exists (select from bronze.b where b.k = a.k)", {"bronze.a": ["k"], "bronze.b": ["k"]}),
        ("for r in select label from bronze.known loop null; end loop", {"bronze.known": ["label"]}),
        ("execute 'select label from bronze.known where id = $1' into v using 1", {"bronze.known": ["id", "label"]}),
        ("perform f.x from bronze.f(1) f", {}),
        ("perform a.x from bronze.a a cross join lateral (select b.y from bronze.b b where b.k = a.k) q", {"bronze.a": ["k", "x"], "bronze.b": ["k", "y"]}),
    ],
)  # fmt: skip
def test_columns_that_are_read(statement: str, expected: dict[str, list[str]]) -> None:
    assert reads(statement) == expected


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("insert into silver.t (a, b) select x.i, x.j + y.k from bronze.x x, bronze.y y",
         {"silver.t": {"a": ["bronze.x.i"], "b": ["bronze.x.j", "bronze.y.k"]}}),
        ("insert into silver.known select id, label from bronze.known",
         {"silver.known": {"id": ["bronze.known.id"], "name": ["bronze.known.label"]}}),
        ("insert into silver.known select * from bronze.known",
         {"silver.known": {"id": ["bronze.known.id"], "name": ["bronze.known.label"]}}),
        ("insert into silver.t (a) values (v)", {"silver.t": {"a": []}}),
        ("insert into silver.t as t (a, n) select x.i, 1 from bronze.x x on conflict (a) do update set n = t.n + excluded.a",
         {"silver.t": {"a": ["bronze.x.i"], "n": ["bronze.x.i", "silver.t.n"]}}),
        ("update silver.t t set a = x.i from bronze.x x where x.k = t.k", {"silver.t": {"a": ["bronze.x.i"]}}),
        ("merge into silver.t t using bronze.x x on x.k = t.k when matched then update set a = x.i"
         " when not matched then insert (k, a) values (x.k, x.j)",
         {"silver.t": {"a": ["bronze.x.i", "bronze.x.j"], "k": ["bronze.x.k"]}}),
        ("insert into silver.t (a) select i from bronze.x union all select j from bronze.y",
         {"silver.t": {"a": ["bronze.x.i", "bronze.y.j"]}}),
        ("with recursive w as (select id from bronze.known union select w.id from w) insert into silver.t (a) select w.id from w",
         {"silver.t": {"a": ["bronze.known.id"]}}),
        ("with moved as (delete from bronze.x returning i) insert into silver.t (a) select moved.i from moved",
         {"bronze.x": {}, "silver.t": {"a": ["bronze.x.i"]}}),
        ("insert into silver.t (a) select (select max(y.j) from bronze.y y where y.k = x.k) from bronze.x x",
         {"silver.t": {"a": ["bronze.y.j"]}}),
        ("create temp table s as select x.i as n from bronze.x x; create temp table u on commit drop as select s.n as m from s;"
         " insert into silver.t (a) select u.m from u",
         {"silver.t": {"a": ["bronze.x.i"]}}),
        ("create table silver.c as select x.i from bronze.x x", {"silver.c": {"i": ["bronze.x.i"]}}),
        ("execute format('insert into silver.%I (a) select x.i from bronze.x x', 'dyn')", {"silver.dyn": {"a": ["bronze.x.i"]}}),
        ("truncate silver.t", {"silver.t": {}}),
        ('insert into silver."Order" ("A") select x."I" from bronze."user" x', {'silver."Order"': {"A": ['bronze."user".I']}}),
    ],
)  # fmt: skip
def test_columns_that_are_written_and_what_they_are_made_of(
    statement: str, expected: dict[str, dict[str, list[str]]]
) -> None:
    assert derived(statement) == expected


def test_functions_that_are_called_count_and_those_that_call_each_other_end() -> None:
    found = static("""
        create function silver.b() returns int language sql as $$ select silver.a() from bronze.b $$;
        create function silver.a() returns int language sql as $$ select silver.b() from bronze.a $$;
        create procedure silver.p() language plpgsql as $$ begin delete from silver.p where true; end $$;
        create procedure silver.load() language plpgsql as $$ begin perform silver.a(); call silver.p(); end $$;
    """)
    assert set(found.reads) == {"bronze.a", "bronze.b"}
    assert set(found.writes) == {"silver.p"}


def test_a_name_without_schema_is_looked_up_where_the_routine_looks_it_up() -> None:
    assert reads("perform id from known", search_path=("elsewhere", "silver")) == {"silver.known": ["id"]}
    found = static(body("perform id from known", more="set search_path = bronze, silver"))
    assert set(found.reads) == {"bronze.known"}
    assert (
        reads("create temp table known as select 1 as id; perform id from known", search_path=("silver",))
        == {}
    )


@pytest.mark.parametrize(
    ("statement", "is_complete"),
    [("perform 1", True), ("execute 'select 1'", True), ("execute (select q from silver.t)", False)],
)
def test_text_known_at_run_time_only_makes_it_incomplete(statement: str, is_complete: bool) -> None:
    assert static(body(statement)).is_complete is is_complete


def test_bodies_in_the_form_of_the_standard() -> None:
    found = static(
        "create function silver.load() returns void language sql begin atomic"
        " insert into silver.t (a) select x.i from bronze.x x; end;"
    )
    assert found.writes == {"silver.t": {"a": {("bronze.x", "i")}}}


def test_the_document_is_what_the_database_takes() -> None:
    found = static(body("insert into silver.t (a, b) select x.i, 1 from bronze.x x"))
    assert found.document() == {
        "is_complete": True,
        "relations": [
            {"relation": "bronze.x", "access": "read", "columns": ["i"]},
            {"relation": "silver.t", "access": "write", "columns": ["a", "b"], "derived_from": {"a": ["bronze.x.i"]}},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.b", ["a", "b"]), ('a."B.c"', ["a", "B.c"]), ('"a""b".c.d', ['a"b', "c", "d"])],
)
def test_parts_of_a_name(name: str, parts: list[str]) -> None:
    assert parts_of(name) == parts


# -- broken SQL --


@pytest.mark.parametrize("seed", range(100, 104))
def test_mutated_sql_crashes_neither_lineage_nor_import(seed: int) -> None:
    for text in mutations(seed):
        inventory = inventory_of([Source("x.sql", text)], [])
        judged = classify(inventory)
        inferred = infer(inventory, judged)
        for one in judged:
            one.found.static.document()
            if len(one.targets) > 1:
                split(one, [])
        document(inventory, judged, inferred, "p")
