"""What is remembered of a run, that nobody can rewrite it, and what is told while it goes."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.pipelines import Gate, Pipeline, messages_of, refused
from tests.servers import Database, wait_until

VIEW = [{"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}]


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql("create table bronze.src (at timestamptz)")
        pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
        yield pipeline


def rich_run(pipeline: Pipeline) -> int:
    """A run with a retried, a failed, a skipped and a succeeded step, and a refresh."""
    pipeline.sql("create sequence silver.tries")
    pipeline.add(
        "a_load",
        "if nextval('silver.tries') = 1 then raise sqlstate '40001' using message = 'again'; end if;"
        " insert into silver.trace (step) values ('a')",
        arguments="p_since timestamptz, p_until timestamptz",
        watermark={"strategy": "timestamp", "source": ["bronze.src.at"], "state_key": "a", "delay_ms": 0},
        mv_refresh=VIEW,
    )
    pipeline.add("b_broken", "perform 1 / 0")
    pipeline.add("c_child", dependencies=["b_broken"])
    pipeline.apply()
    return pipeline.start().run_id


# -- nobody rewrites history --


CHANGES = [
    "update etl.runs set reason = 'nicer'",
    "update etl.runs set status = 'running', ended_at = null",
    "delete from etl.runs",
    "truncate etl.runs cascade",
    "update etl.procedure_runs set rows_affected = 1000000",
    "delete from etl.procedure_runs",
    "truncate etl.procedure_runs",
    "update etl.mv_refreshes set warning = 'none'",
    "delete from etl.mv_refreshes",
    "truncate etl.mv_refreshes",
    "update etl.state_history set reason = 'x'",
    "delete from etl.state_history",
    "truncate etl.state_history",
    "update etl.config_versions set author = 'somebody'",
    "delete from etl.config_versions",
    "truncate etl.config_versions cascade",
    "update etl.full_refresh_freezes set reason = 'x'",
    "delete from etl.full_refresh_freezes",
    "truncate etl.full_refresh_freezes",
]


def test_history_cannot_be_rewritten_by_any_role(pipeline: Pipeline) -> None:
    rich_run(pipeline)
    pipeline.value("select etl.freeze_full_refresh(true, reason => 'month end')")
    tables = [
        "runs",
        "procedure_runs",
        "mv_refreshes",
        "state_history",
        "config_versions",
        "full_refresh_freezes",
    ]

    def history() -> list[Any]:
        return [pipeline.column(f"select to_jsonb(t) from etl.{table} t order by 1") for table in tables]

    before = history()
    assert all(before)
    for role in ("none", "etl_engine"):
        pipeline.conn.execute(f"set role {role}".encode())
        for change in CHANGES:
            with refused("PT409", "history.immutable") as refusal:
                pipeline.conn.execute(change.encode())
            assert "cannot be changed" in refusal.message
    for role in ("etl_owner", "etl_admin", "etl_operator", "etl_reader"):
        pipeline.conn.execute(f"set role {role}".encode())
        for change in CHANGES:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                pipeline.conn.execute(change.encode())
    pipeline.conn.execute("reset role")
    assert history() == before


def test_an_abandoned_run_is_history_too(pipeline: Pipeline) -> None:
    pipeline.add("load", Gate.WAIT)
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        pipeline.value("select pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(psycopg.OperationalError):
            started.result()
    pipeline.start()
    with refused("PT409", "history.immutable"):
        pipeline.conn.execute("update etl.runs set status = 'succeeded' where status = 'abandoned'")
    with refused("PT409", "history.immutable"):
        pipeline.conn.execute("delete from etl.procedure_runs where status = 'abandoned'")


# -- reading it --


def test_get_run_returns_the_whole_run_as_one_document(pipeline: Pipeline) -> None:
    run_id = rich_run(pipeline)
    document = pipeline.value("select etl.get_run(%s)", run_id)
    assert (document["run_id"], document["pipeline"], document["status"]) == (
        run_id,
        "bronze_to_silver",
        "failed",
    )
    assert (document["step_count"], document["is_dead"], document["request"]) == (3, False, {})
    assert document["error_message"] == "b_broken: division by zero"
    assert [(s["procedure"], s["attempt"], s["status"]) for s in document["steps"]] == [
        ("a_load", 1, "retrying"), ("a_load", 2, "succeeded"), ("b_broken", 1, "failed"),
        ("c_child", 1, "skipped"),
    ]  # fmt: skip
    succeeded = document["steps"][1]
    assert succeeded["statement"].startswith("select silver.a_load(p_since => NULL::")
    assert succeeded["table_counts"] == {"silver.trace": {"inserted": 1, "updated": 0, "deleted": 0}}
    assert [m["mv_name"] for m in document["mv_refreshes"]] == ["silver.mv"]


def test_get_run_knows_an_unknown_run(pipeline: Pipeline) -> None:
    with refused("PT404", "run.unknown"):
        pipeline.value("select etl.get_run(4711)")


def test_an_active_run_can_be_watched(pipeline: Pipeline) -> None:
    pipeline.add("a_first")
    pipeline.add("b_slow", Gate.WAIT)
    pipeline.add("c_last")
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        (row,) = pipeline.rows("select * from etl.run_history")
        assert (row["status"], row["is_dead"], row["worker_pid"], row["ended_at"]) == (
            "running",
            False,
            pid,
            None,
        )
        assert row["duration_ms"] > 0
        statuses = pipeline.column("select status from etl.step_history order by order_index")
        assert statuses == ["succeeded", "running", "pending"]
        assert pipeline.value("select duration_ms >= 0 from etl.step_history where procedure = 'b_slow'")
        name = pipeline.value("select application_name from pg_stat_activity where pid = %s", pid)
        assert name == f"b2s run {row['run_id']} b_slow"
        gate.open()
        started.result()
    (row,) = pipeline.rows("select * from etl.run_history")
    assert float(row["duration_ms"]) == round((row["ended_at"] - row["started_at"]).total_seconds() * 1000, 3)


def test_procedure_health_tells_how_each_procedure_stands(pipeline: Pipeline) -> None:
    run_id = rich_run(pipeline)
    health = {row["procedure"]: row for row in pipeline.rows("select * from etl.procedure_health")}
    assert health["a_load"]["last_status"] == "succeeded"
    assert health["a_load"]["watermark"] == pipeline.watermark("a")
    assert health["a_load"]["last_success_at"] == pipeline.step(run_id, "a_load")["ended_at"]
    broken = health["b_broken"]
    assert (broken["last_run_id"], broken["last_status"]) == (run_id, "failed")
    assert (broken["last_error_code"], broken["last_success_at"]) == ("22012", None)


def test_run_events_tell_the_run_in_order(pipeline: Pipeline) -> None:
    run_id = rich_run(pipeline)
    events = pipeline.rows("select * from etl.run_events where run_id = %s order by at, event", run_id)
    assert [e["event"] for e in events if e["procedure"] == "a_load"] == [
        "step_started", "step_retrying", "step_started", "step_succeeded",
    ]  # fmt: skip
    assert events[0]["event"] == "run_started"
    assert events[-1]["event"] == "run_failed"
    kinds = {e["event"] for e in events}
    assert {"step_failed", "step_skipped", "refresh_succeeded"} <= kinds
    (skipped,) = [e for e in events if e["event"] == "step_skipped"]
    assert (skipped["procedure"], skipped["error_code"]) == ("c_child", "upstream_failed")


def test_a_finished_attempt_has_a_duration_in_milliseconds(pipeline: Pipeline) -> None:
    pipeline.add("load", "perform 1")
    pipeline.apply()
    step = pipeline.step(pipeline.start().run_id, "load")
    assert float(step["duration_ms"]) == round(
        (step["ended_at"] - step["started_at"]).total_seconds() * 1000, 3
    )


def test_state_says_who_moved_the_watermark_when_and_with_how_many_rows(pipeline: Pipeline) -> None:
    run_id = rich_run(pipeline)
    (state,) = pipeline.rows("select * from etl.state")
    assert (state["state_key"], state["last_run_id"], state["last_rowcount"]) == ("a", run_id, 1)
    assert state["last_success_watermark"] == pipeline.step(run_id, "a_load")["window_until"]
    (moved,) = pipeline.rows("select * from etl.state_history")
    assert (moved["cause"], moved["run_id"], moved["old_watermark"]) == ("incremental", run_id, None)
    assert moved["changed_by"] == pipeline.value("select session_user")


# -- what is told while it goes --


def test_notices_tell_people_what_happens(pipeline: Pipeline) -> None:
    received = messages_of(pipeline.conn)
    run_id = rich_run(pipeline)
    told = [(message.severity, message.text) for message in received]

    def heard(severity: str, *parts: str) -> bool:
        return any(s == severity and all(part in text for part in parts) for s, text in told)

    assert heard("WARNING", "[1] a_load retrying in ", ": again")
    assert heard("NOTICE", "[1] a_load succeeded 1 row in ", " ms")
    assert heard("WARNING", "[2] b_broken failed in ", ": division by zero")
    assert heard("NOTICE", "silver.mv succeeded in ")
    assert heard("WARNING", f"run {run_id} failed in ")


def test_in_json_mode_each_notice_carries_its_event(pipeline: Pipeline) -> None:
    pipeline.conn.execute("set b2s.progress = 'json'")
    received = messages_of(pipeline.conn)
    run_id = rich_run(pipeline)
    assert {(message.severity, message.sqlstate) for message in received} == {("NOTICE", "PT200")}
    events = [json.loads(message.detail) for message in received]
    assert {event["run_id"] for event in events} == {run_id}
    assert [event["event"] for event in events if event.get("procedure") == "a_load"] == [
        "step_started", "step_retrying", "step_started", "step_succeeded",
    ]  # fmt: skip
    failed = next(event for event in events if event["event"] == "step_failed")
    assert (failed["error_code"], failed["error_class"]) == ("22012", "data_quality")
    assert events[-1]["event"] == "run_failed"


def test_a_step_that_was_rolled_back_is_never_told_as_succeeded(pipeline: Pipeline) -> None:
    pipeline.conn.execute("set b2s.progress = 'json'")
    pipeline.add("a", group="g", transaction_scope="per_group")
    pipeline.add("b", "perform 1 / 0", group="g", transaction_scope="per_group")
    pipeline.apply()
    received = messages_of(pipeline.conn)
    pipeline.start()
    events = [json.loads(message.detail) for message in received]
    ended = {
        event["procedure"]: event["event"]
        for event in events
        if event["event"] != "step_started" and "procedure" in event
    }
    assert ended == {"a": "step_rolled_back", "b": "step_failed"}


def test_a_listener_hears_each_outcome_while_the_run_goes_on(pipeline: Pipeline) -> None:
    pipeline.add("a_first")
    pipeline.add("b_slow", Gate.WAIT)
    pipeline.apply()
    listener = pipeline.db.connect()
    listener.execute("listen etl")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        early = [json.loads(note.payload) for note in listener.notifies(timeout=5, stop_after=1)]
        assert [(event["event"], event["procedure"]) for event in early] == [("step_succeeded", "a_first")]
        wait_until(gate.conn, "select count(*) > 0 from etl.runs where status = 'running'")
        gate.open()
        run = started.result()
    late = [json.loads(note.payload) for note in listener.notifies(timeout=5, stop_after=2)]
    assert [event["event"] for event in late] == ["step_succeeded", "run_succeeded"]
    assert {event["run_id"] for event in early + late} == {run.run_id}


def test_a_long_error_message_does_not_stop_the_run_from_being_told(pipeline: Pipeline) -> None:
    pipeline.add("load", "raise exception '%', repeat('é', 9000)")
    pipeline.apply()
    listener = pipeline.db.connect()
    listener.execute("listen etl")
    run = pipeline.start()
    assert run.status == "failed"
    assert len(pipeline.step(run.run_id, "load")["error_message"]) == 9000
    events = [json.loads(note.payload)["event"] for note in listener.notifies(timeout=5, stop_after=2)]
    assert events == ["step_failed", "run_failed"]


def test_a_step_that_changed_many_tables_is_told_to_listeners_as_valid_json(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.p (id int) partition by list (id)")
    pipeline.sql(
        "do $$ begin for n in 1 .. 150 loop"
        " execute format('create table silver.a_partition_with_a_name_%s partition of silver.p"
        " for values in (%s)', n, n);"
        " end loop; end $$"
    )
    pipeline.add("load", "insert into silver.p select generate_series(1, 150)")
    pipeline.apply()
    listener = pipeline.db.connect()
    listener.execute("listen etl")
    run = pipeline.start()
    assert len(pipeline.step(run.run_id, "load")["table_counts"]) == 150
    told, _ = [json.loads(note.payload) for note in listener.notifies(timeout=5, stop_after=2)]
    assert (told["event"], told["rows_affected"]) == ("step_succeeded", 150)
