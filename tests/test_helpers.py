"""Further sessions that a plain CALL opens for its run, through dblink."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests import servers
from tests.pipelines import Gate, Pipeline, messages_of, refused
from tests.servers import Server, wait_until

LOGIN: Final = "b2s_helper"
PASSWORD: Final = "dblink wants one"
GATED: Final = Gate.WAIT + "; insert into silver.trace (step) values ('{0}')"
HELPERS: Final = (
    f"select count(*) from pg_stat_activity where usename = '{LOGIN}' and datname = current_database()"
)


@pytest.fixture(scope="module")
def helper_server(server: Server) -> Iterator[Server]:
    """A server of our own with dblink, on which the helpers need a password: dblink insists on one."""
    with server.connect() as conn:
        query = "select count(*) from pg_available_extensions where name = 'dblink'"
        if server.bindir is None or conn.execute(query).fetchone() == (0,):
            pytest.skip(f"{server.title} has no dblink, or none that can be started here (Debian's has it)")
    private = servers.start(server.label)
    private.migrated_template()
    with private.connect() as conn:
        row = conn.execute("show hba_file").fetchone()
        assert row is not None
        hba = Path(row[0])
        hba.write_text(f"local all {LOGIN} scram-sha-256\n{hba.read_text()}")
        conn.execute("select pg_reload_conf()")
        conn.execute(f"create role {LOGIN} login password '{PASSWORD}' in role etl_operator".encode())
    yield private
    private.close()


@pytest.fixture
def pipeline(helper_server: Server) -> Iterator[Pipeline]:
    """Two steps that can run at once, then one; the foreign server is there, and nothing is configured."""
    db = helper_server.create_database(template=helper_server.migrated_template())
    given = conninfo_to_dict(db.dsn)
    with Pipeline(db) as pipeline:
        pipeline.conn.execute("create extension dblink")
        pipeline.conn.execute(
            "create server helpers foreign data wrapper dblink_fdw"
            f" options (host '{given['host']}', port '{given['port']}', dbname '{db.name}')".encode()
        )
        pipeline.conn.execute("grant usage on foreign server helpers to etl_engine")
        pipeline.conn.execute(
            "create user mapping for etl_engine server helpers"
            f" options (user '{LOGIN}', password '{PASSWORD}')".encode()
        )
        for name in ("a", "b"):
            pipeline.add(name, GATED.format(name))
        pipeline.add("c", dependencies=["a", "b"])
        yield pipeline
    db.drop()


def test_a_plain_call_opens_helpers_and_closes_them(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers")
    conn = pipeline.db.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        pids = gate.wait_for_arrivals(2)
        gate.open()
        run = started.result()
    assert run.status == "succeeded"
    assert {s["worker_pid"] for s in pipeline.steps(run.run_id) if s["procedure_name"] != "c"} == set(pids)
    assert conn.execute("select dblink_get_connections()").fetchone() == (None,)
    wait_until(pipeline.conn, f"select ({HELPERS}) = 0")


def test_helpers_open_no_helpers(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers", max_concurrency=3)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals(2)
        assert pipeline.value(HELPERS) == 1, "two scopes can be at work at once, whatever is allowed"
        gate.open()
        assert started.result().status == "succeeded"


def test_a_chain_has_no_use_for_helpers(pipeline: Pipeline) -> None:
    pipeline.change("b", dependencies=["a"])
    pipeline.change("c", dependencies=["b"])
    pipeline.apply(helper_server="helpers")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        assert pipeline.value(HELPERS) == 0
        gate.open()
        assert started.result().status == "succeeded"


def test_without_a_helper_server_a_call_is_one_session(pipeline: Pipeline) -> None:
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        assert pipeline.value(HELPERS) == 0
        gate.open()
        assert started.result().status == "succeeded"


def test_a_run_goes_on_without_helpers_that_cannot_connect(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers")
    pipeline.conn.execute("alter user mapping for etl_engine server helpers options (set password 'wrong')")
    conn = pipeline.db.connect()
    received = messages_of(conn)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        gate.wait_for_arrivals()
        gate.open()
        run = started.result()
    assert run.status == "succeeded"
    warnings = [message.text for message in received if message.severity == "WARNING"]
    assert [text for text in warnings if f"run {run.run_id} goes on without helpers" in text]
    assert not [message for message in received if PASSWORD in message.text or "'wrong'" in message.text]


def test_a_run_goes_on_without_helpers_when_the_engine_may_not_use_dblink(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers")
    pipeline.conn.execute("create schema hidden; alter extension dblink set schema hidden")
    conn = pipeline.db.connect()
    received = messages_of(conn)
    with pipeline.gate() as gate:
        gate.open()
        run = pipeline.start(conn)
    assert run.status == "succeeded"
    (warning,) = [message.text for message in received if message.severity == "WARNING"]
    assert f"run {run.run_id} goes on without helpers: permission denied" in warning


def test_a_run_that_has_ended_does_not_fail_over_helpers_that_cannot_be_closed(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers")
    conn = pipeline.db.connect()
    received = messages_of(conn)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        gate.wait_for_arrivals(2)
        pipeline.conn.execute("revoke execute on function dblink_disconnect(text) from public")
        gate.open()
        assert started.result().status == "succeeded"
    warnings = [message.text for message in received if message.severity == "WARNING"]
    assert [text for text in warnings if text.startswith("sessions that helped are not closed: permission")]


def test_the_helpers_go_on_when_the_session_that_began_the_run_dies(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers")
    conn = pipeline.db.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        gate.wait_for_arrivals(2)
        pipeline.value("select pg_terminate_backend(%s, 5000)", conn.info.backend_pid)
        with pytest.raises(psycopg.OperationalError):
            started.result()
        gate.open()
        wait_until(pipeline.conn, "select status = 'succeeded' from etl.runs")
    assert sorted(pipeline.trace()) == ["a", "b", "c"]
    wait_until(pipeline.conn, f"select ({HELPERS}) = 0")


def test_helpers_that_an_interrupted_call_has_left_are_closed_by_the_next_one(pipeline: Pipeline) -> None:
    pipeline.apply(helper_server="helpers")
    conn = pipeline.db.connect()
    conn.execute("set role etl_engine")
    conn.execute("select dblink_connect('b2s_helper_1', 'helpers'), dblink_connect('mine', 'helpers')")
    conn.execute("reset role")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        gate.wait_for_arrivals(2)
        gate.open()
        assert started.result().status == "succeeded"
    assert conn.execute("select dblink_get_connections()").fetchone() == (["mine"],)


@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        ("drop extension dblink cascade", "the extension dblink is not installed", "create extension dblink"),
        ("drop server helpers cascade", "there is no foreign server helpers", "create server helpers"),
        (
            "create schema hidden; alter extension dblink set schema hidden",
            "role etl_engine may not use schema hidden",
            "grant usage on schema hidden to etl_engine",
        ),
        (
            "revoke usage on foreign server helpers from etl_engine",
            "role etl_engine may not use foreign server helpers",
            "grant usage on foreign server helpers to etl_engine",
        ),
        (
            "drop user mapping for etl_engine server helpers",
            "role etl_engine has no user mapping",
            "create user mapping for etl_engine",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_for_helpers_is_said_when_the_configuration_is_applied(
    pipeline: Pipeline, spoil: str, message: str, hint: str
) -> None:
    pipeline.conn.execute(spoil.encode())
    with refused("PT422", "config.invalid") as refusal:
        pipeline.apply(helper_server="helpers")
    (problem,) = refusal.detail["errors"]
    assert problem["loc"] == ["helper_server"]
    assert message in problem["message"]
    assert problem["hint"].startswith(hint)
