"""`b2s lint` as a user or a program meets it: sources, formats, exit codes, suppressions, the database."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("pglast", reason="the SQL parser is not installed: pip install 'b2s[lint]'")

from b2s.cli import main
from b2s.lint import parser
from b2s.lint.engine import Options, lint
from b2s.lint.rule import all_rules
from b2s.lint.sources import Source
from tests.servers import Database

FAULTY: Final = """\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o;
  return 1;
end $$;
"""
CLEAN: Final = FAULTY.replace("bronze.orders o;", "bronze.orders o on conflict (id) do nothing;")
CONFIG: Final = (
    "version: 1\nprocedures:\n  - {name: silver.orders, routine: silver.load_orders, type: fact}\n"
)
TABLES: Final = "create schema bronze; create schema silver; create table bronze.orders (id bigint);"
TABLES_OF_SILVER: Final = "create table silver.orders (id bigint primary key);"
GRANTS: Final = """
grant usage on schema bronze, silver to etl_owner;
grant select on all tables in schema bronze to etl_owner;
grant all on all tables in schema silver to etl_owner;
"""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """`b2s` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Result:
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return run


def write(name: str, text: str) -> None:
    """A file in the current folder."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# -- sources and exit codes --


def test_a_clean_folder_ends_with_0_and_says_how_much_was_read(cli: Cli) -> None:
    write("sql/a/orders.sql", CLEAN)
    write("sql/.hidden/broken.sql", "selec")
    assert cli("lint") == Result(0, "", "nothing found in 1 routine of 1 source\n")


def test_a_finding_ends_with_1_and_shows_its_line(cli: Cli) -> None:
    write("orders.sql", FAULTY)
    result = cli("lint", "orders.sql")
    assert result.code == 1
    assert result.out.splitlines() == [
        "orders.sql:3:15: error[B401]: plain insert into silver.orders: a repeated run doubles the rows "
        "[plain-insert]",
        "  3 |   insert into silver.orders (id) select o.id from bronze.orders o;",
        "    |               ^^^^^^^^^^^^^",
        "  hint: add on conflict (key) do update, or delete the same rows before",
    ]
    assert result.err == "1 error in 1 routine of 1 source\n"


def test_remarks_alone_do_not_make_it_fail(cli: Cli) -> None:
    write("a.sql", CLEAN.replace("returns bigint", "returns void").replace("return 1;", ""))
    result = cli("lint", "a.sql")
    assert (result.code, result.err) == (0, "1 remark in 1 routine of 1 source\n")
    assert "info[B102]" in result.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.sql"], "missing.sql does not exist"),
        (["empty"], "empty holds no .sql file"),
        (["--select", "B9999"], "there is no rule B9999"),
        (["--select", ""], "there is no rule"),
        (["--ignore", "nonsense"], "there is no rule nonsense"),
        (["--explain", "B4"], "there is no rule B4"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--format", "xml"], "invalid choice"),
    ],
)
def test_what_cannot_be_linted_ends_with_2(cli: Cli, words: list[str], message: str) -> None:
    Path("empty").mkdir()
    write("a.sql", CLEAN)
    result = cli("lint", *words)
    assert result.code == 2
    assert message in result.err


def test_without_the_parser_it_says_what_to_install(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.sql", CLEAN)
    monkeypatch.setitem(sys.modules, "pglast", None)
    parser._pglast.cache_clear()
    result = cli("lint", "a.sql")
    assert result.code == 2
    assert "pip install 'b2s[lint]'" in result.err
    assert cli("lint", "--explain", "B401").code == 0, "the rules can be read without it"


def test_a_file_that_is_no_text_is_a_finding(cli: Cli) -> None:
    Path("a.sql").write_bytes(bytes(range(256)) * 3)
    assert cli("lint", "a.sql").code == 1


# -- choosing --


def test_select_and_ignore_take_codes_beginnings_and_names(cli: Cli) -> None:
    write("a.sql", FAULTY.replace(" set search_path = ''", "").replace("silver.orders (id)", "orders"))

    def codes(*words: str) -> set[str]:
        found = json.loads(cli("lint", "a.sql", "--json", *words).out)["findings"]
        return {one["code"] for one in found}

    assert codes() == {"B401", "B503", "B504"}
    assert codes("--select", "B5") == {"B503", "B504"}
    assert codes("--select", "plain-insert,B504") == {"B401", "B504"}
    assert codes("--select", "B5", "--ignore", "b504") == {"B503"}
    assert codes("--ignore", "B4", "--ignore", "B5") == set()


def test_the_configuration_sets_severities_and_switches_rules_off(cli: Cli) -> None:
    write("a.sql", FAULTY)
    write("transformations.yaml", CONFIG + "lint: {rules: {B401: info}}\n")
    result = cli("lint", "a.sql")
    assert (result.code, "info[B401]" in result.out) == (0, True)
    write("transformations.yaml", CONFIG + "lint: {rules: {B401: off}}\n")
    assert cli("lint", "a.sql").out == ""
    assert cli("lint", "a.sql", "--select", "B401").code == 1, "naming a rule turns it on"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lint: {rules: {B999: error}}", "B999"),
        ("lint: {rules: {B401: fatal}}", "must be 'error', 'warning', 'info' or 'off'"),
        ("lint: {target_version: 12}", "at least 15"),
        ("lint: {rule: {B401: error}}", "did you mean 'rules'?"),
    ],
)
def test_what_is_wrong_in_the_configuration_ends_with_2(cli: Cli, text: str, message: str) -> None:
    write("a.sql", CLEAN)
    write("transformations.yaml", f"{CONFIG}{text}\n")
    result = cli("lint", "a.sql")
    assert result.code == 2
    assert message in result.err


def test_with_a_configuration_only_its_routines_are_steps(cli: Cli) -> None:
    write("a.sql", FAULTY.replace("load_orders", "helper"))
    assert cli("lint", "a.sql").code == 1
    write("transformations.yaml", CONFIG)
    assert cli("lint", "a.sql").code == 0


def test_the_target_version_decides_about_newer_syntax(cli: Cli) -> None:
    write("a.sql", "create function s.f() returns uuid language sql as $$ select uuidv7() $$;")
    assert cli("lint", "a.sql").code == 1
    assert cli("lint", "a.sql", "--target-version", "17").code == 1
    assert cli("lint", "a.sql", "--target-version", "18").code == 0


def test_explain_prints_the_documentation_and_both_examples(cli: Cli) -> None:
    result = cli("lint", "--explain", "closed-window")
    assert result.code == 0
    assert result.out.startswith("B406 closed-window (error)\n")
    assert "half open" in result.out
    assert "Bad:" in result.out
    assert "Good:" in result.out


# -- suppressions --


def found(text: str, *select: str) -> list[tuple[int, str]]:
    return [(one.line, one.code) for one in lint([Source("x.sql", text)], None, Options(select)).findings]


def faulty_with(line: str, before: str = "") -> str:
    insert = "  insert into silver.orders (id) select o.id from bronze.orders o;"
    return FAULTY.replace(insert, f"{before}{insert} {line}")


def test_a_suppression_silences_its_line_the_next_line_or_the_file() -> None:
    assert found(faulty_with("-- b2s: ignore[B401] append only")) == []
    assert found(faulty_with("", "  -- b2s: ignore[B401] append only\n  -- more words\n\n")) == []
    assert found(faulty_with("", "  perform 1; -- b2s: ignore-next[B401] append only\n")) == []
    assert found("-- b2s: ignore-file[B401] append only\n" + FAULTY) == []
    assert found(FAULTY + "-- b2s: ignore-file[B401, B901] append only\n") == [(6, "B901")]


def test_a_suppression_of_another_line_or_rule_silences_nothing_and_is_found() -> None:
    assert found(faulty_with("-- b2s: ignore[B504] no reason at all")) == [(3, "B401"), (3, "B901")]
    elsewhere = FAULTY.replace("return 1;", "return 1; -- b2s: ignore[B401] append only")
    assert found(elsewhere) == [(3, "B401"), (4, "B901")]


def test_a_suppression_of_a_rule_that_is_not_looked_at_is_left_alone() -> None:
    assert found(faulty_with("-- b2s: ignore[B401] append only"), "B504", "B9") == []


@pytest.mark.parametrize(
    "comment", ["ignore[B401]", "ignore", "ignore[]", "ignore[B999] reason", "ignore[x] y"]
)
def test_a_malformed_suppression_is_found(comment: str) -> None:
    assert (3, "B902") in found(faulty_with(f"-- b2s: {comment}"))


# -- formats --


def test_json_has_everything_a_program_needs(cli: Cli) -> None:
    write("a.sql", FAULTY)
    document = json.loads(cli("lint", "a.sql", "--format", "json").out)
    assert document == json.loads(cli("lint", "a.sql", "--json").out)
    assert document == {
        "findings": [
            {
                "path": "a.sql",
                "line": 3,
                "column": 15,
                "code": "B401",
                "name": "plain-insert",
                "severity": "error",
                "message": "plain insert into silver.orders: a repeated run doubles the rows",
                "hint": "add on conflict (key) do update, or delete the same rows before",
                "routine": "silver.load_orders",
            }
        ],
        "sources": 1,
        "routines": 1,
        "suppressed": 0,
        "is_clean": False,
    }


def test_github_annotations_are_escaped(cli: Cli) -> None:
    write("a,b%.sql", FAULTY)
    result = cli("lint", "a,b%.sql", "--format", "github")
    assert result.out == (
        "::error file=a%2Cb%25.sql,line=3,col=15,title=B401 plain-insert::plain insert into silver.orders: "
        "a repeated run doubles the rows; add on conflict (key) do update, or delete the same rows before\n"
    )


def test_sarif_names_rules_places_and_fingerprints_that_survive_a_move(cli: Cli) -> None:
    def results() -> list[Any]:
        document = json.loads(cli("lint", "sql", "--format", "sarif").out)
        assert (document["version"], len(document["runs"])) == ("2.1.0", 1)
        run = document["runs"][0]
        for result in run["results"]:
            assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        return list(run["results"])

    write("sql/a b.sql", FAULTY)
    (first,) = results()
    location = first["locations"][0]["physicalLocation"]
    assert (first["ruleId"], first["level"]) == ("B401", "error")
    assert location["artifactLocation"]["uri"] == "sql/a%20b.sql"
    assert location["region"] == {"startLine": 3, "startColumn": 15, "endColumn": 28}
    write("sql/a b.sql", "\n\n" + FAULTY)
    (moved,) = results()
    assert moved["locations"] != first["locations"]
    assert moved["partialFingerprints"] == first["partialFingerprints"]


def test_text_cannot_steer_the_terminal_that_shows_it(cli: Cli) -> None:
    write("a.sql", FAULTY.replace("bronze.orders o;", "bronze.orders o /* \x1b[31m */;"))
    assert "\x1b" not in cli("lint", "a.sql").out


def test_every_severity_has_a_place_in_every_format(cli: Cli) -> None:
    write("a.sql", FAULTY)
    for severity in ("error", "warning", "info"):
        write("transformations.yaml", f"{CONFIG}lint: {{rules: {{B401: {severity}}}}}\n")
        for form in ("text", "json", "github", "sarif"):
            assert "plain insert" in cli("lint", "a.sql", "--format", form).out


# -- the live database --


@pytest.fixture
def live(db: Database) -> Database:
    """A database with a faulty routine, and others that are nobody's business."""
    with db.connect() as connection:
        connection.execute(f"{TABLES}{TABLES_OF_SILVER}{FAULTY}{GRANTS}".encode())
        connection.execute(
            "create function silver.note() returns void language sql as "
            "$$ insert into silver.orders values (1) $$"
        )
    return db


