"""Fixtures: one server per test session, one migrated template, a clone of it for each test.

b2s commits inside its procedures, so a test cannot be undone by a rollback: it gets a database of its own,
which is dropped when the test ends. With xdist the controller starts the server and its workers share it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from psycopg.conninfo import make_conninfo

from b2s.embedded import EmbeddedError
from b2s.migrate import migrate
from tests import servers
from tests.servers import Database, NoServer, Server
from tests.shell import Shell

_SERVER: Final = pytest.StashKey[Server]()
_PROBLEM: Final = pytest.StashKey[str]()
_OURS: Final = ("B2S_CRM_ERP", "B2S_TEST_DSN", "B2S_REQUIRE_BROWSER", "B2S_REQUIRE_PG_CRON")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg", default="auto", choices=servers.CHOICES, help="which Postgres to test on (default: auto)"
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name.startswith(("PG", "B2S_")) and name not in _OURS:
            del os.environ[name]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return min(4, max(2, os.cpu_count() or 2))


# -- the server --


def _server(config: pytest.Config) -> Server:
    """The session's server, started at first use. A problem is remembered, so that it is met only once."""
    if _SERVER not in config.stash:
        if _PROBLEM in config.stash:
            pytest.fail(config.stash[_PROBLEM], pytrace=False)
        try:
            config.stash[_SERVER] = servers.start(servers.choose(config.getoption("--pg")))
        except (NoServer, EmbeddedError) as error:
            config.stash[_PROBLEM] = str(error)
            pytest.fail(str(error), pytrace=False)
    return config.stash[_SERVER]


def pytest_report_header(config: pytest.Config) -> str:
    try:
        label = servers.choose(config.getoption("--pg"))
    except NoServer as error:
        return f"postgres: {error}"
    binaries = servers.binaries_of(label)
    return f"postgres: {binaries.version if binaries else 'as found'} (--pg {label})"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """The controller hands its server to a worker."""
    try:
        server = _server(node.config)
    except pytest.fail.Exception as problem:
        node.workerinput["b2s_problem"] = str(problem)
    else:
        node.workerinput["b2s_server"] = {
            "label": server.label,
            "conninfo": server.conninfo,
            "version": server.version,
            "bindir": str(server.bindir or ""),
            "template": server.template,
        }


def pytest_sessionstart(session: pytest.Session) -> None:
    given = getattr(session.config, "workerinput", {})
    if "b2s_problem" in given:
        session.config.stash[_PROBLEM] = given["b2s_problem"]
    elif "b2s_server" in given:
        session.config.stash[_SERVER] = _shared(**given["b2s_server"])


def _shared(label: str, conninfo: str, version: str, bindir: str, template: str) -> Server:
    """A server that this process did not start."""
    return Server(label, conninfo, version, Path(bindir) if bindir else None, template=template)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _SERVER in config.stash:
        terminalreporter.write_line(f"tested on {config.stash[_SERVER].title}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing: stop the server that was started, or drop what was made on one that was given."""
    if _SERVER not in config.stash or hasattr(config, "workerinput"):
        return
    server = config.stash[_SERVER]
    if server.label == "dsn":
        server.drop_database(server.template)
    server.close()


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Server:
    """The server all tests share. It cannot be restarted: see `private_server`."""
    session = _server(pytestconfig)
    return _shared(
        session.label, session.conninfo, session.version, str(session.bindir or ""), session.template
    )


@pytest.fixture
def private_server(server: Server) -> Iterator[Server]:
    """A server for one test alone, of the shared one's version: it may be stopped, crashed and restarted."""
    if server.bindir is None:
        pytest.skip(f"{server.title} has no programs here to start another one with")
    private = servers.start(server.label)
    yield private
    private.close()


# -- databases --


@pytest.fixture(scope="session")
def template(server: Server) -> str:
    """The name of the database that `b2s migrate` has been run on, once per session and for all workers."""
    return server.migrated_template()


@pytest.fixture
def db(server: Server, template: str) -> Iterator[Database]:
    """A migrated database for one test."""
    database = server.create_database(template=template)
    yield database
    database.drop()


@pytest.fixture
def shell(
    db: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Shell:
    """`b2s` against the test's database, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return Shell(db.dsn, capsys)


@pytest.fixture
def empty_db(server: Server) -> Iterator[Database]:
    """An empty database for one test."""
    database = server.create_database()
    yield database
    database.drop()


@pytest.fixture(scope="module")
def cron_server() -> Iterator[Server]:
    """A server with pg_cron, for `cron_db`; the test is skipped where there is none.

    With B2S_REQUIRE_PG_CRON=1 a missing pg_cron is a failure.
    """
    binaries = servers.system()
    if binaries is None or not servers.has_pg_cron(binaries):
        missing = "pg_cron is not installed for the system's Postgres (Debian: postgresql-15-cron)"
        if os.environ.get("B2S_REQUIRE_PG_CRON") == "1":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    started = servers.start_with_cron()
    yield started
    started.close()


@pytest.fixture
def cron_db(cron_server: Server) -> Iterator[Database]:
    """A migrated database with pg_cron, whose scheduler is running; its schemas and jobs go."""
    database = Database(cron_server, servers.CRON_DATABASE)
    migrate(make_conninfo(database.dsn, user="b2s_deployer"))
    yield database
    for conn in database.connections:
        conn.close()
    with cron_server.connect(servers.CRON_DATABASE) as conn:
        conn.execute("delete from cron.job")
        conn.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and usename like 'b2s%'"
        )
        conn.execute("drop schema if exists etl, silver, bronze cascade")
