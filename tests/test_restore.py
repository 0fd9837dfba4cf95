"""A database that was dumped and restored: here it goes on, in another cluster it says what it needs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import b2s
from b2s.migrate import migrate
from tests.pipelines import Gate, Pipeline
from tests.servers import Database, Server
from tests.test_migrate import fingerprint, psql
from tests.test_upgrade import TABLES, contents

ROLES: Final = """
create role etl_engine nologin; create role etl_owner nologin; create role etl_admin nologin;
create role etl_operator nologin; create role etl_reader nologin; create role etl_frontend nologin;
create role etl_retention nologin; grant etl_reader to etl_operator, etl_owner;
grant etl_operator to etl_admin; grant pg_read_all_stats, pg_signal_backend to etl_engine"""
ARRIVED: Final = """
insert into silver.copies select id from bronze.rows where etl.arrived(etl_xid, p_since, p_until)
on conflict do nothing"""


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    """In use: a watermark of transactions, a failed run, a queued one, a schedule."""
    with Pipeline(db) as pipeline:
        pipeline.sql(
            "create table bronze.rows (id bigint, etl_xid xid8 not null default pg_current_xact_id());"
            "create index on bronze.rows (etl_xid); create table silver.copies (id bigint primary key)"
        )
        pipeline.add(
            "rows", ARRIVED, arguments="p_since pg_snapshot, p_until pg_snapshot",
            watermark={"strategy": "xid", "source": ["bronze.rows.etl_xid"], "state_key": "rows",
                       "delay_ms": 0},
        )  # fmt: skip
        pipeline.add("orders")
        pipeline.apply(schedules=[{"name": "nightly", "cron": "0 2 * * *", "timezone": "UTC"}])
        pipeline.sql("insert into bronze.rows values (1), (2)")
        pipeline.start()
        pipeline.routine("orders", "perform 1 / 0")
        pipeline.start()
        pipeline.routine("orders")
        pipeline.sql("insert into bronze.rows values (3)")
        pipeline.conn.execute("select * from etl.submit_run()")
        yield pipeline


def dump(server: Server, database: Database, directory: Path) -> Path:
    file = directory / "shop.dump"
    program = Path(psql(server)).with_name("pg_dump")
    run(str(program), "-Fc", "-d", database.dsn, "-f", str(file))
    return file


def restore(server: Server, file: Path, into: Database) -> None:
    program = Path(psql(server)).with_name("pg_restore")
    run(str(program), "--exit-on-error", "-d", into.dsn, str(file))


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def moved(pipeline: Pipeline, database: Database) -> Pipeline:
    """The same pipeline in the restored database."""
    other = Pipeline(database)
    other.procedures = pipeline.procedures
    return other


def test_a_restored_database_is_what_was_dumped_and_goes_on(
    pipeline: Pipeline, empty_db: Database, server: Server, tmp_path: Path
) -> None:
    restore(server, dump(server, pipeline.db, tmp_path), empty_db)
    with moved(pipeline, empty_db) as copy:
        assert fingerprint(copy.conn) == fingerprint(pipeline.conn)
        assert contents(copy) == contents(pipeline)
        assert copy.column("select schedule from etl.schedule_health") == ["nightly"]
        copy.conn.execute("call etl.work()")
        assert copy.value("select status from etl.runs order by run_id desc limit 1") == "succeeded"
        assert sorted(copy.column("select id from silver.copies")) == [1, 2, 3]
        assert migrate(empty_db.dsn).after == b2s.__version__
        assert fingerprint(copy.conn) == fingerprint(pipeline.conn)


def test_history_that_was_restored_is_still_immutable_and_still_purged(
    pipeline: Pipeline, empty_db: Database, server: Server, tmp_path: Path
) -> None:
    restore(server, dump(server, pipeline.db, tmp_path), empty_db)
    with moved(pipeline, empty_db) as copy:
        with pytest.raises(Exception, match="has ended and cannot be changed"):
            copy.conn.execute("delete from etl.runs")
        copy.apply(retention={"runs": 30})
        with copy.conn.transaction():
            copy.conn.execute("set local session_replication_role = replica")
            copy.conn.execute("update etl.runs set ended_at = ended_at - interval '31 days' where run_id = 1")
            copy.conn.execute("update etl.state set last_run_id = null")
        copy.start()
        row = copy.conn.execute("call etl.purge()").fetchone()
        assert row is not None
        assert row[0]["runs"] == 1


def test_a_run_that_was_active_in_the_dump_is_dead_in_the_copy(
    pipeline: Pipeline, empty_db: Database, server: Server, tmp_path: Path
) -> None:
    pipeline.conn.execute("call etl.work()")
    pipeline.routine("orders", Gate.WAIT)
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        file = dump(server, pipeline.db, tmp_path)
        gate.open()
        running.result()
    restore(server, file, empty_db)
    with moved(pipeline, empty_db) as copy:
        assert copy.value("select etl.reap()") == 1
        assert copy.value("select status from etl.runs order by run_id desc limit 1") == "abandoned"
        copy.routine("orders")
        assert copy.start().status == "succeeded"


def test_in_another_cluster_windows_of_transactions_wait_for_a_rebase(
    pipeline: Pipeline, private_server: Server, tmp_path: Path
) -> None:
    """The numbers in the rows and in the watermark count the transactions of the cluster they come from.

    Where the new one has had fewer transactions, old rows cannot be told from new: they are read again.
    """
    file = dump(private_server, pipeline.db, tmp_path)
    database = private_server.create_database()
    database.connect().execute(ROLES)
    restore(private_server, file, database)
    with moved(pipeline, database) as copy:
        for table in TABLES:
            assert copy.value(f"select count(*) from etl.{table}") == pipeline.value(
                f"select count(*) from etl.{table}"
            )
        assert migrate(database.dsn).applied == ()
        copy.conn.execute("call etl.work()")
        run_id = copy.value("select max(run_id) from etl.runs")
        assert copy.step(run_id, "rows")["error_code"] == "watermark.foreign"
        assert copy.outcomes(run_id)["orders"] == "succeeded"
        found = copy.rows("select * from etl.diagnose() where status = 'fail' and check_name = 'watermark'")
        assert [row["remedy"] for row in found] == ["b2s watermark rebase rows --reason '...'"]
        copy.conn.execute("select etl.rebase_watermark('rows', reason => 'restored from the backup')")
        copy.sql("insert into bronze.rows values (4)")
        assert copy.start().status == "succeeded"
        assert sorted(copy.column("select id from silver.copies")) == [1, 2, 3, 4]
    database.drop()