def test_the_routines_of_the_database_are_linted_as_it_has_them(cli: Cli, live: Database) -> None:
    result = cli("lint", "--db", "--dsn", live.dsn, "--json", "--ignore", "B002")
    found_in = {(one["path"], one["line"], one["code"]) for one in json.loads(result.out)["findings"]}
    assert ("silver.load_orders()", 7, "B401") in found_in
    assert ("silver.note()", 4, "B504") in found_in
    assert all(path.startswith("silver.") for path, _, _ in found_in)


def test_with_a_configuration_only_its_routines_are_read_from_the_database(cli: Cli, live: Database) -> None:
    write("transformations.yaml", CONFIG)
    document = json.loads(cli("lint", "--db", "--dsn", live.dsn, "--json", "--ignore", "B002").out)
    assert {one["path"] for one in document["findings"]} == {"silver.load_orders()"}
    assert document["routines"] == 1


def test_the_server_is_the_target_unless_another_is_named(cli: Cli, live: Database) -> None:
    body = "create function silver.any() returns int language sql stable as $$ select any_value(1) $$"
    with live.connect() as connection:
        connection.execute("set check_function_bodies = off")
        connection.execute(body.encode())
        version = connection.info.server_version // 10000
    words = ("lint", "--db", "--dsn", live.dsn, "--json", "--select", "B506")
    assert cli(*words).code == (1 if version < 16 else 0)
    assert cli(*words, "--target-version", "15").code == 1
    assert cli(*words, "--target-version", "16").code == 0


