"""b2s worker: sessions that take up what is submitted, share runs, and survive what happens to them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from b2s.retry import backoff
from tests.pipelines import Gate, Pipeline, call
from tests.processes import SECONDS, Command, b2s
from tests.servers import Database, Server, wait_until

OPEN = '"session_opened"'


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


@pytest.fixture
def wide(pipeline: Pipeline) -> Pipeline:
    """Two steps that wait at the gate, and one that needs both."""
    pipeline.add("a", Gate.WAIT, type="dimension")
    pipeline.add("b", Gate.WAIT, type="dimension")
    pipeline.add("c", dependencies=["a", "b"])
    pipeline.apply()
    return pipeline


def submit(pipeline: Pipeline, /, **arguments: Any) -> int:
    row = pipeline.conn.execute(*call("etl.submit_run", arguments, "select run_id from")).fetchone()
    assert row is not None
    run_id: int = row[0]
    return run_id


def worker(pipeline: Pipeline, tmp_path: Path, *words: str) -> AbstractContextManager[Command]:
    return b2s(tmp_path, pipeline.db.dsn, "worker", "--log-format", "json", *words)


def ends(pipeline: Pipeline, run_id: int) -> str:
    """Wait until a run has ended; how."""
    status: str = wait_until(
        pipeline.conn,
        "select status from etl.runs where run_id = %s and ended_at is not null union all select null",
        [run_id],
        timeout=SECONDS,
    )
    return status


# -- work --


def test_a_submitted_run_is_heard_of_and_executed_at_once(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply()
    with worker(pipeline, tmp_path, "--poll", "1h") as running:
        running.wait_for(OPEN, 2)
        wait_until(
            pipeline.conn, "select count(*) = 1 from pg_stat_activity where query = 'select etl.watchdog()'"
        )
        run_id = submit(pipeline)
        assert ends(pipeline, run_id) == "succeeded"
        waited = pipeline.value("select started_at - submitted_at from etl.runs where run_id = %s", run_id)
        assert waited.total_seconds() < 1.5
        running.wait_for('"run_succeeded"')
        assert running.events("step_succeeded")[0]["procedure"] == "a"


def test_the_sessions_of_a_worker_share_a_run(wide: Pipeline, tmp_path: Path) -> None:
    with wide.gate() as gate, worker(wide, tmp_path, "-j", "2", "--poll", "50ms") as running:
        run_id = submit(wide)
        assert len(set(gate.wait_for_arrivals(2))) == 2
        gate.open()
        assert ends(wide, run_id) == "succeeded"
        assert wide.trace() == ["c"]
        running.send(signal.SIGTERM)
        assert running.end() == 0


def test_a_worker_helps_with_a_run_that_another_session_began(wide: Pipeline, tmp_path: Path) -> None:
    with wide.gate() as gate:
        begun = wide.start_in_background()
        (first,) = gate.wait_for_arrivals(1)
        with worker(wide, tmp_path, "-j", "1", "--poll", "50ms"):
            assert first in gate.wait_for_arrivals(2)
            gate.open()
            assert begun.result().status == "succeeded"


def test_once_works_until_nothing_is_queued(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply()
    runs = [submit(pipeline) for _ in range(3)]
    with worker(pipeline, tmp_path, "--once", "--json", "-j", "2") as running:
        assert running.end() == 0
        assert json.loads(running.out) == {"executed": runs, "is_clean": True}
    started = pipeline.column("select run_id from etl.runs order by started_at")
    assert started == runs, "first come, first served"


def test_once_no_session_leaves_while_another_one_works(wide: Pipeline, tmp_path: Path) -> None:
    wide.apply(max_concurrency=1)
    other = Pipeline(wide.db, "other")
    other.add("d")
    other.apply()
    polls = (
        "select max(query_start) from pg_stat_activity"
        " where application_name = 'b2s worker' and query like '%distinct on%'"
    )
    submit(wide, pipeline="bronze_to_silver")
    with wide.gate() as gate, worker(wide, tmp_path, "--once", "-j", "2", "--poll", "20ms") as running:
        gate.wait_for_arrivals(1)
        running.wait_for(OPEN, 2)
        for _ in range(3):  # nothing is queued, and the other session looks again and again
            seen = wait_until(wide.conn, polls, timeout=SECONDS)
            wait_until(wide.conn, f"select ({polls}) > '{seen}'", timeout=SECONDS)
        late = submit(other, pipeline="other")
        assert ends(wide, late) == "succeeded"
        gate.open()
        assert running.end() == 0


def test_a_worker_keeps_to_the_pipelines_it_was_given(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply()
    other = Pipeline(pipeline.db, "other")
    other.add("b")
    other.apply()
    mine, others = submit(pipeline, pipeline="bronze_to_silver"), submit(other, pipeline="other")
    with worker(pipeline, tmp_path, "--once", "--pipeline", "other") as running:
        assert running.end() == 0
    assert (pipeline.run(mine)["status"], pipeline.run(others)["status"]) == ("queued", "succeeded")
    with worker(pipeline, tmp_path, "--once") as running:
        assert running.end() == 0
    assert pipeline.run(mine)["status"] == "succeeded"


def test_a_worker_sees_to_timeouts(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a", Gate.WAIT, timeout_ms=200)
    pipeline.add("b")
    pipeline.apply()
    with pipeline.gate(), worker(pipeline, tmp_path, "--once") as running:
        run_id = submit(pipeline)
        assert ends(pipeline, run_id) == "failed"
        assert running.end() == 0
    step = pipeline.step(run_id, "a")
    assert (step["error_class"], step["error_code"]) == ("timeout", "step.timeout")
    assert pipeline.outcomes(run_id)["b"] == "succeeded"


def test_a_worker_records_runs_that_died(wide: Pipeline, tmp_path: Path) -> None:
    with wide.gate() as gate:
        wide.start_in_background()
        (pid,) = gate.wait_for_arrivals(1)
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [pid])
        with worker(wide, tmp_path, "-j", "1"):
            assert ends(wide, 1) == "abandoned"


def test_an_operator_may_be_a_worker(wide: Pipeline, tmp_path: Path) -> None:
    operator = wide.login("etl_operator")
    dsn = make_conninfo(wide.db.dsn, user=operator.info.user, password=operator.info.password)
    words = ("worker", "--log-format", "json", "-j", "2", "--poll", "50ms")
    with wide.gate() as gate, b2s(tmp_path, dsn, *words) as running:
        run_id = submit(wide)
        gate.wait_for_arrivals(2)
        running.send(signal.SIGTERM)
        running.wait_for('"worker_stopping"')
        running.send(signal.SIGTERM)
        assert running.end() == 1
    assert wide.run(run_id)["status"] == "abandoned"


# -- stopping --


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_stops_at_a_signal(pipeline: Pipeline, tmp_path: Path, number: signal.Signals) -> None:
    with worker(pipeline, tmp_path, "--poll", "1h") as running:
        running.wait_for(OPEN, 2)
        running.send(number)
        assert running.end() == 0
        assert running.events("worker_stopping")[0]["signal"] == number.name
    assert wait_until(
        pipeline.conn, "select count(*) = 0 from pg_stat_activity where application_name = 'b2s worker'"
    )


def test_a_worker_that_is_told_to_stop_finishes_its_run_and_takes_no_other(
    wide: Pipeline, tmp_path: Path
) -> None:
    with wide.gate() as gate, worker(wide, tmp_path, "-j", "2", "--poll", "50ms") as running:
        first = submit(wide)
        gate.wait_for_arrivals(2)
        second = submit(wide)
        running.send(signal.SIGTERM)
        running.wait_for('"worker_stopping"')
        gate.open()
        assert running.end() == 0
        assert running.events("worker_stopping")[0]["active_runs"] == [first]
    assert (wide.run(first)["status"], wide.run(second)["status"]) == ("succeeded", "queued")
    assert wide.run(first)["cancel_requested_at"] is None


@pytest.mark.parametrize("is_patient", [True, False], ids=["at a second signal", "when the grace is over"])
def test_sessions_are_cut_off(wide: Pipeline, tmp_path: Path, is_patient: bool) -> None:
    grace = "1h" if is_patient else "10ms"
    with wide.gate() as gate, worker(wide, tmp_path, "--poll", "50ms", "--grace", grace) as running:
        run_id = submit(wide)
        gate.wait_for_arrivals(2)
        running.send(signal.SIGTERM)
        if is_patient:
            running.wait_for('"worker_stopping"')
            running.send(signal.SIGTERM)
        assert running.end() == 1
        assert running.events("sessions_cut_off")[0]["active_runs"] == [run_id]
        assert wide.run(run_id)["status"] == "abandoned", "nobody was left: it is recorded at once"
        gate.open()
        wide.conn.execute(*call("etl.resume_run", {"run_id": run_id}))
    assert wide.outcomes(run_id + 1) == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}


def test_a_step_that_was_cut_off_is_tried_again_by_another_worker(wide: Pipeline, tmp_path: Path) -> None:
    with wide.gate() as gate, worker(wide, tmp_path, "-j", "1", "--poll", "50ms") as leaving:
        run_id = submit(wide)
        gate.wait_for_arrivals(1)
        with worker(wide, tmp_path, "-j", "1", "--poll", "50ms"):
            gate.wait_for_arrivals(2)
            leaving.send(signal.SIGTERM)
            leaving.wait_for('"worker_stopping"')
            leaving.send(signal.SIGTERM)
            assert leaving.end() == 1
            gate.open()
            assert ends(wide, run_id) == "succeeded"
    lost = [step for step in wide.steps(run_id) if step["status"] == "retrying"]
    assert [(step["error_code"], step["error_class"]) for step in lost] == [("worker.lost", "transient")]


# -- what happens to sessions --


def test_a_session_that_was_ended_comes_back(wide: Pipeline, tmp_path: Path) -> None:
    with wide.gate() as gate, worker(wide, tmp_path, "-j", "2", "--poll", "50ms") as running:
        run_id = submit(wide)
        pids = gate.wait_for_arrivals(2)
        wide.conn.execute("select pg_terminate_backend(%s, 5000)", [pids[0]])
        running.wait_for(OPEN, 3)
        assert running.events("session_lost")[0]["run_id"] == run_id
        gate.open()
        assert ends(wide, run_id) == "succeeded"
    assert [step["error_code"] for step in wide.steps(run_id) if step["attempt"] == 1].count(
        "worker.lost"
    ) == 1


@pytest.fixture
def private_pipeline(private_server: Server) -> Iterator[Pipeline]:
    """A pipeline on a server that may crash."""
    database = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(database) as pipeline:
        pipeline.add("a")
        pipeline.apply()
        pipeline.conn.execute("checkpoint")  # the servers of the tests promise nothing about the last commits
        yield pipeline
    database.drop()


def test_a_worker_outlives_a_crash_of_the_server(private_pipeline: Pipeline, tmp_path: Path) -> None:
    with worker(private_pipeline, tmp_path, "-j", "1") as running:
        running.wait_for(OPEN)
        private_pipeline.db.server.restart("immediate")
        running.wait_for(OPEN, 2)
        private_pipeline.conn = private_pipeline.db.connect()
        assert ends(private_pipeline, submit(private_pipeline)) == "succeeded"
        running.send(signal.SIGTERM)
        assert running.end() == 0
        assert running.events("session_lost")


def test_a_worker_waits_for_a_database_that_does_not_answer_yet(db: Database, tmp_path: Path) -> None:
    with db.server.connect() as conn:
        allow = sql.SQL("alter database {} allow_connections {}")
        conn.execute(allow.format(sql.Identifier(db.name), sql.Literal(False)))
        with b2s(tmp_path, db.dsn, "worker", "--log-format", "json", "-j", "1") as running:
            running.wait_for('"session_lost"')
            conn.execute(allow.format(sql.Identifier(db.name), sql.Literal(True)))
            running.wait_for(OPEN)
            running.send(signal.SIGTERM)
            assert running.end() == 0


def test_waits_between_tries_grow_up_to_a_limit_and_differ() -> None:
    delays = backoff()
    first = [next(delays) for _ in range(12)]
    assert all(
        low <= delay <= high
        for delay, low, high in zip(first[:4], (0.125, 0.25, 0.5, 1), (0.25, 0.5, 1, 2), strict=True)
    )
    assert all(15 <= delay <= 30 for delay in first[8:])
    assert len(set(first[8:])) > 1


# -- what no patience repairs --


def test_a_database_without_b2s_ends_a_worker_at_once(empty_db: Database, tmp_path: Path) -> None:
    with b2s(tmp_path, empty_db.dsn, "worker") as running:
        assert running.end() == 3
        assert "b2s migrate" in running.err


def test_wrong_options_of_a_worker_are_explained(pipeline: Pipeline, tmp_path: Path) -> None:
    for words, text in {
        ("--pipeline", "nope"): "there is no pipeline nope",
        ("-j", "0"): "--workers must be at least 1",
        ("--poll", "soon"): "--poll soon",
    }.items():
        with worker(pipeline, tmp_path, *words) as running:
            assert running.end() == 2
            assert text in running.err


# -- the clock --


def test_a_worker_with_schedules_fires_and_executes_them(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply(schedules=[{"name": "often", "cron": "1 seconds", "timezone": "UTC"}])
    with worker(pipeline, tmp_path, "--schedule", "--poll", "1h") as running:
        running.wait_for('"schedule_fired"', 2)
        running.wait_for('"run_succeeded"', 2)
        first, second, *_ = running.events("schedule_fired")
        assert (first["schedule"], first["outcome"], first["pipeline"]) == (
            "often",
            "submitted",
            pipeline.name,
        )
        assert first["slot_at"] < second["slot_at"]
        running.wait_for('"history_purged"')
        running.send(signal.SIGTERM)
        assert running.end() == 0
    names = pipeline.column("select name from etl.heartbeats order by name")
    assert names == ["clock", "purge"]


def test_workers_with_schedules_side_by_side_start_each_run_once(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply(schedules=[{"name": "often", "cron": "1 seconds", "timezone": "UTC"}])
    with (
        worker(pipeline, tmp_path, "--schedule") as one,
        worker(pipeline, tmp_path, "--schedule") as other,
    ):
        one.wait_for(OPEN)
        other.wait_for(OPEN)
        wait_until(
            pipeline.conn, "select count(*) >= 4 from etl.runs where status = 'succeeded'", timeout=SECONDS
        )
        for running in (one, other):
            running.send(signal.SIGTERM)
            assert running.end() == 0
        fired = [*one.events("schedule_fired"), *other.events("schedule_fired")]
    slots = [event["slot_at"] for event in fired]
    assert len(slots) == len(set(slots))
    assert pipeline.value("select count(*) = count(distinct idempotency_key) from etl.runs")


def test_a_worker_that_does_not_stay_can_be_called_by_a_clock(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply(schedules=[{"name": "often", "cron": "* * * * *", "timezone": "UTC"}])
    pipeline.conn.execute("update etl.schedules set next_at = date_trunc('minute', now())")
    with worker(pipeline, tmp_path, "--schedule", "--once") as running:
        assert running.end() == 0
        assert len(running.events("schedule_fired")) == 1
        assert len(running.events("run_succeeded")) == 1
    with worker(pipeline, tmp_path, "--once") as running:
        assert running.end() == 0


def test_a_worker_without_the_option_fires_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a")
    pipeline.apply(schedules=[{"name": "often", "cron": "* * * * *", "timezone": "UTC"}])
    pipeline.conn.execute("update etl.schedules set next_at = date_trunc('minute', now())")
    with worker(pipeline, tmp_path, "--once") as running:
        assert running.end() == 0
    assert pipeline.value("select count(*) from etl.runs") == 0
    assert pipeline.value("select count(*) from etl.heartbeats") == 0
