"""What becomes of a schedule that is due: decided in SQL, whoever ticks, and however often."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.pipelines import Background, Gate, Pipeline, Row, call, messages_of, refused
from tests.servers import Connection, Database, wait_until

NIGHTLY: Row = {
    "name": "nightly",
    "cron": "0 2 * * *",
    "timezone": "UTC",
    "mode": None,
    "procedures": [],
    "groups": [],
    "tags": [],
    "params": {},
    "reason": None,
    "on_conflict": "skip",
    "catch_up": False,
    "late_after_ms": 3_600_000,
}
DUE = datetime(2031, 5, 6, 2, 0, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.add("orders")
        yield pipeline


def schedule(pipeline: Pipeline, next_at: datetime = DUE, **settings: Any) -> None:
    """Apply with one schedule, which is due next at a moment of the test's choice."""
    pipeline.apply(schedules=[{**NIGHTLY, **settings}])
    expect_next(pipeline, next_at)


def expect_next(pipeline: Pipeline, next_at: datetime) -> None:
    pipeline.sql(
        f"update etl.schedules set next_at = '{next_at.isoformat()}' where is_active", role="etl_engine"
    )


def tick(pipeline: Pipeline, at: datetime = DUE, conn: Connection | None = None) -> list[Row]:
    """What a clock does at a moment."""
    cursor = (conn or pipeline.conn).execute(
        "select slot_at, outcome, run_id, reason, passed_over_count from etl._fire_schedules(%s)", [at]
    )
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def work(pipeline: Pipeline, conn: Connection | None = None, **arguments: Any) -> int:
    row = (conn or pipeline.conn).execute(*call("etl.work", arguments)).fetchone()
    assert row is not None
    executed: int = row[0]
    return executed


def run_due(pipeline: Pipeline) -> int:
    row = pipeline.conn.execute("call etl.run_due()").fetchone()
    assert row is not None
    executed: int = row[0]
    return executed


def health(pipeline: Pipeline, name: str = "nightly") -> Row:
    return pipeline.rows("select * from etl.schedule_health where schedule = %s", name)[0]


# -- firing --


def test_a_schedule_that_is_due_queues_its_run_for_a_worker(pipeline: Pipeline) -> None:
    schedule(pipeline)
    assert tick(pipeline, DUE - timedelta(seconds=1)) == []
    (slot,) = tick(pipeline)
    assert (slot["slot_at"], slot["outcome"], slot["reason"]) == (DUE, "submitted", None)
    run = pipeline.run(slot["run_id"])
    assert run["status"] == "queued"
    assert run["idempotency_key"] == "schedule bronze_to_silver.nightly 2031-05-06T02:00:00Z"
    assert work(pipeline) == 1
    assert pipeline.outcomes(slot["run_id"]) == {"orders": "succeeded"}
    assert health(pipeline)["next_at"] == DUE + DAY


def test_a_schedule_says_what_is_to_run(pipeline: Pipeline) -> None:
    pipeline.add(
        "rates", "perform pg_sleep(0)", arguments="country text",
        params=[{"name": "country", "type": "string", "required": True}], tags=["daily"],
    )  # fmt: skip
    schedule(pipeline, mode="incremental", tags=["daily"], params={"rates": {"country": "DE"}})
    (slot,) = tick(pipeline)
    assert pipeline.run(slot["run_id"])["request"] == {
        "mode": "incremental",
        "tags": ["daily"],
        "params": {"rates": {"country": "DE"}},
        "pipeline": "bronze_to_silver",
        "idempotency_key": "schedule bronze_to_silver.nightly 2031-05-06T02:00:00Z",
    }
    work(pipeline)
    assert pipeline.outcomes(slot["run_id"]) == {"rates": "succeeded"}


def test_a_slot_that_is_fired_twice_is_one_run(pipeline: Pipeline) -> None:
    schedule(pipeline)
    tick(pipeline)
    assert tick(pipeline) == []
    expect_next(pipeline, DUE)
    assert tick(pipeline) == []
    pipeline.sql("delete from etl.schedule_slots", role="etl_engine")
    expect_next(pipeline, DUE)
    tick(pipeline)
    assert pipeline.value("select count(*) from etl.runs") == 1