def test_the_findings_of_plpgsql_check_are_merged_where_it_is_installed(cli: Cli, live: Database) -> None:
    with live.connect() as connection:
        query = "select from pg_available_extensions where name = 'plpgsql_check'"
        if connection.execute(query.encode()).fetchone() is None:
            result = cli("lint", "--db", "--dsn", live.dsn)
            assert "plpgsql_check is not installed" in result.err
            return
        connection.execute("create extension plpgsql_check")
        connection.execute("drop table silver.orders")
    document = json.loads(cli("lint", "--db", "--dsn", live.dsn, "--json", "--select", "B002").out)
    assert [(one["path"], one["line"], one["severity"]) for one in document["findings"]] == [
        ("silver.load_orders()", 7, "error")
    ]
    assert 'relation "silver.orders" does not exist' in document["findings"][0]["message"]


def test_plpgsql_check_goes_on_after_an_error_names_places_and_knows_temporary_tables(
    cli: Cli, live: Database
) -> None:
    with live.connect() as connection:
        query = "select from pg_available_extensions where name = 'plpgsql_check'"
        if connection.execute(query.encode()).fetchone() is None:
            pytest.skip(
                "plpgsql_check is not installed for this server (Debian: postgresql-15-plpgsql-check)"
            )
        connection.execute("create extension plpgsql_check")
        connection.execute(
            "create or replace function silver.load_orders() returns bigint language plpgsql\n"
            "set search_path = '' as $$ declare v_unused int;\n"
            "begin\n"
            "  create temp table changed on commit drop as select o.id from bronze.orders o;\n"
            "  insert into silver.orders (id) select c.id from changed c on conflict (id) do nothing;\n"
            "  update silver.orders set nope = 1 where id = 3;\n"
            "  update silver.orders set id = other where id = 3;\n"
            "  return 1;\n"
            "end $$;"
        )
    document = json.loads(cli("lint", "--db", "--dsn", live.dsn, "--json", "--select", "B002").out)
    found = [(one["line"], one["column"], one["message"]) for one in document["findings"]]
    assert [(line, column) for line, column, _ in found][-2:] == [(9, 28), (10, 33)]
    assert any("v_unused" in message for *_, message in found)
    assert not [message for *_, message in found if "changed" in message]


