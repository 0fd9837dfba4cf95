"""The real clock: pg_cron fires once a minute, so these tests take minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from b2s.cli import main
from tests.pipelines import Gate, Pipeline
from tests.servers import CRON_DATABASE, Connection, Database, Server, wait_until

TWO_TICKS: Final = 130
FILE: Final = """\
version: 1
procedures:
  - {name: silver.orders, routine: silver.orders, type: fact}
schedules:
  - {name: often, cron: "* * * * *", timezone: Europe/Berlin}
  - {name: never_late, cron: "0 0 1 1 *", catch_up: false}
  - {name: made_up_for, cron: "0 0 1 1 *", catch_up: true, on_conflict: queue}
clock: {executor: pg_cron, role: b2s_clock}
"""


@pytest.fixture
def clockwork(cron_db: Database, tmp_path: Path) -> Iterator[Pipeline]:
    """A configuration that was synced by a role that is no superuser, whose jobs another such role owns."""
    with Pipeline(cron_db) as pipeline:
        pipeline.routine("orders", Gate.WAIT)
        file = tmp_path / "transformations.yaml"
        file.write_text(FILE, encoding="utf-8")
        deployer = make_conninfo(cron_db.dsn, user="b2s_deployer")
        assert main(["sync-config", "--dsn", deployer, "--config", str(file)]) == 0
        yield pipeline


def outcome(conn: Connection, schedule: str, number: int = 1) -> tuple[str, str | None]:
    """What became of a slot of a schedule, once pg_cron has fired."""
    query = (
        "select array[outcome, reason] from etl.schedule_history"
        " where schedule = %s order by slot_at offset %s limit 1"
    )
    found = wait_until(conn, query, [schedule, number - 1], timeout=TWO_TICKS)
    return found[0], found[1]


def test_pg_cron_fires_a_schedule_and_does_not_stack_a_long_run(clockwork: Pipeline) -> None:
    conn = clockwork.conn
    conn.execute("update etl.schedules set next_at = now() - interval '1 hour' where name <> 'often'")
    with clockwork.gate() as gate:
        wait_until(gate.conn, ARRIVED, timeout=TWO_TICKS)
        assert outcome(conn, "often") == ("submitted", None)
        assert outcome(conn, "never_late")[0] == "missed"
        assert outcome(conn, "made_up_for") == ("submitted", None)
        outcome_of_second, reason = outcome(conn, "often", 2)
        assert outcome_of_second == "skipped"
        assert reason is not None
        assert reason.startswith("run ")
        # Two clocks that tick at once may share what is due, and the run of the other one be the first.
        assert reason.endswith((" is active", " is still queued"))
        assert clockwork.value("select count(*) from etl.runs where status = 'running'") == 1
        gate.open()
    ended = "select count(*) >= 2 from etl.runs where status = 'succeeded'"
    wait_until(conn, ended, timeout=TWO_TICKS)
    assert clockwork.column("select distinct requested_by from etl.runs") == ["b2s_clock"]
    beat = clockwork.rows("select * from etl.heartbeats where name = 'clock'")[0]
    assert (beat["session_user_name"], beat["application_name"]) == ("b2s_clock", "pg_cron")
    failed = "select command, return_message from cron.job_run_details where status = 'failed'"
    assert conn.execute(failed).fetchall() == []
    assert clockwork.rows("select * from etl.diagnose() where check_name = 'clock'")[0]["status"] == "ok"


ARRIVED: Final = """
select exists (select from pg_locks
                where locktype = 'advisory' and classid = 0 and objid = 4242 and not granted)"""


def test_a_server_that_restarts_in_the_middle_of_a_run_goes_on_with_the_next_one(
    clockwork: Pipeline, cron_server: Server
) -> None:
    with contextlib.suppress(psycopg.OperationalError), clockwork.gate() as gate:
        wait_until(gate.conn, ARRIVED, timeout=TWO_TICKS)
        cron_server.restart()
    clockwork.conn = cron_server.connect(CRON_DATABASE)
    clockwork.db.connections.append(clockwork.conn)
    clockwork.routine("orders")
    dead = "select status from etl.runs where run_id = 1 and ended_at is not null"
    assert wait_until(clockwork.conn, dead, timeout=TWO_TICKS) == "abandoned"
    later = "select run_id > 1 from etl.runs where status = 'succeeded' limit 1"
    assert wait_until(clockwork.conn, later, timeout=TWO_TICKS)
    assert clockwork.trace()[:1] == ["orders"]
