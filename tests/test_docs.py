"""The documentation: what is generated is current, what is written can be run, no link leads nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import yaml

from b2s.cli import COMMANDS
from b2s.config import load_config
from b2s.sync import sync_config
from docs import generate
from tests.servers import Database

PROJECT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
SQL: Final = [path.read_text(encoding="utf-8") for path in sorted((PROJECT / "plpgsql").rglob("*.sql"))]
COMPLETE: Final = "# a complete file\n"
NOT_CODES: Final = ("etl.", "b2s.", "pg_", "response.")
KEEPS_A_STANDARD_SQLSTATE: Final = {"call.in_transaction": "25001", "run.not_owned": "42501"}
NEVER_RAISED: Final = {"run.abandoned": "none"}


def ids(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def blocks(page: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    yield from re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def complete_files() -> list[str]:
    return [block for page in PAGES for block in blocks(page, "yaml") if block.startswith(COMPLETE)]


def catalogue() -> dict[str, str]:
    """The codes of errors.md and the SQLSTATE of each."""
    text = (PROJECT / "docs" / "errors.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| (\w+) \|", text, flags=re.MULTILINE))


def codes_in_sql() -> set[str]:
    """Every stable code that the SQL can say."""
    literals = {found for text in SQL for found in re.findall(r"'([a-z_]+\.[a-z_]+)'", text)}
    kinds = {found for text in SQL for found in re.findall(r"_unknown_names\('(\w+)'", text)}
    return {one for one in literals if not one.startswith(NOT_CODES)} | {f"{kind}.unknown" for kind in kinds}


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# -- generated --


def test_the_sql_reference_is_what_the_database_says(db: Database) -> None:
    with db.connect() as connection:
        expected = generate.sql_reference(connection)
    assert generate.SQL_REFERENCE.read_text(encoding="utf-8") == expected, "out of date: make docs"


def test_the_tables_of_the_configuration_page_are_what_the_schema_says() -> None:
    text = generate.CONFIGURATION.read_text(encoding="utf-8")
    assert text == generate.configuration(text), "out of date: make docs"


def test_the_table_of_the_monitoring_page_is_what_the_exporter_exports() -> None:
    text = generate.MONITORING.read_text(encoding="utf-8")
    assert text == generate.monitoring(text), "out of date: make docs"
    assert text.count("| `transformation_") > 15


def test_every_alert_is_in_the_monitoring_page() -> None:
    alerts = yaml.safe_load((PROJECT / "docker" / "monitoring" / "alerts.yaml").read_text(encoding="utf-8"))
    named = {rule["alert"] for group in alerts["groups"] for rule in group["rules"]}
    text = generate.MONITORING.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([A-Z]\w+)` \|", text, flags=re.MULTILINE)) == named


def test_every_mapping_of_a_configuration_file_has_a_table() -> None:
    text = generate.CONFIGURATION.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- fields of (\w+) -->", text)) == set(generate.field_tables())


def test_everything_in_the_sql_reference_is_explained(db: Database) -> None:
    with db.connect() as connection:
        sections = re.split(r"^### ", generate.sql_reference(connection), flags=re.MULTILINE)[1:]
    explained = re.compile(r"^(?!May be called|\||#)[A-Z].*[.:]", re.MULTILINE)
    bodies = {
        section.partition("\n")[0]: re.sub(r"```.*?```", "", section, flags=re.DOTALL) for section in sections
    }
    assert bodies
    assert [name for name, body in bodies.items() if not explained.search(body)] == []


# -- written --


@pytest.mark.parametrize("text", complete_files(), ids=lambda text: text.splitlines()[-1].strip()[:40])
def test_a_complete_example_loads(text: str, tmp_path: Path) -> None:
    path = tmp_path / "transformations.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path, {}).spec()["procedures"]


def test_there_are_complete_examples_in_the_readme_and_the_configuration_page() -> None:
    for page in (PROJECT / "README.md", generate.CONFIGURATION):
        assert any(block.startswith(COMPLETE) for block in blocks(page, "yaml")), page.name


def test_the_error_catalogue_has_every_code_of_the_sql_and_no_other() -> None:
    listed = set(catalogue())
    assert listed - codes_in_sql() == set(), "in errors.md only"
    assert codes_in_sql() - listed == set(), "not in errors.md"


def test_the_error_catalogue_has_the_sqlstate_that_is_raised() -> None:
    raised = {
        code: sqlstate
        for text in SQL
        for sqlstate, code in re.findall(r"_fail\(\s*'(PT\d+)',\s*'([a-z_]+\.[a-z_]+)'", text)
    }
    expected = {**raised, **KEEPS_A_STANDARD_SQLSTATE, **NEVER_RAISED}
    listed = catalogue()
    assert {code: listed[code] for code in expected} == expected


def test_every_command_is_in_the_readme_and_none_that_there_is_not() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert set(COMMANDS) == set(re.findall(r"`b2s ([a-z-]+)", text))


def test_every_verb_is_in_the_readme() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    verbs = [path.stem for path in sorted((PROJECT / "plpgsql" / "api").glob("*.sql"))]
    assert [verb for verb in verbs if f"etl.{verb}(" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_link_leads_nowhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)(?:#([^)]*))?\)", text):
        aim = page.parent / target if target else page
        if not aim.exists() or (anchor and anchor not in anchors(aim)):
            dead.append(f"{target}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_page_names_a_path_of_the_machine_it_was_written_on(page: Path) -> None:
    assert re.findall(r"(?:/work|/root|/home|/tmp)\b\S*", page.read_text(encoding="utf-8")) == []


# -- run --

TABLES: Final = """
create table bronze.products (id text, name text, country text);
create table silver.products (product_id bigint primary key, name text not null, run_id bigint);
insert into bronze.products values ('1', 'lamp', 'DE'), ('2', 'desk', 'US');
update bronze.orders set ingested_at = now() - interval '1 minute';
"""


def block(page: str, language: str, holding: str) -> str:
    """The one block of a page that holds a text."""
    (found,) = [text for text in blocks(PROJECT / page, language) if holding in text]
    return found


def grants() -> bytes:
    """What the README grants to etl_owner, and nothing to alice: roles are shared by all databases."""
    mine = "grant etl_admin to alice;\n"
    text = block("README.md", "sql", mine)
    return text.replace(mine, "").encode()


@pytest.fixture
def shop(db: Database) -> Iterator[psycopg.Connection[Any]]:
    """The database of the examples, its functions and grants as the README has them."""
    with db.connect() as connection:
        connection.execute(block("README.md", "sql", "silver.load_orders").encode())
        connection.execute(TABLES.encode())
        connection.execute(block("README.md", "sql", "silver.load_products").encode())
        connection.execute(grants())
        yield connection


def sync(connection: psycopg.Connection[Any], text: str, folder: Path) -> None:
    path = folder / "transformations.yaml"
    path.write_text(text, encoding="utf-8")
    sync_config(connection, path)


def outcome(connection: psycopg.Connection[Any]) -> dict[str, tuple[str, int | None]]:
    """Runs everything; the status and rows of each step."""
    connection.execute("call etl.start_run()")
    query = "select procedure, status, rows_affected from etl.step_history"
    query += " where run_id = (select max(run_id) from etl.runs)"
    return {name: (status, rows) for name, status, rows in connection.execute(query).fetchall()}


def test_the_quick_start_of_the_readme_runs(shop: psycopg.Connection[Any], tmp_path: Path) -> None:
    sync(shop, block("README.md", "yaml", "name: silver.customers"), tmp_path)
    assert outcome(shop) == {"silver.customers": ("succeeded", 2), "silver.orders": ("succeeded", 3)}


def test_the_contract_of_the_readme_runs(shop: psycopg.Connection[Any], tmp_path: Path) -> None:
    sync(shop, block("README.md", "yaml", "args: {country: in_country"), tmp_path)
    outcomes = outcome(shop)
    assert outcomes["silver.products"] == ("succeeded", 1)
    assert outcomes["silver.orders"] == ("failed", None), "its check finds orders without a customer"


def test_the_configuration_without_python_of_the_install_page_runs(shop: psycopg.Connection[Any]) -> None:
    shop.execute(block("docs/install.md", "sql", "with defaults as").encode())
    assert outcome(shop) == {"silver.customers": ("succeeded", 2), "silver.orders": ("succeeded", 3)}


def test_the_xid_example_of_the_configuration_page_runs(
    shop: psycopg.Connection[Any], tmp_path: Path
) -> None:
    shop.execute("create table bronze.events (id bigint, body text)")
    shop.execute("create table silver.events (id bigint primary key, body text)")
    shop.execute("insert into bronze.events values (1, 'a')")
    shop.execute(block("docs/configuration.md", "sql", "etl.arrived").encode())
    shop.execute(grants())
    sync(
        shop,
        "version: 1\nprocedures: [{name: silver.events, routine: silver.load_events, type: fact,"
        " watermark: {strategy: xid, source: bronze.events.etl_xid}}]",
        tmp_path,
    )
    shop.execute("insert into bronze.events values (2, 'b')")
    assert outcome(shop) == {"silver.events": ("succeeded", 2)}
    shop.execute("insert into bronze.events values (3, 'c')")
    assert outcome(shop) == {"silver.events": ("succeeded", 1)}


def test_the_uninstall_of_the_install_page_leaves_what_is_not_b2s(shop: psycopg.Connection[Any]) -> None:
    shop.execute("alter table silver.orders owner to etl_owner")
    statements = block("docs/install.md", "sql", "drop schema etl").splitlines()
    assert statements[-1].startswith("drop role"), "the roles are those of other databases too"
    shop.execute("\n".join(statements[:-1]).encode())
    owner = (
        "select relowner::regrole = current_user::regrole from pg_class where oid = 'silver.orders'::regclass"
    )
    assert shop.execute(owner).fetchone() == (True,)
    assert shop.execute("select to_regnamespace('etl')").fetchone() == (None,)
