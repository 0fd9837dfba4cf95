"""`b2s lint` on broken, cut and odd SQL: findings, never a crash, and every place inside the file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.lint.engine import lint
from b2s.lint.frontend import read
from b2s.lint.sources import Source
from b2s.lint.sqltext import pieces

PROJECT: Final = Path(__file__).resolve().parents[1]
CORPUS: Final = sorted((PROJECT / "tests" / "lint_corpus").glob("*.sql"))
OURS: Final = PROJECT / "plpgsql" / "api" / "backfill.sql"
TEXTS: Final = [path.read_text(encoding="utf-8") for path in [*CORPUS, OURS]]
WORDS: Final = [
    "$$",
    "'",
    '"',
    "(",
    ")",
    ";",
    "begin",
    "end",
    "declare",
    "if",
    "loop",
    "execute",
    "format('%s', 1)",
    "--",
    "/*",
    "*/",
    "\\",
    "\x00",
    "é",
    "😀",
    "\t",
    ":=",
    "||",
    "%",
    ":x",
    "[",
    "]",
    "case",
    "null",
    "$1",
    "E'",
    "atomic",
]
ROUNDS: Final = 150


def survives(text: str) -> None:
    """Lint reads a text to its end; every finding has a place in it."""
    source = Source("x.sql", text)
    lines = text.split("\n")
    for one in lint([source]).findings:
        assert 1 <= one.line <= len(lines)
        assert 1 <= one.column <= len(lines[one.line - 1]) + 1
        assert one.message


def mutations(seed: int) -> Iterator[str]:
    """Texts of the corpus with something cut out, doubled, moved or put in."""
    chance = random.Random(seed)
    for _ in range(ROUNDS):
        text = chance.choice(TEXTS)
        begin = chance.randrange(max(1, len(text) - 1500))
        text = text[begin : begin + 1500] if chance.random() < 0.5 else text[: begin + 1]
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(text) + 1)
            to = min(len(text), at + chance.randint(0, 30))
            how = chance.randrange(4)
            if how == 0:
                text = text[:at] + text[to:]
            elif how == 1:
                text = text[:at] + chance.choice(WORDS) + text[at:]
            elif how == 2:
                text = text[:at] + text[at:to] * 2 + text[to:]
            else:
                text = text[:at] + text[at:to][::-1] + text[to:]
        yield text


@pytest.mark.parametrize("seed", range(6))
def test_mutated_sql_never_crashes_it(seed: int) -> None:
    for text in mutations(seed):
        survives(text)


def test_sql_that_ends_anywhere_never_crashes_it() -> None:
    text = TEXTS[0]
    for end in range(0, len(text), 41):
        survives(text[:end])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n\n",
        ";;;",
        "-- only a comment",
        "/* never closed",
        "select 'never closed",
        "create function f() returns int language plpgsql as $$ never closed",
        "create function f() returns int language plpgsql as '';",
        "create function f() returns int language plpgsql as $$$$;",
        "create function f() returns int language sql as $$$$;",
        "create function f() returns int language sql as $$ -- nothing $$;",
        "create function f() returns int as $$ select 1 $$;",
        "create function f() returns int language plpgsql as $$ #option dump\nbegin return 1; end $$;",
        "create function f() returns int language plpgsql as $x$ begin return '$b2s_body$'; end $x$;",
        "create function f() returns int language plpython3u as $$ import os $$;",
        "select 1 where x = :variable and y = :'text' and :{?z} \\gexec",
        "\\set ON_ERROR_STOP on\n\\i other.sql\nselect 1;",
        "copy t from stdin;\n1\t'\n\\.\nselect 1;",
        "do $$ begin perform 1; end $$;",
        "\ufeffselect 1;",
    ],
)
def test_odd_files_never_crash_it(text: str) -> None:
    survives(text)


def test_what_nests_too_deeply_is_a_finding() -> None:
    deep_sql = "select " + "(" * 50_000 + "1" + ")" * 50_000
    deep_blocks = "begin " * 3000 + "null;" + " end;" * 3000
    deep_chain = " || ".join(["'x'"] * 20_000)
    for body in (f"begin perform 1; {deep_sql}; end", deep_blocks, f"begin execute {deep_chain}; end"):
        survives(f"create function s.f() returns int language plpgsql as $x$ {body} $x$;")
    survives(deep_sql)


def test_a_broken_statement_hides_no_other() -> None:
    text = (
        "select from where;\n"
        "create function s.a() returns bigint language sql as $$ select count(*) from t $$;\n"
        "selec 1;\n"
        "create function s.b() returns bigint language sql as $$ select count(*) from u $$;\n"
    )
    assert [(one.line, one.code) for one in lint([Source("x.sql", text)]).findings] == [
        (1, "B001"),
        (2, "B503"),
        (3, "B001"),
        (4, "B503"),
    ]


def test_what_only_psql_understands_is_passed_over() -> None:
    text = (
        "\\set ON_ERROR_STOP on\n"
        "select :'name', :\"column\", :value;\n"
        "copy t from stdin;\n1\tit's\n\\.\n"
        "select format('select %s', 1) \\gexec\n"
        "\\if :ready\nselect a[1:2], b::text;\n\\endif\n"
    )
    assert [piece.failure for piece in pieces(text)] == [None] * 4


@pytest.mark.parametrize("body", ["$$%s$$", "$x$%s$x$", "'%s'", "E'%s'"])
def test_every_statement_knows_its_place_however_the_body_is_quoted(body: str) -> None:
    inner = (
        "\ndeclare v int := 1; r silver.t%rowtype;\nbegin\n  if 'x' = 'x' then delete from a; end if;\n"
        "  v := v + 1; select b.x into r from b where b.é = v;\n  perform f(v);\nend"
    )
    quoted = "'x'" if "$" in body else "''x''"
    written = inner.replace("'x'", quoted)
    text = f"-- é\ncreate function s.f() returns void language plpgsql as {body % written};"
    (routine,) = read(Source("x.sql", text)).routines
    assert routine.failures == []
    shown = [(one.kind, text[one.offset :].split(";")[0].split("\n")[0]) for one in routine.all_statements]
    assert [one for one in shown if one[0] not in ("block", "return")] == [
        ("if", f"if {quoted} = {quoted} then delete from a"),
        ("execsql", "delete from a"),
        ("assign", "v := v + 1"),
        ("execsql", "select b.x into r from b where b.é = v"),
        ("perform", "perform f(v)"),
    ]
    places = {
        text[expr.offset_of(visit.node) :][:1] for _, expr in routine.exprs for visit in expr.find("RangeVar")
    }
    assert places == {"a", "b"}


def test_the_statements_of_a_bound_body_know_their_places() -> None:
    text = (
        "create function s.f() returns bigint language sql begin atomic\n"
        "  insert into a (id) select 1;\n  select case when true then 1 end from b;\nend;"
    )
    (routine,) = read(Source("x.sql", text)).routines
    assert [text[one.offset :][:6] for one in routine.all_statements] == ["insert", "select"]


def test_extension_scripts_are_read_like_others() -> None:
    text = "create function @extschema@.f() returns int language sql as $$ select n from @extschema@.t $$;"
    assert lint([Source("x.sql", text)]).findings == ()


def test_equal_statements_on_one_line_have_places_of_their_own() -> None:
    body = "begin delete from a; delete from a; if true then delete from a; end if; end"
    text = f"create function s.f() returns void language plpgsql as $$ {body} $$;"
    (routine,) = read(Source("x.sql", text)).routines
    places = [one.offset for one in routine.all_statements if one.kind == "execsql"]
    assert places == [index for index in range(len(text)) if text.startswith("delete", index)]


def test_types_that_only_the_database_knows_do_not_hinder_it() -> None:
    declared = "a silver.t; b silver.t[]; c silver.t%rowtype; d silver.t.x%type; e silver.state := 'new'"
    body = f"declare {declared}; begin a.x := 1; b[1] := a; c.x := a.x; d := 2; e := 'old'; return e; end"
    header = "create function s.f(p silver.t, q silver.t[]) returns silver.state language plpgsql"
    text = f"{header} as $$ {body} $$;"
    assert read(Source("x.sql", text)).all_failures == []
    field = text.replace("a.x := 1", "p.x := 1")
    assert read(Source("x.sql", field)).all_failures == []


def test_what_follows_a_bound_body_is_read_on_its_own() -> None:
    text = (
        "create function s.f(a int) returns int language sql begin atomic\n"
        "  select case when a = 1 then 1 else 2 end;\nend;\n"
        "selec 1;\n"
        "create function s.g() returns bigint language sql as $$ select count(*) from t $$;\n"
    )
    found = [(one.line, one.code) for one in lint([Source("x.sql", text)]).findings]
    assert found == [(4, "B001"), (5, "B503")]
