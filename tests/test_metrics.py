"""Counters and histograms: true at any moment, whichever way a run ends, and independent of history."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import datetime, timedelta

import psycopg
import pytest

from tests.pipelines import Background, Gate, Pipeline, Row
from tests.servers import Connection, Database, Server, wait_until
from tests.test_slices import add as add_sliced
from tests.test_slices import fill as fill_events

BUCKETS = 12


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


Counts = dict[tuple[str, ...], int]


def counts(pipeline: Pipeline, family: str = "step", conn: Connection | None = None) -> Counts:
    """What has been counted, without the zeroes: (subject, mode, status) -> how often."""
    query = (
        "select subject, mode, status, observed_count from etl.metrics_outcomes"
        " where family = %s and observed_count > 0"
    )
    rows = (conn or pipeline.conn).execute(query.encode(), [family]).fetchall()
    return {(subject, mode, status): count for subject, mode, status, count in rows}


def outcome(pipeline: Pipeline, subject: str, status: str, mode: str = "incremental") -> Row:
    (row,) = pipeline.rows(
        "select * from etl.metrics_outcomes where subject = %s and status = %s and mode = %s",
        subject,
        status,
        mode,
    )
    return row


def recount(pipeline: Pipeline) -> Counts:
    """The same from the history, one attempt after the other, in Python."""
    attempts = pipeline.rows(
        "select p.*, r.kind from etl.procedure_runs p join etl.runs r using (run_id)"
        " order by run_id, order_index, attempt"
    )
    last = {(one["run_id"], one["order_index"]): one for one in attempts}
    found: Counts = {}
    for one in attempts:
        mode = "backfill" if one["kind"] == "backfill" else one["mode"]
        is_last = last[one["run_id"], one["order_index"]] is one
        if one["status"] == "retrying":
            status = "retrying"
        elif is_last and one["ended_at"] and one["skip_reason"] != "reused":
            status = "skipped" if one["duration_ms"] is None else one["status"]
        else:
            continue
        key = (one["procedure_name"], mode, status)
        found[key] = found.get(key, 0) + 1
    return found


def view(pipeline: Pipeline, name: str) -> list[Row]:
    return pipeline.rows(f"select * from etl.{name}")


# -- what is counted --


def test_what_has_not_occurred_yet_is_there_as_zero(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", allow_full_refresh=True)
    pipeline.apply()
    zeroes = [
        (r["subject"], r["mode"], r["status"], r["observed_count"])
        for r in view(pipeline, "metrics_outcomes")
    ]
    steps = [
        (s, m, status, 0)
        for s, m in (("a", "incremental"), ("b", "incremental"), ("b", "full"))
        for status in ("succeeded", "failed")
    ]
    runs = [
        ("bronze_to_silver", "run", status, 0)
        for status in ("succeeded", "completed_with_warnings", "failed", "cancelled", "abandoned")
    ]
    assert sorted(zeroes) == sorted(steps + runs)
    assert {tuple(r["buckets"]) for r in view(pipeline, "metrics_outcomes")} == {(0,) * BUCKETS}


def test_each_outcome_of_a_step_is_counted_once(pipeline: Pipeline) -> None:
    pipeline.add("good")
    pipeline.add("bad", "raise exception 'no'")
    pipeline.add("after", dependencies=["bad"])
    pipeline.apply()
    for _ in range(3):
        pipeline.start()
    assert (
        counts(pipeline)
        == recount(pipeline)
        == {
            ("good", "incremental", "succeeded"): 3,
            ("bad", "incremental", "failed"): 3,
            ("after", "incremental", "skipped"): 3,
        }
    )
    assert counts(pipeline, "run") == {("bronze_to_silver", "run", "failed"): 3}
    assert outcome(pipeline, "good", "succeeded")["rows_sum"] == 3
    assert outcome(pipeline, "bad", "failed")["rows_sum"] == 0


def test_durations_are_those_of_the_attempts(pipeline: Pipeline) -> None:
    pipeline.add("a", "perform pg_sleep(0.06)")
    pipeline.apply()
    for _ in range(2):
        pipeline.start()
    found = outcome(pipeline, "a", "succeeded")
    (seconds,) = pipeline.column("select sum(duration_ms) / 1000 from etl.procedure_runs")
    assert found["seconds_sum"] == pytest.approx(float(seconds))
    assert sum(found["buckets"]) == 2
    assert found["buckets"][0] == found["buckets"][1] == 0, "it slept for longer than the second bound"
    assert found["last_run_id"] == 2
    assert 0.06 <= found["last_seconds"] < float(seconds)


def test_attempts_that_are_tried_again_are_retries_and_no_failures(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    pipeline.add("a", "if nextval('silver.tries') < 3 then raise sqlstate '40001'; end if")
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert (
        counts(pipeline)
        == recount(pipeline)
        == {
            ("a", "incremental", "succeeded"): 1,
            ("a", "incremental", "retrying"): 2,
        }
    )
    last = pipeline.step(1, "a")
    assert outcome(pipeline, "a", "succeeded")["seconds_sum"] == pytest.approx(
        float(last["duration_ms"]) / 1000
    )


def test_a_group_that_fails_counts_one_failure_and_the_others_as_rolled_back(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    group: Row = {"group": "g", "transaction_scope": "per_group"}
    pipeline.add("a", **group)
    pipeline.add(
        "b",
        "if nextval('silver.tries') = 1 then raise sqlstate '40P01'; end if; raise exception 'no'",
        dependencies=["a"],
        **group,
    )
    pipeline.apply()
    pipeline.start()
    assert (
        counts(pipeline)
        == recount(pipeline)
        == {
            ("a", "incremental", "rolled_back"): 1,
            ("b", "incremental", "failed"): 1,
            ("b", "incremental", "retrying"): 1,
        }
    )
    assert outcome(pipeline, "a", "succeeded")["rows_sum"] == 0


def test_slices_are_one_step_with_the_rows_and_the_time_of_all_of_them(db: Database) -> None:
    with Pipeline(db) as events:
        fill_events(events)
        add_sliced(events, "timestamp", "1 day")
        events.start()
        assert len(events.steps(1)) > 3
        assert counts(events) == recount(events) == {("copy", "incremental", "succeeded"): 1}
        found = outcome(events, "copy", "succeeded")
        (seconds,) = events.column("select sum(duration_ms) / 1000 from etl.procedure_runs")
        assert (found["rows_sum"], found["seconds_sum"]) == (96, pytest.approx(float(seconds)))


def test_slices_that_were_committed_count_their_rows_though_the_step_fails(db: Database) -> None:
    with Pipeline(db) as events:
        fill_events(events)
        guard = "if p_since >= '2026-01-02 12:00+00' then raise exception 'no'; end if;"
        add_sliced(events, "timestamp", "1 day", guard)
        events.start()
        committed = events.value("select count(*) from silver.copy")
        assert 0 < committed < 96
        assert counts(events) == {("copy", "incremental", "failed"): 1}
        assert outcome(events, "copy", "succeeded")["rows_sum"] == committed


def test_a_step_with_nothing_to_read_is_no_failure_and_is_fresh(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.t (at timestamptz)")
    watermark = {"strategy": "timestamp", "source": ["bronze.t.at"], "state_key": "a", "on_empty": "skip"}
    pipeline.add("a", arguments="p_since timestamptz, p_until timestamptz", watermark=watermark)
    pipeline.apply()
    run_id = pipeline.start().run_id
    assert pipeline.outcomes(run_id) == {"a": "no_data"}
    assert counts(pipeline) == {("a", "incremental", "skipped"): 1}
    (found,) = view(pipeline, "metrics_procedures")
    step = pipeline.step(run_id, "a")
    assert found["last_success_at"] == step["ended_at"]
    assert found["complete_at"] == datetime.fromisoformat(step["window_until"])


def test_what_a_resumed_run_takes_over_is_not_counted_again(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    pipeline.add("a")
    pipeline.add("b", "if nextval('silver.tries') = 1 then raise exception 'no'; end if", dependencies=["a"])
    pipeline.apply()
    first = pipeline.start().run_id
    pipeline.conn.execute("call etl.resume_run(%s)", [first])
    assert (
        counts(pipeline)
        == recount(pipeline)
        == {
            ("a", "incremental", "succeeded"): 1,
            ("b", "incremental", "failed"): 1,
            ("b", "incremental", "succeeded"): 1,
        }
    )


def test_chunks_of_a_backfill_have_a_mode_of_their_own_and_make_nothing_fresh(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.t (id bigint); insert into bronze.t select generate_series(1, 10)")
    pipeline.add(
        "a",
        "insert into silver.trace (step) select 'a' from bronze.t where id >= p_since and id < p_until",
        arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.t.id"], "state_key": "a"},
    )
    pipeline.apply()
    pipeline.conn.execute("call etl.backfill(procedures => '{a}', from_ => '1', until => '11', chunk => '5')")
    assert counts(pipeline) == recount(pipeline) == {("a", "backfill", "succeeded"): 2}
    assert counts(pipeline, "run") == {("bronze_to_silver", "backfill", "succeeded"): 1}
    assert outcome(pipeline, "a", "succeeded", "backfill")["rows_sum"] == 10
    (found,) = view(pipeline, "metrics_procedures")
    assert (found["last_success_at"], found["complete_at"]) == (None, None)


def test_a_long_backfill_is_counted_as_it_goes_on_and_each_chunk_once(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.t (id bigint); insert into bronze.t select generate_series(1, 250)")
    body = f"if p_since = 220 then {Gate.WAIT}; elsif p_since = 30 then raise exception 'no'; end if"
    pipeline.add(
        "a",
        body,
        arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.t.id"], "state_key": "a"},
    )
    pipeline.apply()
    call = "call etl.backfill(procedures => '{a}', from_ => '1', until => '251', chunk => '1')"
    with pipeline.gate() as gate:
        session = pipeline.db.connect()
        running = Background(lambda: session.execute(call))
        gate.wait_for_arrivals()
        assert counts(pipeline) == {("a", "backfill", "succeeded"): 129, ("a", "backfill", "failed"): 1}
        assert pipeline.column("select counted_until from etl.runs") == [130]
    running.result()
    assert counts(pipeline) == recount(pipeline) == {
        ("a", "backfill", "succeeded"): 249,
        ("a", "backfill", "failed"): 1,
    }  # fmt: skip
    assert counts(pipeline, "run") == {("bronze_to_silver", "backfill", "failed"): 1}


def test_refreshes_are_counted_by_their_outcome(pipeline: Pipeline) -> None:
    pipeline.conn.execute("create schema mart authorization etl_owner")
    pipeline.sql(
        "create materialized view mart.good as select 1;"
        "create function silver.trouble() returns int language plpgsql as $$ begin"
        " if exists (select from silver.trace) then raise exception 'no'; end if; return 1; end $$;"
        "create materialized view mart.bad as select silver.trouble()"
    )
    targets = [
        {"name": name, "after": "run", "on": "success", "concurrently": False}
        for name in ("mart.good", "mart.bad")
    ]
    pipeline.add("a", mv_refresh=targets)
    pipeline.apply()
    assert {
        (r["subject"], r["status"]) for r in view(pipeline, "metrics_outcomes") if r["family"] == "refresh"
    } == {(name, status) for name in ("mart.good", "mart.bad") for status in ("succeeded", "failed")}
    assert pipeline.start().status == "completed_with_warnings"
    assert counts(pipeline, "refresh") == {("mart.good", "", "succeeded"): 1, ("mart.bad", "", "failed"): 1}
    assert counts(pipeline, "run") == {("bronze_to_silver", "run", "completed_with_warnings"): 1}


# -- whichever way a run ends --


def test_an_abandoned_run_is_counted_when_it_is_recorded(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", Gate.WAIT, dependencies=["a"])
    pipeline.add("c", dependencies=["b"])
    pipeline.apply()
    with pipeline.gate() as gate:
        dead = pipeline.db.connect()
        running = pipeline.start_in_background(dead)
        gate.wait_for_arrivals()
        pipeline.conn.execute("select pg_terminate_backend(%s)", [dead.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            running.result()
    assert [row["dead_runs"] for row in view(pipeline, "metrics_pipelines")] == [1]
    assert counts(pipeline) == {("a", "incremental", "succeeded"): 1}
    pipeline.conn.execute("select etl.reap()")
    assert (
        counts(pipeline)
        == recount(pipeline)
        == {
            ("a", "incremental", "succeeded"): 1,
            ("b", "incremental", "abandoned"): 1,
            ("c", "incremental", "skipped"): 1,
        }
    )
    assert counts(pipeline, "run") == {("bronze_to_silver", "run", "abandoned"): 1}
    assert [row["dead_runs"] for row in view(pipeline, "metrics_pipelines")] == [0]


def test_a_queued_run_that_is_cancelled_or_cannot_start_is_counted(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.apply()
    cancelled = pipeline.value("select run_id from etl.submit_run()")
    pipeline.value("select run_id from etl.submit_run(procedures => '{a}')")
    (waiting,) = view(pipeline, "metrics_pipelines")
    assert (waiting["queued_runs"], waiting["active_runs"]) == (2, 0)
    assert waiting["queued_since"] == pipeline.run(cancelled)["submitted_at"]
    pipeline.conn.execute("select etl.cancel_run(%s)", [cancelled])
    pipeline.procedures.clear()
    pipeline.add("b")
    pipeline.apply()
    pipeline.conn.execute("call etl.work()")
    assert counts(pipeline, "run") == {
        ("bronze_to_silver", "run", "cancelled"): 1,
        ("bronze_to_silver", "run", "failed"): 1,
    }
    assert [row["queued_runs"] for row in view(pipeline, "metrics_pipelines")] == [0]


def test_a_rehearsal_counts_nothing(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.apply()
    pipeline.start(dry_run="execute")
    assert counts(pipeline) == {}
    assert view(pipeline, "metrics") == []


# -- true at any moment --


def test_what_has_ended_of_a_run_counts_while_it_goes_on(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", Gate.WAIT, dependencies=["a"])
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        assert view(pipeline, "metrics") == []
        assert counts(pipeline) == {("a", "incremental", "succeeded"): 1}
        (found,) = view(pipeline, "metrics_pipelines")
        assert (found["active_runs"], found["active_since"]) == (1, pipeline.run(1)["started_at"])
        fresh = {row["procedure"]: row["last_success_at"] for row in view(pipeline, "metrics_procedures")}
        assert fresh == {"a": pipeline.step(1, "a")["ended_at"], "b": None}
    running.result()
    assert counts(pipeline) == recount(pipeline)


def test_a_reader_never_sees_a_counter_fall_or_jump_over_the_end_of_a_run(pipeline: Pipeline) -> None:
    """What is counted live moves to what is stored in one commit, and a scrape is one snapshot."""
    for name in "abc":
        pipeline.add(name)
    pipeline.apply()
    reader = pipeline.db.connect()
    done: list[bool] = []

    def run() -> None:
        for _ in range(15):
            pipeline.start()
        done.append(True)

    running = Background(run)
    seen = [0]
    while not done:
        with reader.transaction():
            reader.execute("set transaction isolation level repeatable read")
            total = sum(counts(pipeline, conn=reader).values())
            kept = reader.execute(
                "select count(*) from etl.procedure_runs where ended_at is not null"
            ).fetchone()
        assert kept == (total,)
        assert total >= seen[-1]
        seen.append(total)
    running.result()
    assert sum(counts(pipeline).values()) == 45


def test_runs_that_end_at_the_same_moment_count_without_waiting_for_each_other(pipeline: Pipeline) -> None:
    """Each transaction has a slot of its own; nobody waits for another's commit."""
    pipeline.add("a")
    pipeline.apply()
    with pipeline.db.connect(autocommit=False) as other:
        other.execute("update etl.runs set ended_at = null where false")
        pipeline.start()
        other.execute("select etl._count_runs('{1}')")
        second = pipeline.start()
        assert second.status == "succeeded"
        other.rollback()
    assert counts(pipeline) == {("a", "incremental", "succeeded"): 2}
    assert pipeline.column("select distinct slot from etl.metrics order by 1") == [0, 1]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_counting_fails_no_scope_of_a_strict_isolation_level(pipeline: Pipeline, isolation: str) -> None:
    """Backfills and runs of one procedure side by side. Scopes do not write the counters, so under repeatable
    read none is tried again; the server may find conflicts of its own among serializable ones.
    """
    pipeline.sql(
        "create table bronze.t (id bigint primary key); insert into bronze.t select generate_series(1, 40)"
    )
    for name in "ab":
        pipeline.add(
            name,
            f"insert into silver.trace (step) values ('{name}')",
            isolation=isolation,
            arguments="p_since bigint, p_until bigint",
            watermark={"strategy": "id", "source": ["bronze.t.id"], "state_key": name},
        )
    pipeline.apply()

    def backfill(conn: Connection) -> None:
        conn.execute("call etl.backfill(procedures => '{a,b}', from_ => '1', until => '41', chunk => '4')")

    sessions = [pipeline.db.connect() for _ in range(2)]
    backfills = [Background(lambda conn=conn: backfill(conn)) for conn in sessions]  # type: ignore[misc]
    for _ in range(5):
        pipeline.start()
    for one in backfills:
        one.result()
    if isolation == "repeatable read":
        assert not [key for key in recount(pipeline) if key[2] == "retrying"]
    assert counts(pipeline) == recount(pipeline)
    assert counts(pipeline)["a", "backfill", "succeeded"] == 20


