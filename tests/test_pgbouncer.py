"""Through PgBouncer, in each pool mode: what a run leaves on server connections that others get next."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.pipelines import Background, Gate, Pipeline, Run, call, refused
from tests.servers import Connection, Database, Server, wait_until

MODES: Final = ("session", "transaction", "statement")

_CONFIG: Final = """
[databases]
{database} = {server}

[pgbouncer]
listen_addr =
listen_port = {port}
unix_socket_dir = {folder}
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 50
ignore_startup_parameters = extra_float_digits
logfile = {folder}/pgbouncer.log
pidfile = {folder}/pgbouncer.pid
"""


class Bouncer:
    """A PgBouncer in front of one database."""

    def __init__(self, db: Database, mode: str, size: int = 8) -> None:
        program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
        if program is None:
            pytest.skip("PgBouncer is not installed (Debian: pgbouncer)")
        self.db = db
        self.folder = Path(tempfile.mkdtemp(prefix="b2s-pb-", dir="/tmp"))
        given = conninfo_to_dict(db.dsn)
        server = " ".join(
            f"{key}={given[key]}" for key in ("host", "port", "user", "password") if key in given
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = self.folder / "pgbouncer.ini"
        config.write_text(
            _CONFIG.format(
                database=db.name, server=f"{server} dbname={db.name}", port=port, folder=self.folder,
                mode=mode, size=size,
            ),
            encoding="utf-8",
        )  # fmt: skip
        self.dsn = make_conninfo(host=str(self.folder), port=port, dbname=db.name, user=given["user"])
        command = [program, "--quiet", str(config)]
        if os.geteuid() == 0:  # it refuses to run as root
            account = pwd.getpwnam("postgres" if _exists("postgres") else "nobody")
            for path in (self.folder, config):
                os.chown(path, account.pw_uid, account.pw_gid)
            command[1:1] = ["--user", account.pw_name]
        self.process = subprocess.Popen(command)
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 10
        while True:
            try:
                psycopg.connect(self.dsn).close()
            except psycopg.OperationalError:
                log = self.folder / "pgbouncer.log"
                if time.monotonic() > end:
                    pytest.fail(f"PgBouncer does not answer: {log.read_text() if log.exists() else ''}")
                time.sleep(0.02)
            else:
                return

    def connect(self, **options: Any) -> Connection:
        """A client of the pool; it prepares nothing: each statement may go to another server connection."""
        conn: Connection = psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None, **options)
        self.db.connections.append(conn)
        return conn

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)


def _exists(name: str) -> bool:
    return any(account.pw_name == name for account in pwd.getpwall())


@pytest.fixture(params=MODES)
def bouncer(request: pytest.FixtureRequest, server: Server, db: Database) -> Iterator[Bouncer]:
    if server.label.startswith("docker"):
        pytest.skip("the pool logs in over the socket of a server on this machine")
    with server.connect() as conn:
        conn.execute(f"alter database {db.name} set client_connection_check_interval = '50ms'".encode())
    made = Bouncer(db, request.param)
    yield made
    for conn in db.connections:
        conn.close()
    made.close()


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.add("dimension", type="dimension")
        pipeline.add("bad", "if to_regclass('silver.ok') is null then raise sqlstate '22012'; end if")
        pipeline.add("serial", isolation="serializable")
        pipeline.add("gated", f"{Gate.WAIT}; insert into silver.trace (step) values ('gated')")
        pipeline.apply()
        yield pipeline


def expect_clean(bouncer: Bouncer, pipeline: Pipeline) -> None:
    """No server connection of the pool holds a lock, a transaction, or a setting of a run."""
    wait_until(
        pipeline.conn,
        "select count(*) = 0 from pg_locks"
        " where locktype = 'advisory' and classid between 6435443 and 6435449"
        " and database = (select oid from pg_database where datname = current_database())",
    )
    names = pipeline.column(
        "select distinct application_name from pg_stat_activity where datname = current_database()"
        " and application_name like 'b2s%%'"
    )
    assert names == []
    assert (
        pipeline.value(
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and state like 'idle in%%'"
        )
        == 0
    )
    settings = (
        "select current_setting('synchronous_commit'), current_setting('search_path'),"
        " current_setting('transaction_isolation'), current_setting('lock_timeout'), current_user"
    )
    plain = pipeline.conn.execute(settings).fetchone()
    clients = [bouncer.connect() for _ in range(4)]
    asked = [Background(lambda c=c: c.execute(f"{settings}, pg_sleep(0.05)").fetchone()) for c in clients]  # type: ignore[misc]
    for one in asked:  # at the same time, so that each gets a server connection of its own
        assert one.result()[:-1] == plain
    for client in clients:
        client.close()


def test_a_run_through_a_pool_leaves_nothing_behind(bouncer: Bouncer, pipeline: Pipeline) -> None:
    client = bouncer.connect()
    run = pipeline.start(client)
    assert run.status == "failed"
    assert pipeline.outcomes(run.run_id) == {
        "dimension": "succeeded", "bad": "failed", "serial": "succeeded", "gated": "succeeded",
    }  # fmt: skip
    expect_clean(bouncer, pipeline)
    pipeline.sql("create table silver.ok ()")
    row = client.execute(*call("etl.resume_run", {"run_id": run.run_id})).fetchone()
    assert row is not None
    assert row[1] == "succeeded"
    expect_clean(bouncer, pipeline)
    assert sorted(pipeline.trace()) == ["dimension", "gated", "serial"]


def test_workers_through_a_pool_share_a_run(bouncer: Bouncer, pipeline: Pipeline) -> None:
    pipeline.add("gated_too", f"{Gate.WAIT}; insert into silver.trace (step) values ('gated_too')")
    pipeline.sql("create table silver.ok ()")
    pipeline.apply()
    client = bouncer.connect()
    row = client.execute("select run_id from etl.submit_run()").fetchone()
    assert row is not None
    with pipeline.gate() as gate:
        clients = [bouncer.connect(), bouncer.connect()]
        both = [Background(lambda c=c: c.execute("call etl.work()").fetchone()) for c in clients]  # type: ignore[misc]
        pids = gate.wait_for_arrivals(2)
        assert client.execute("select etl.reap()").fetchone() == (0,)
        gate.open()
        assert [one.result() for one in both] == [(1,), (1,)]
    assert len(set(pids)) == 2
    assert pipeline.run(row[0])["status"] == "succeeded"
    expect_clean(bouncer, pipeline)


@pytest.mark.parametrize("force", [False, True])
def test_a_run_in_a_pool_is_cancelled(bouncer: Bouncer, pipeline: Pipeline, force: bool) -> None:
    pipeline.sql("create table silver.ok ()")
    client, other = bouncer.connect(), bouncer.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(client)
        gate.wait_for_arrivals()
        with refused("PT409", "run.active"):
            pipeline.start(other)
        other.execute("select etl.cancel_run(run_id, force => %s) from etl.runs", [force])
        if not force:
            gate.open()
        run: Run = started.result()
    assert run.status == "cancelled"
    expect_clean(bouncer, pipeline)


def test_a_cancel_request_of_a_client_goes_through_the_pool(bouncer: Bouncer, pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.ok ()")
    client = bouncer.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(client)
        gate.wait_for_arrivals()
        client.cancel()
        run: Run = started.result()
    assert run.status == "cancelled"
    expect_clean(bouncer, pipeline)


def test_a_client_of_a_pool_that_is_gone_does_not_keep_the_run(bouncer: Bouncer, pipeline: Pipeline) -> None:
    """PgBouncer closes a server connection whose client left in the middle of a statement."""
    pipeline.sql("create table silver.ok ()")
    client = bouncer.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(client)
        (pid,) = gate.wait_for_arrivals()
        with socket.socket(fileno=os.dup(client.fileno())) as raw:
            raw.shutdown(socket.SHUT_RDWR)
        with pytest.raises(psycopg.OperationalError):
            started.result()
        wait_until(pipeline.conn, "select not exists (select from pg_stat_activity where pid = %s)", [pid])
    assert pipeline.value("select etl.reap()") == 1
    run_id = pipeline.value("select run_id from etl.runs")
    row = bouncer.connect().execute(*call("etl.resume_run", {"run_id": run_id})).fetchone()
    assert row is not None
    assert row[1] == "succeeded"
    assert sorted(pipeline.trace()) == ["dimension", "gated", "serial"]
    expect_clean(bouncer, pipeline)