def test_two_clocks_side_by_side_decide_a_slot_once(pipeline: Pipeline) -> None:
    schedule(pipeline)
    one = pipeline.db.connect(autocommit=False)
    other = pipeline.db.connect(options="-c lock_timeout=2s")
    (slot,) = tick(pipeline, conn=one)
    assert tick(pipeline, conn=other) == []
    one.commit()
    assert tick(pipeline, conn=other) == []
    assert pipeline.column("select run_id from etl.runs") == [slot["run_id"]]


@pytest.mark.parametrize("noted", ["never", "long ago", "just now"])
def test_an_open_transaction_of_one_clock_stops_no_other(pipeline: Pipeline, noted: str) -> None:
    pipeline.apply(schedules=[NIGHTLY, {**NIGHTLY, "name": "other"}])
    expect_next(pipeline, DUE)
    if noted != "never":
        pipeline.conn.execute("select etl._beat('clock')")
    if noted == "long ago":
        pipeline.sql("update etl.heartbeats set beat_at = beat_at - interval '1 hour'", role="etl_engine")
    one = pipeline.db.connect(autocommit=False)
    one.execute("select * from etl.fire_schedules()")
    one.execute("select from etl.schedules where name = 'nightly' for update")
    other = pipeline.db.connect(options="-c lock_timeout=2s")
    assert [slot["outcome"] for slot in tick(pipeline, conn=other)] == ["submitted"]
    other.execute("call etl.run_due()")
    one.commit()
    assert [slot["outcome"] for slot in tick(pipeline, conn=other)] == ["submitted"]
    assert pipeline.value("select count(*) from etl.heartbeats where beat_at > now() - interval '1 min'") == 1


def test_a_clock_and_a_change_of_the_configuration_do_not_lock_each_other_out(pipeline: Pipeline) -> None:
    """The file names the schedules in another order than the one in which they came to be."""
    pipeline.apply(schedules=[NIGHTLY, {**NIGHTLY, "name": "other"}])
    expect_next(pipeline, DUE)
    holder, watcher = pipeline.db.connect(autocommit=False), pipeline.db.connect()
    holder.execute("select from etl.schedules where name = 'other' for update")
    changed = [{**NIGHTLY, "name": "other", "on_conflict": "queue"}, {**NIGHTLY, "on_conflict": "queue"}]
    syncing = Background(lambda: pipeline.apply(schedules=changed))
    wait_until(
        watcher,
        "select exists (select from pg_stat_activity where pid = %s and wait_event_type = 'Lock')",
        [pipeline.conn.info.backend_pid],
    )
    clock = pipeline.db.connect()
    ticking = Background(lambda: tick(pipeline, conn=clock))
    wait_until(
        watcher,
        "select exists (select from pg_stat_activity where pid = %s and query ~ '_fire_schedules'"
        " and (wait_event_type = 'Lock' or state = 'idle'))",
        [clock.info.backend_pid],
    )
    holder.rollback()
    syncing.result()
    ticking.result()
    tick(pipeline, conn=clock)
    assert pipeline.value("select count(*) from etl.schedule_slots") == 2


def test_a_worker_can_be_the_clock_as_well(pipeline: Pipeline) -> None:
    pipeline.apply(schedules=[{**NIGHTLY, "cron": "* * * * *"}])
    assert run_due(pipeline) == 0
    pipeline.sql(
        "update etl.schedules set next_at = date_trunc('minute', clock_timestamp())", role="etl_engine"
    )
    assert work(pipeline) == 0
    assert run_due(pipeline) == 1
    assert pipeline.trace() == ["orders"]


def test_a_worker_that_is_a_clock_in_a_transaction_says_so(pipeline: Pipeline) -> None:
    with refused("25001", "call.in_transaction"):
        pipeline.db.connect(autocommit=False).execute("call etl.run_due()")


def test_an_operator_may_be_a_clock(pipeline: Pipeline) -> None:
    pipeline.apply(schedules=[{**NIGHTLY, "cron": "* * * * *"}])
    pipeline.sql(
        "update etl.schedules set next_at = date_trunc('minute', clock_timestamp())", role="etl_engine"
    )
    operator = pipeline.login("etl_operator")
    ((name, schedule_name, _, outcome, run_id, *_),) = operator.execute(
        "select * from etl.fire_schedules()"
    ).fetchall()
    assert (name, schedule_name, outcome) == ("bronze_to_silver", "nightly", "submitted")
    assert pipeline.run(run_id)["requested_by"] == operator.info.user