def test_a_purge_of_history_changes_no_counter(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", "raise exception 'no'")
    pipeline.apply()
    for _ in range(3):
        pipeline.start()
    before = view(pipeline, "metrics_outcomes"), view(pipeline, "metrics_procedures")
    pipeline.conn.execute("set session_replication_role = replica")
    for table in ("procedure_runs", "run_scopes", "runs"):
        pipeline.conn.execute(f"delete from etl.{table}".encode())
    pipeline.conn.execute("reset session_replication_role")
    assert (view(pipeline, "metrics_outcomes"), view(pipeline, "metrics_procedures")) == before


def test_what_is_no_longer_configured_is_not_shown_and_is_not_forgotten(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b")
    pipeline.apply()
    pipeline.start()
    kept = pipeline.procedures.pop()
    pipeline.apply()
    assert counts(pipeline) == {("a", "incremental", "succeeded"): 1}
    pipeline.procedures.append(kept)
    pipeline.apply()
    assert counts(pipeline)["b", "incremental", "succeeded"] == 1


def test_an_upgrade_counts_the_history_of_a_release_that_did_not(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", "raise exception 'no'")
    pipeline.apply()
    for _ in range(2):
        pipeline.start()
    expected = view(pipeline, "metrics_outcomes")
    pipeline.conn.execute("delete from etl.metrics")
    assert counts(pipeline) == {}
    for _ in range(2):
        pipeline.conn.execute("select etl._count_history()")
    without = [
        {k: v for k, v in row.items() if k != "created_at"} for row in view(pipeline, "metrics_outcomes")
    ]
    assert without == [{k: v for k, v in row.items() if k != "created_at"} for row in expected]


# -- buckets --


def test_the_bounds_are_those_that_the_stored_rows_were_counted_by(pipeline: Pipeline) -> None:
    """Frozen: other bounds need a migration that begins the counters anew."""
    assert pipeline.value("select etl._bucket_bounds()") == [
        0.01,
        0.05,
        0.25,
        1,
        5,
        15,
        60,
        300,
        900,
        3600,
        14400,
    ]


def test_a_bound_itself_belongs_to_its_bucket(pipeline: Pipeline) -> None:
    bounds = pipeline.value("select etl._bucket_bounds()")
    rng = random.Random(7)
    values = [0.0, *bounds, *(b + 0.001 for b in bounds), *(rng.expovariate(1 / 100) for _ in range(200))]
    for value in values:
        assert pipeline.value("select etl._bucket(%s)", value) == sum(bound < value for bound in bounds), (
            value
        )


# -- freshness --


def test_who_has_no_watermark_is_complete_up_to_when_the_last_success_began(pipeline: Pipeline) -> None:
    pipeline.add("a", freshness_ms=3_600_000)
    pipeline.apply()
    (before,) = view(pipeline, "procedure_health")
    assert (before["is_late"], before["freshness_ms"], before["complete_at"]) == (True, 3_600_000, None)
    pipeline.start()
    step = pipeline.step(1, "a")
    (found,) = view(pipeline, "metrics_procedures")
    assert (found["complete_at"], found["last_success_at"]) == (step["started_at"], step["ended_at"])
    assert (found["has_watermark"], found["freshness_seconds"]) == (False, 3600)
    assert [row["is_late"] for row in view(pipeline, "procedure_health")] == [False]


def test_an_objective_is_missed_when_it_has_passed_and_without_one_nothing_is_late(
    pipeline: Pipeline,
) -> None:
    pipeline.add("a", freshness_ms=1)
    pipeline.add("b")
    pipeline.apply()
    pipeline.start()
    pipeline.conn.execute("select pg_sleep(0.002)")
    assert {row["procedure"]: row["is_late"] for row in view(pipeline, "procedure_health")} == {
        "a": True,
        "b": False,
    }


@pytest.mark.parametrize("strategy", ["timestamp", "id", "xid"])
def test_a_watermark_tells_up_to_when_everything_has_been_read(pipeline: Pipeline, strategy: str) -> None:
    column, kind = {
        "timestamp": ("at", "timestamptz"),
        "id": ("id", "bigint"),
        "xid": ("etl_xid", "pg_snapshot"),
    }[strategy]
    pipeline.sql(
        "create table bronze.t (id bigint generated always as identity, at timestamptz default now(),"
        " etl_xid xid8 not null default pg_current_xact_id()); insert into bronze.t default values"
    )
    pipeline.add(
        "a",
        arguments=f"p_since {kind}, p_until {kind}",
        watermark={"strategy": strategy, "source": [f"bronze.t.{column}"], "state_key": "a"},
    )
    pipeline.apply()
    pipeline.start()
    step = pipeline.step(1, "a")
    (found,) = view(pipeline, "metrics_procedures")
    assert found["has_watermark"]
    if strategy == "timestamp":
        assert found["complete_at"] == datetime.fromisoformat(step["window_until"])
    else:
        (ticked_at,) = pipeline.column("select ticked_at from etl.watermark_ticks")
        assert found["complete_at"] == ticked_at
        assert ticked_at < step["started_at"], "the window was fixed before its data was read"


def test_a_run_that_fails_leaves_the_freshness_of_the_one_before(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    pipeline.add("a", "if nextval('silver.tries') > 1 then raise exception 'no'; end if")
    pipeline.apply()
    pipeline.start()
    (before,) = view(pipeline, "metrics_procedures")
    pipeline.start()
    assert view(pipeline, "metrics_procedures") == [before]


# -- what goes on --


def test_what_is_running_shows_since_when_and_how_long_it_usually_takes(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.pace (seconds float); insert into silver.pace values (0.01)")
    pipeline.add(
        "a",
        "perform pg_sleep(seconds) from silver.pace;"
        f" if not exists (select from silver.pace) then {Gate.WAIT}; end if",
    )
    pipeline.apply()
    for seconds in (0.01, 0.05, 0.09):
        pipeline.sql(f"update silver.pace set seconds = {seconds}")
        pipeline.start()
    pipeline.sql("delete from silver.pace")
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        (found,) = view(pipeline, "active_steps")
        assert (found["run_id"], found["subject"], found["pid"], found["mode"]) == (
            4,
            "a",
            pid,
            "incremental",
        )
        assert found["started_at"] == pipeline.step(4, "a")["started_at"]
        assert 50 <= found["usual_ms"] < 90, "the median of three"
        assert found["running_ms"] > 0
    running.result()
    assert view(pipeline, "active_steps") == []


def test_who_is_in_the_way_of_a_step_is_named_to_a_reader(pipeline: Pipeline) -> None:
    pipeline.add("a", "lock table silver.trace in exclusive mode")
    pipeline.apply()
    reader = pipeline.login("etl_reader")
    with pipeline.db.connect(autocommit=False, application_name="the culprit") as culprit:
        culprit.execute("lock table silver.trace in share mode")
        running = pipeline.start_in_background()
        wait_until(pipeline.conn, "select lock_wait_since is not null from etl.active_steps")
        row = reader.execute("select wait_event_type, blocked_by from etl.active_steps").fetchone()
        assert row is not None
        kind, blockers = row
        assert kind == "Lock"
        assert [(one["pid"], one["application"], one["state"]) for one in blockers] == [
            (culprit.info.backend_pid, "the culprit", "idle in transaction")
        ]
        (found,) = view(pipeline, "metrics_pipelines")
        assert found["waiting_sessions"] == 1
        assert found["lock_wait_seconds"] > 0
        culprit.rollback()
    running.result()
    assert [row["waiting_sessions"] for row in view(pipeline, "metrics_pipelines")] == [0]


def test_sessions_that_are_not_b2s_are_nobodys_business(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.apply()
    with pipeline.db.connect(autocommit=False) as one, pipeline.db.connect() as other:
        one.execute("lock table silver.trace")
        waiting = Background(lambda: other.execute("set lock_timeout = '5s'; select * from silver.trace"))
        wait_until(
            pipeline.conn,
            "select exists (select from pg_locks where pid = %s and not granted)",
            [other.info.backend_pid],
        )
        assert pipeline.rows("select * from etl._waits()") == []
        one.rollback()
        waiting.result()


def test_an_open_transaction_holds_the_horizon_back(pipeline: Pipeline) -> None:
    def horizon() -> Row:
        return pipeline.rows(
            "select horizon, held_back_by, clock_timestamp() as now from etl.metrics_server"
        )[0]

    free = horizon()
    assert free["now"] - free["horizon"] < timedelta(seconds=3)
    assert free["held_back_by"] is None
    with pipeline.db.connect(autocommit=False) as writer:
        row = writer.execute("select now()").fetchone()
        assert row is not None
        began_at = row[0]
        assert horizon()["horizon"] == began_at - timedelta(seconds=1)
        writer.rollback()
    assert horizon()["horizon"] > began_at - timedelta(seconds=1)


def test_a_prepared_transaction_holds_the_horizon_back_though_it_has_no_session(
    private_server: Server,
) -> None:
    db = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(db) as pipeline:
        with db.connect(autocommit=False) as writer:
            writer.execute("create table silver.t ()")
            writer.execute("prepare transaction 'forgotten'")
        (prepared_at,) = pipeline.column("select prepared from pg_prepared_xacts")
        (found,) = pipeline.rows("select horizon, held_back_by from etl.metrics_server")
        assert found["horizon"] == prepared_at - timedelta(seconds=1)
        assert "forgotten" in found["held_back_by"]
        pipeline.conn.execute("rollback prepared 'forgotten'")
    db.drop()


# -- independent of history --


def test_a_scrape_looks_at_no_ended_run(pipeline: Pipeline) -> None:
    """The plans of all views: no table of history is read but through what is active or waits."""
    for name in "abc":
        pipeline.add(name, freshness_ms=1000)
    pipeline.apply()
    pipeline.start()
    runs = (
        "insert into etl.runs (pipeline_id, config_version_id, request, fingerprint, requested_by,"
        " max_concurrency, step_count, started_at, ended_at, status) select 1, 1, '{}', '', 'x', 1, 0,"
        " now(), now(), 'succeeded' from generate_series(1, 3000)"
    )
    attempts = (
        "insert into etl.procedure_runs"
        " select (jsonb_populate_record(p, jsonb_build_object('run_id', r.run_id))).*"
        " from etl.procedure_runs p cross join etl.runs r where p.run_id = 1 and r.run_id > 1"
    )
    for statement in (runs, attempts):
        pipeline.conn.execute(statement.encode())
    pipeline.conn.execute("vacuum analyze")
    for name in (
        "metrics_outcomes",
        "metrics_procedures",
        "metrics_pipelines",
        "metrics_server",
        "active_steps",
    ):
        plan = "\n".join(pipeline.column(f"explain select * from etl.{name}"))
        assert "Seq Scan on runs" not in plan, plan
        assert "Seq Scan on procedure_runs" not in plan, plan
    blocks = (
        "select sum(heap_blks_read + heap_blks_hit) from pg_statio_user_tables"
        " where relname in ('runs', 'procedure_runs')"
    )

    def read() -> int:
        pipeline.conn.execute("select pg_stat_force_next_flush()")
        return int(pipeline.value(blocks))

    before = read()
    for name in (
        "metrics_outcomes",
        "metrics_procedures",
        "metrics_pipelines",
        "metrics_server",
        "active_steps",
    ):
        view(pipeline, name)
    assert read() - before < 20


def test_only_the_owner_may_write_the_counters(pipeline: Pipeline) -> None:
    for role in ("etl_reader", "etl_operator", "etl_admin"):
        conn = pipeline.login(role)
        for statement in ("update etl.metrics set observed_count = 0", "select etl._count_runs('{1}')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())