def test_an_unreachable_database_ends_with_3(cli: Cli) -> None:
    assert cli("lint", "--db", "--dsn", "host=/nowhere").code == 3


# -- sync-config --


def test_sync_config_can_demand_a_clean_lint(cli: Cli, live: Database) -> None:
    write("transformations.yaml", CONFIG + "lint: {on_sync: error}\n")
    refused = cli("sync-config", "--dsn", live.dsn)
    assert (refused.code, refused.out) == (1, "")
    assert "error[B401]" in refused.err
    assert refused.err.endswith("; nothing was applied\n")
    with live.connect() as connection:
        assert connection.execute("select count(*) from etl.procedures").fetchone() == (0,)
    warned = cli("sync-config", "--dsn", live.dsn, "--lint", "warn", "--dry-run")
    assert (warned.code, "error[B401]" in warned.err) == (0, True)
    assert "+ procedure silver.orders" in warned.out
    quiet = cli("sync-config", "--dsn", live.dsn, "--lint", "off")
    assert (quiet.code, quiet.err) == (0, "")
    with live.connect() as connection:
        connection.execute(CLEAN.replace("create function", "create or replace function").encode())
    assert cli("sync-config", "--dsn", live.dsn).code == 0


def test_the_lint_settings_change_nothing_in_the_database(cli: Cli, live: Database) -> None:
    write("transformations.yaml", CONFIG)
    assert cli("sync-config", "--dsn", live.dsn).code == 0
    write("transformations.yaml", CONFIG + "lint: {rules: {B401: warning}, target_version: 16}\n")
    assert "is up to date" in cli("sync-config", "--dsn", live.dsn, "--check").out


def test_the_rules_are_listed_in_the_order_of_their_codes() -> None:
    assert list(all_rules()) == sorted(all_rules())