def test_nothing_is_started_while_b2s_is_upgraded(pipeline: Pipeline) -> None:
    schedule(pipeline)
    other = pipeline.db.connect()
    other.execute("select pg_advisory_lock(6435443, 0)")
    assert tick(pipeline) == []
    other.execute("select pg_advisory_unlock_all()")
    assert [slot["outcome"] for slot in tick(pipeline)] == ["submitted"]


# -- a run is in the way --


def test_a_long_run_is_not_stacked(pipeline: Pipeline) -> None:
    pipeline.routine("orders", Gate.WAIT)
    schedule(pipeline)
    with pipeline.gate() as gate:
        (first,) = tick(pipeline)
        worker = Background(lambda: work(pipeline, pipeline.db.connect()))
        gate.wait_for_arrivals()
        (second,) = tick(pipeline, DUE + DAY)
        assert (second["outcome"], second["run_id"]) == ("skipped", None)
        assert second["reason"] == f"run {first['run_id']} is active"
        gate.open()
        assert worker.result() == 1
    assert pipeline.value("select count(*) from etl.runs") == 1
    assert [slot["outcome"] for slot in tick(pipeline, DUE + 2 * DAY)] == ["submitted"]


def test_queue_puts_one_run_behind_the_active_one_and_no_more(pipeline: Pipeline) -> None:
    pipeline.routine("orders", Gate.WAIT)
    schedule(pipeline, on_conflict="queue")
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (first,) = tick(pipeline)
        assert first["outcome"] == "submitted"
        (second,) = tick(pipeline, DUE + DAY)
        assert (second["outcome"], second["reason"]) == ("skipped", f"run {first['run_id']} is still queued")
        gate.open()
        running.result()
    assert work(pipeline) == 1
    assert pipeline.run(first["run_id"])["status"] == "succeeded"


def test_fail_records_a_run_that_failed(pipeline: Pipeline) -> None:
    pipeline.routine("orders", Gate.WAIT)
    schedule(pipeline, on_conflict="fail")
    messages = messages_of(pipeline.conn)
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (slot,) = tick(pipeline)
        gate.open()
        active = running.result().run_id
    assert slot["outcome"] == "failed"
    run = pipeline.run(slot["run_id"])
    assert (run["status"], run["error_code"]) == ("failed", "run.active")
    assert run["error_message"] == f"run {active} is active"
    assert any("schedule nightly could not start a run" in message.text for message in messages)


def test_schedules_that_are_due_together_are_not_in_each_other_s_way(pipeline: Pipeline) -> None:
    pipeline.apply(schedules=[NIGHTLY, {**NIGHTLY, "name": "hourly", "cron": "0 * * * *"}])
    expect_next(pipeline, DUE)
    assert [slot["outcome"] for slot in tick(pipeline)] == ["submitted", "submitted"]
    assert work(pipeline) == 2


def test_a_dead_run_is_not_in_the_way(pipeline: Pipeline) -> None:
    pipeline.routine("orders", Gate.WAIT)
    schedule(pipeline)
    with pipeline.gate() as gate:
        conn = pipeline.db.connect()
        running = pipeline.start_in_background(conn)
        gate.wait_for_arrivals()
        pipeline.conn.execute("select pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])
        with pytest.raises(Exception, match="terminating connection"):
            running.result()
        assert [slot["outcome"] for slot in tick(pipeline)] == ["submitted"]


def test_a_backfill_is_not_in_the_way(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.rows (id bigint primary key); insert into bronze.rows values (1)")
    pipeline.add(
        "rows", Gate.WAIT, arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.rows.id"], "state_key": "rows", "delay_ms": 0},
    )  # fmt: skip
    schedule(pipeline, procedures=["orders"])
    with pipeline.gate() as gate:
        conn = pipeline.db.connect()
        arguments = {"procedures": ["rows"], "from_": "1", "until": "2", "chunk": "1"}
        filling = Background(lambda: conn.execute(*call("etl.backfill", arguments)).fetchone())
        gate.wait_for_arrivals()
        assert [slot["outcome"] for slot in tick(pipeline)] == ["submitted"]
        gate.open()
        filling.result()


# -- a slot that was missed --


def test_a_slot_noticed_too_late_is_missed(pipeline: Pipeline) -> None:
    schedule(pipeline)
    (slot,) = tick(pipeline, DUE + timedelta(hours=3))
    assert (slot["slot_at"], slot["outcome"], slot["run_id"]) == (DUE, "missed", None)
    assert slot["reason"] == "noticed 03:00:00 too late: no clock was running"
    assert health(pipeline)["next_at"] == DUE + DAY


def test_a_slot_is_not_missed_for_a_restart_of_the_server(pipeline: Pipeline) -> None:
    schedule(pipeline)
    assert [slot["outcome"] for slot in tick(pipeline, DUE + timedelta(minutes=4))] == ["submitted"]


def test_catch_up_runs_once_for_all_that_was_missed(pipeline: Pipeline) -> None:
    schedule(pipeline, catch_up=True)
    (slot,) = tick(pipeline, DUE + 3 * DAY + timedelta(hours=1))
    assert (slot["slot_at"], slot["outcome"], slot["passed_over_count"]) == (DUE + 3 * DAY, "submitted", 3)
    assert health(pipeline)["next_at"] == DUE + 4 * DAY


@pytest.mark.parametrize(("hours", "outcome"), [(1.9, "submitted"), (2.1, "missed")])
def test_catch_up_can_have_a_limit(pipeline: Pipeline, hours: float, outcome: str) -> None:
    schedule(pipeline, catch_up=7_200_000)
    assert [slot["outcome"] for slot in tick(pipeline, DUE + timedelta(hours=hours))] == [outcome]


def test_a_new_schedule_owes_nothing_for_the_time_before(pipeline: Pipeline) -> None:
    pipeline.apply(schedules=[{**NIGHTLY, "cron": "* * * * *", "catch_up": True}])
    assert tick(pipeline, datetime.now(UTC)) == []
    assert pipeline.value("select next_at > clock_timestamp() from etl.schedules")


def test_a_schedule_that_changes_its_time_or_comes_back_begins_anew(pipeline: Pipeline) -> None:
    schedule(pipeline)
    pipeline.apply(schedules=[{**NIGHTLY, "on_conflict": "queue"}])
    assert pipeline.value("select next_at from etl.schedules") == DUE
    pipeline.apply(schedules=[{**NIGHTLY, "timezone": "Europe/Berlin"}])
    assert pipeline.value("select next_at < now() + interval '26 hours' from etl.schedules")
    expect_next(pipeline, DUE)
    pipeline.apply(schedules=[])
    assert tick(pipeline) == []
    pipeline.apply(schedules=[NIGHTLY])
    assert pipeline.value("select next_at < now() + interval '26 hours' from etl.schedules")


# -- what is refused --


def test_a_schedule_that_cannot_be_planned_is_a_run_that_failed(pipeline: Pipeline) -> None:
    schedule(pipeline, tags=["gone"])
    (slot,) = tick(pipeline)
    assert slot["outcome"] == "failed"
    run = pipeline.run(slot["run_id"])
    assert (run["status"], run["error_code"]) == ("failed", "tag.unknown")
    assert run["error_message"] == slot["reason"] == "there is no tag gone"
    assert health(pipeline)["next_at"] == DUE + DAY


def test_a_slot_whose_key_another_request_has_is_decided(pipeline: Pipeline) -> None:
    schedule(pipeline)
    key = "schedule bronze_to_silver.nightly 2031-05-06T02:00:00Z"
    pipeline.conn.execute(
        "select * from etl.submit_run(procedures => '{orders}', idempotency_key => %s)", [key]
    )
    (slot,) = tick(pipeline)
    assert slot["outcome"] == "failed"
    run = pipeline.run(slot["run_id"])
    assert (run["status"], run["error_code"]) == ("failed", "idempotency_key.reused")
    assert health(pipeline)["next_at"] == DUE + DAY


def test_a_full_refresh_that_gives_no_reason_is_decided(pipeline: Pipeline) -> None:
    """A release before did not ask for one."""
    schedule(pipeline)
    pipeline.sql(
        'update etl.schedules set definition = definition || \'{"mode": "full"}\'', role="etl_engine"
    )
    (slot,) = tick(pipeline)
    run = pipeline.run(slot["run_id"])
    assert (slot["outcome"], run["status"], run["reason"]) == ("failed", "failed", "schedule nightly")
    assert health(pipeline)["next_at"] == DUE + DAY


def test_a_scheduled_full_refresh_is_left_for_a_clock_that_may_start_it(pipeline: Pipeline) -> None:
    pipeline.change("orders", allow_full_refresh=True)
    due = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=4)
    full = {**NIGHTLY, "name": "full", "mode": "full", "reason": "the source corrects the past"}
    pipeline.apply(schedules=[full, {**NIGHTLY, "on_conflict": "queue"}])
    expect_next(pipeline, due)
    operator = pipeline.login("etl_operator")
    said: list[tuple[str, str]] = []
    operator.add_notice_handler(lambda d: said.append((d.message_primary or "", d.message_hint or "")))
    fire = "select schedule, outcome from etl.fire_schedules()"
    assert operator.execute(fire).fetchall() == [("nightly", "submitted")]
    for _ in range(3):
        assert operator.execute(fire).fetchall() == []
    name = operator.info.user
    remedy = f"grant etl_admin to {name}, or let a member of etl_admin be the clock"
    warning = f"schedule full is due and left so: it refreshes fully, which {name} may not start"
    assert set(said) == {(warning, remedy)}
    assert len(said) <= 2, "once a minute"
    query = "select detail, remedy from etl.diagnose() where check_name = 'schedule' and status = 'fail'"
    (found,) = pipeline.rows(query)
    assert found["detail"].startswith("full, a full refresh, is due since")
    assert f"{name}, who last asked what is due, may not" in found["detail"]
    assert found["remedy"] == remedy
    assert health(pipeline, "full")["next_at"] == due
    admin = pipeline.login("etl_admin")
    assert admin.execute(fire).fetchall() == [("full", "submitted")]
    assert pipeline.rows(query) == []


def test_a_full_refresh_that_no_admin_s_clock_has_noticed_is_late(pipeline: Pipeline) -> None:
    schedule(pipeline, datetime.now(UTC) - timedelta(hours=3), mode="full", reason="x")
    pipeline.login("etl_operator").execute("select * from etl.fire_schedules()")
    assert health(pipeline)["is_late"]
    details = pipeline.column("select detail from etl.diagnose() where check_name = 'schedule'")
    assert any("no clock whose role is a member of etl_admin has noticed it" in detail for detail in details)


def test_a_scheduled_full_refresh_keeps_its_guardrails(pipeline: Pipeline) -> None:
    pipeline.change("orders", allow_full_refresh=True)
    reason = "the source corrects the past"
    schedule(pipeline, mode="full", reason=reason)
    (slot,) = tick(pipeline)
    assert slot["outcome"] == "submitted"
    work(pipeline)
    run = pipeline.run(slot["run_id"])
    assert (run["status"], run["mode"], run["reason"]) == ("succeeded", "full", reason)
    pipeline.conn.execute("select etl.freeze_full_refresh(true, reason => 'closing the books')")
    (slot,) = tick(pipeline, DUE + 9 * DAY)
    assert pipeline.run(slot["run_id"])["error_code"] == "full_refresh.frozen"


def test_one_schedule_that_cannot_be_fired_does_not_stop_the_others(pipeline: Pipeline) -> None:
    pipeline.apply(schedules=[NIGHTLY, {**NIGHTLY, "name": "other"}])
    expect_next(pipeline, DUE)
    pipeline.sql(
        'update etl.schedules set definition = definition || \'{"timezone": "Gone"}\''
        " where name = 'nightly'",
        role="etl_engine",
    )
    messages = messages_of(pipeline.conn)
    assert [slot["outcome"] for slot in tick(pipeline)] == ["submitted"]
    assert 'schedule nightly cannot be fired: time zone "Gone" not recognized' in [m.text for m in messages]


@pytest.mark.parametrize(
    ("settings", "loc", "message"),
    [
        ({"cron": "0 24 * * *"}, ["schedules", "nightly", "cron"], "24 is not a hour"),
        ({"cron": None}, ["schedules", "nightly", "cron"], "a schedule needs a cron time"),
        ({"cron": "0 0 31 2 *"}, ["schedules", "nightly", "cron"], "0 0 31 2 * names a day that never comes"),
        (
            {"timezone": "Mars"},
            ["schedules", "nightly", "timezone"],
            "the server does not know the time zone Mars",
        ),
        ({"timezone": None}, ["schedules", "nightly", "timezone"], "a schedule needs a time zone"),
        (
            {"mode": "full"},
            ["schedules", "nightly", "reason"],
            "the schedule nightly refreshes fully and gives no",
        ),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(
    pipeline: Pipeline, settings: Row, loc: list[str], message: str
) -> None:
    with refused("PT422", "config.invalid") as refusal:
        pipeline.apply(schedules=[{**NIGHTLY, **settings}])
    (problem,) = refusal.detail["errors"]
    assert problem["loc"] == loc
    assert problem["message"].startswith(message)


@pytest.mark.parametrize(
    "settings",
    [
        {"retention": {"runs": 0}},
        {"retention": {"runs": 1.5}},
        {"retention": {"logs": "400"}},
        {"retention": {"ticks": None}},
        {"clock": {"workers": -1}},
        {"clock": {"workers": 65}},
    ],
)
def test_a_retention_or_a_clock_that_cannot_be_is_refused(pipeline: Pipeline, settings: Row) -> None:
    with refused("PT422", "config.invalid"):
        pipeline.apply(**settings)


# -- what is shown --


def test_a_schedule_without_a_successful_run_is_late(pipeline: Pipeline) -> None:
    """The dead man's switch: it is the success that is missed, whatever the reason."""
    now = datetime.now(UTC)
    schedule(pipeline, cron="* * * * *", late_after_ms=600_000)
    assert not health(pipeline)["is_late"]
    pipeline.sql(
        "insert into etl.schedule_slots"
        " select schedule_id, now() - interval '11 minutes', now(), 'skipped', null, 0, 'x'"
        " from etl.schedules",
        role="etl_engine",
    )
    found = health(pipeline)
    assert found["is_late"]
    assert abs(found["late_since"] - (now - timedelta(minutes=11))) < timedelta(minutes=1)
    pipeline.sql(
        "update etl.schedules set next_at = clock_timestamp() - interval '1 minute'", role="etl_engine"
    )
    pipeline.conn.execute("select * from etl.fire_schedules()")
    assert health(pipeline)["is_late"]
    work(pipeline)
    found = health(pipeline)
    assert (found["is_late"], found["last_status"]) == (False, "succeeded")
    assert found["last_success_at"] is not None


def test_a_schedule_is_late_when_its_clock_has_died(pipeline: Pipeline) -> None:
    schedule(pipeline, datetime.now(UTC) - timedelta(minutes=61))
    assert health(pipeline)["is_late"]


def test_a_run_that_resumes_the_scheduled_one_counts_as_its_success(pipeline: Pipeline) -> None:
    pipeline.routine("orders", "perform 1 / 0")
    schedule(pipeline)
    (slot,) = tick(pipeline)
    work(pipeline)
    assert health(pipeline)["last_success_at"] is None
    pipeline.routine("orders")
    pipeline.conn.execute("call etl.resume_run(%s)", [slot["run_id"]])
    assert health(pipeline)["last_success_at"] is not None


def test_the_history_of_a_schedule_is_kept(pipeline: Pipeline) -> None:
    schedule(pipeline)
    tick(pipeline)
    work(pipeline)
    tick(pipeline, DUE + DAY + timedelta(hours=1))
    found = pipeline.rows("select * from etl.schedule_history order by slot_at")
    assert [(row["schedule"], row["outcome"], row["run_status"]) for row in found] == [
        ("nightly", "submitted", "succeeded"),
        ("nightly", "missed", None),
    ]


def test_the_clock_leaves_its_heartbeat(pipeline: Pipeline) -> None:
    pipeline.conn.execute("set application_name = 'a clock'")
    pipeline.conn.execute("select * from etl.fire_schedules()")
    (beat,) = pipeline.rows("select *, clock_timestamp() - beat_at as age from etl.heartbeats")
    assert (beat["name"], beat["application_name"]) == ("clock", "a clock")
    assert beat["age"] < timedelta(seconds=5)
