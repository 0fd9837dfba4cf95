"""A run that is stopped, and a run whose session dies: what is kept, what is recorded, who can go on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

import psycopg
import pytest

from b2s.migrate import migrate
from tests.pipelines import Background, Gate, Pipeline, messages_of, refused
from tests.servers import Connection, Database, Server, wait_until
from tests.test_approvals import As, front_end


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


WRITE_AND_WAIT = f"insert into silver.trace (step) values ('b_slow'); {Gate.WAIT}"


def three_steps(pipeline: Pipeline) -> None:
    """a_quick, then b_slow that stands at the gate, then c_child that needs it and d_free."""
    pipeline.add("a_quick")
    pipeline.add("b_slow", WRITE_AND_WAIT)
    pipeline.add("c_child", dependencies=["b_slow"])
    pipeline.add("d_free")
    pipeline.apply()


def active_run(pipeline: Pipeline) -> int:
    run_id: int = pipeline.value("select run_id from etl.runs where status = 'running'")
    return run_id


def is_lock_free(pipeline: Pipeline) -> bool:
    return bool(
        pipeline.value(
            "select count(*) = 0 from pg_locks"
            " where locktype = 'advisory' and classid between 6435443 and 6435444"
            " and database = (select oid from pg_database where datname = current_database())"
        )
    )


# -- cancel_run --


def test_a_cancelled_run_finishes_its_step_and_skips_the_rest(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        answer = pipeline.value("select etl.cancel_run(%s, reason => 'lunch')", run_id)
        gate.open()
        run = started.result()
    assert "the step in flight is finished" in answer
    assert run == (run_id, "cancelled")
    assert pipeline.outcomes(run_id) == {
        "a_quick": "succeeded", "b_slow": "succeeded", "c_child": "cancelled", "d_free": "cancelled",
    }  # fmt: skip
    assert pipeline.trace() == ["a_quick", "b_slow"]
    row = pipeline.run(run_id)
    assert (row["cancel_requested_by"], row["cancel_reason"]) == (
        pipeline.value("select session_user"),
        "lunch",
    )
    assert row["cancel_requested_at"] <= row["ended_at"]
    assert is_lock_free(pipeline)


def test_with_force_the_statement_in_flight_is_cancelled_too(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        pipeline.value("select etl.cancel_run(%s, reason => 'wrong day', force => true)", run_id)
        run = started.result()
    assert run == (run_id, "cancelled")
    assert pipeline.outcomes(run_id) == {
        "a_quick": "succeeded", "b_slow": "cancelled", "c_child": "cancelled", "d_free": "cancelled",
    }  # fmt: skip
    assert pipeline.trace() == ["a_quick"]
    assert pipeline.run(run_id)["cancel_reason"] == "wrong day"
    assert is_lock_free(pipeline)


@pytest.mark.parametrize("role", ["etl_operator", "etl_admin"])
def test_an_operator_can_force_its_own_run_to_stop(pipeline: Pipeline, role: str) -> None:
    three_steps(pipeline)
    operator = pipeline.login(role)
    other_session = pipeline.db.connect(user=operator.info.user, password=operator.info.password or None)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(operator)
        gate.wait_for_arrivals()
        other_session.execute("select etl.cancel_run(%s, force => true)", [active_run(pipeline)])
        assert started.result().status == "cancelled"


def test_an_admin_can_stop_the_run_of_somebody_else(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    admin = pipeline.login("etl_admin")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(pipeline.login("etl_operator"))
        gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        admin.execute("select etl.cancel_run(%s)", [run_id])
        gate.open()
        assert started.result().status == "cancelled"
    assert pipeline.run(run_id)["cancel_requested_by"] == admin.info.user


def test_an_operator_cannot_stop_the_run_of_somebody_else(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    stranger = pipeline.login("etl_operator")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(pipeline.login("etl_operator"))
        gate.wait_for_arrivals()
        for force in (False, True):
            with refused("PT403", "run.not_yours"):
                stranger.execute("select etl.cancel_run(%s, force => %s)", [active_run(pipeline), force])
        gate.open()
        assert started.result().status == "succeeded"


def test_a_subject_with_the_name_of_a_role_is_not_that_role(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    operator = pipeline.login("etl_operator")
    web = front_end(pipeline, "etl_operator")
    claims = json.dumps({"sub": operator.info.user})
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(operator)
        gate.wait_for_arrivals()
        with refused("PT403", "run.not_yours"), As(web, "etl_operator", claims):
            web.execute("select etl.cancel_run(%s)", [active_run(pipeline)])
        gate.open()
        assert started.result().status == "succeeded"
    with As(web, "etl_operator", claims):
        row = web.execute("select run_id from etl.submit_run()").fetchone()
    with refused("PT403", "run.not_yours"):
        operator.execute("select etl.cancel_run(%s)", row)
    with As(web, "etl_operator", claims):
        web.execute("select etl.cancel_run(%s)", row)


def test_a_reader_cannot_stop_a_run(pipeline: Pipeline) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        pipeline.login("etl_reader").execute("select etl.cancel_run(1)")


def test_an_unknown_run_cannot_be_cancelled(pipeline: Pipeline) -> None:
    with refused("PT404", "run.unknown"):
        pipeline.value("select etl.cancel_run(4711)")


def test_a_run_that_has_ended_cannot_be_cancelled(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    run = pipeline.start()
    with refused("PT409", "run.ended") as refusal:
        pipeline.value("select etl.cancel_run(%s)", run.run_id)
    assert refusal.detail["status"] == "succeeded"
    assert pipeline.run(run.run_id)["cancel_requested_at"] is None


def test_the_first_request_to_cancel_is_the_one_that_is_kept(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        pipeline.value("select etl.cancel_run(%s, reason => 'first')", run_id)
        first = pipeline.run(run_id)["cancel_requested_at"]
        pipeline.value("select etl.cancel_run(%s, reason => 'second')", run_id)
        gate.open()
        started.result()
    assert (pipeline.run(run_id)["cancel_reason"], pipeline.run(run_id)["cancel_requested_at"]) == (
        "first",
        first,
    )


RETRIES = {"attempts": 3, "backoff_ms": 20_000, "max_backoff_ms": 20_000}


def start_and_wait_for_backoff(pipeline: Pipeline, conn: Connection) -> Background:
    pipeline.add("load", "raise sqlstate '40001'", retries=RETRIES)
    pipeline.add("other")
    pipeline.apply()
    started = pipeline.start_in_background(conn)
    wait_until(
        pipeline.conn,
        "select wait_event = 'PgSleep' from pg_stat_activity where pid = %s",
        [conn.info.backend_pid],
    )
    return started


def test_a_run_is_cancelled_while_it_waits_for_its_next_attempt(pipeline: Pipeline) -> None:
    started = start_and_wait_for_backoff(pipeline, pipeline.db.connect())
    run_id = active_run(pipeline)
    pipeline.value("select etl.cancel_run(%s)", run_id)
    run = started.result(timeout=8)
    assert run == (run_id, "cancelled")
    assert [s["skip_reason"] or s["status"] for s in pipeline.steps(run_id)] == [
        "retrying",
        "cancelled",
        "cancelled",
    ]


def test_a_run_is_forced_to_stop_while_it_waits_for_its_next_attempt(pipeline: Pipeline) -> None:
    started = start_and_wait_for_backoff(pipeline, pipeline.db.connect())
    run_id = active_run(pipeline)
    pipeline.value("select etl.cancel_run(%s, force => true)", run_id)
    run = started.result(timeout=8)
    assert run == (run_id, "cancelled")


def test_a_statement_cancelled_between_two_attempts_ends_the_run_as_cancelled(pipeline: Pipeline) -> None:
    conn = pipeline.db.connect()
    started = start_and_wait_for_backoff(pipeline, conn)
    run_id = active_run(pipeline)
    pipeline.value("select pg_cancel_backend(%s)", conn.info.backend_pid)
    run = started.result(timeout=8)
    assert run == (run_id, "cancelled")
    assert is_lock_free(pipeline)


# -- the statement is cancelled from outside --


def test_a_cancelled_statement_ends_the_run_as_cancelled(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    conn = pipeline.db.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        gate.wait_for_arrivals()
        conn.cancel()
        run = started.result()
    assert run.status == "cancelled"
    assert pipeline.outcomes(run.run_id) == {
        "a_quick": "succeeded", "b_slow": "cancelled", "c_child": "cancelled", "d_free": "cancelled",
    }  # fmt: skip
    assert pipeline.step(run.run_id, "b_slow")["sqlstate"] == "57014"
    assert pipeline.run(run.run_id)["cancel_reason"] == "canceling statement due to user request"
    assert pipeline.trace() == ["a_quick"]
    assert pipeline.start().status == "succeeded"


def test_a_cancelled_group_is_rolled_back_whole(pipeline: Pipeline) -> None:
    pipeline.add("a", group="g", transaction_scope="per_group")
    pipeline.add("b", Gate.WAIT, group="g", transaction_scope="per_group")
    pipeline.apply()
    conn = pipeline.db.connect()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(conn)
        gate.wait_for_arrivals()
        conn.cancel()
        run = started.result()
    assert pipeline.outcomes(run.run_id) == {"a": "cancelled", "b": "cancelled"}
    assert pipeline.trace() == []


REFRESH = {"after": "run", "on": "success", "concurrently": "auto"}


def test_a_run_whose_refresh_was_cancelled_is_cancelled(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
    pipeline.add("load", mv_refresh=[{"name": "silver.mv", **REFRESH}])
    pipeline.apply()
    reader, conn = pipeline.db.connect(), pipeline.db.connect()
    reader.execute("begin; select * from silver.mv")
    started = pipeline.start_in_background(conn)
    wait_until(
        pipeline.conn,
        "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s",
        [conn.info.backend_pid],
    )
    conn.cancel()
    run = started.result()
    assert pipeline.value("select status from etl.mv_refreshes") == "cancelled"
    assert run.status == "cancelled"
    assert pipeline.trace() == ["load"]


def test_a_run_cancelled_before_its_refreshes_is_cancelled(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
    pipeline.add("load", Gate.WAIT, mv_refresh=[{"name": "silver.mv", **REFRESH}])
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        pipeline.value("select etl.cancel_run(%s)", active_run(pipeline))
        gate.open()
        run = started.result()
    assert pipeline.column("select skip_reason from etl.mv_refreshes") == ["cancelled"]
    assert run.status == "cancelled"


# -- the session dies --


def expect_abandoned(pipeline: Pipeline, run_id: int) -> None:
    """The next start finds the dead run, says so, records it, and does its own work."""
    assert is_lock_free(pipeline)
    assert pipeline.value("select is_dead from etl.run_history where run_id = %s", run_id)
    with refused("PT409", "run.dead"):
        pipeline.value("select etl.cancel_run(%s)", run_id)
    pipeline.routine("b_slow")
    received = messages_of(pipeline.conn)
    successor = pipeline.start()
    assert successor.status == "succeeded"
    warnings = [message.text for message in received if message.severity == "WARNING"]
    assert [text for text in warnings if f"run {run_id} was abandoned" in text]
    dead = pipeline.run(run_id)
    assert (dead["status"], dead["error_code"]) == ("abandoned", "run.abandoned")
    assert pipeline.outcomes(run_id) == {
        "a_quick": "succeeded", "b_slow": "abandoned", "c_child": "abandoned", "d_free": "abandoned",
    }  # fmt: skip
    assert sorted(pipeline.trace()) == ["a_quick", "a_quick", "b_slow", "c_child", "d_free"]


def test_a_run_whose_session_was_terminated_is_abandoned_by_the_next_start(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        pipeline.value("select pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            started.result()
    assert pipeline.run(run_id)["status"] == "running"
    expect_abandoned(pipeline, run_id)


def test_a_run_is_abandoned_when_the_server_stops_under_it(private_server: Server) -> None:
    db = private_server.create_database(template=private_server.migrated_template())
    with private_server.connect() as conn:
        conn.execute(f"alter database {db.name} set synchronous_commit = on".encode())
    with Pipeline(db) as pipeline:
        three_steps(pipeline)
        with pipeline.gate() as gate:
            started = pipeline.start_in_background()
            gate.wait_for_arrivals()
            run_id = active_run(pipeline)
            private_server.restart("immediate")
            with pytest.raises(psycopg.OperationalError):
                started.result()
            gate.conn = db.connect()
    with Pipeline(db) as pipeline:
        expect_abandoned(pipeline, run_id)
    db.drop()


CLIENT = """
import psycopg, sys
psycopg.connect(sys.argv[1], autocommit=True).execute("call etl.start_run()")
"""


def test_a_run_is_abandoned_when_its_client_is_killed(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    with pipeline.gate() as gate:
        dsn = f"{pipeline.db.dsn} options='-c client_connection_check_interval=50'"
        client = subprocess.Popen([sys.executable, "-c", CLIENT, dsn], stderr=subprocess.DEVNULL)
        (pid,) = gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        client.kill()
        client.wait()
        wait_until(pipeline.conn, "select not exists (select from pg_stat_activity where pid = %s)", [pid])
    expect_abandoned(pipeline, run_id)


def test_who_asks_again_with_the_key_of_a_dead_run_learns_that_it_is_abandoned(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(idempotency_key="monday")
        (pid,) = gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        pipeline.value("select pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(psycopg.OperationalError):
            started.result()
    assert pipeline.start(idempotency_key="monday") == (run_id, "abandoned")
    assert pipeline.outcomes(run_id)["b_slow"] == "abandoned"
    pipeline.routine("b_slow")
    assert pipeline.start(idempotency_key="tuesday").status == "succeeded"


# -- the session lives on --

# The second commit of a run, the one that marks its first step running, takes its time.
_SLOW_COMMIT: Final = """
create function etl.dawdle() returns trigger language plpgsql as
  $$ begin if new.status = 'running' then perform pg_sleep(60); end if; return new; end $$;
create constraint trigger dawdle after update on etl.procedure_runs deferrable initially deferred
  for each row execute function etl.dawdle();
"""


@pytest.fixture
def interrupted(pipeline: Pipeline) -> Connection:
    """A session whose CALL was cancelled during a commit, where nothing can be recorded; it idles."""
    pipeline.add("load")
    pipeline.apply()
    pipeline.conn.execute(_SLOW_COMMIT)
    conn = pipeline.db.connect()
    started = pipeline.start_in_background(conn)
    wait_until(
        pipeline.conn,
        "select count(*) = 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'",
        [conn.info.backend_pid],
    )
    pipeline.value("select pg_cancel_backend(%s)", conn.info.backend_pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        started.result()
    pipeline.conn.execute("drop trigger dawdle on etl.procedure_runs")
    assert not is_lock_free(pipeline)
    assert pipeline.run(1)["status"] == "running"
    return conn


def test_an_idle_session_that_kept_the_lock_of_its_run_is_dead(
    pipeline: Pipeline, interrupted: Connection
) -> None:
    assert pipeline.value("select is_dead from etl.run_history")
    with refused("PT409", "run.dead"):
        pipeline.value("select etl.cancel_run(1)")
    assert pipeline.value("select etl.reap()") == 1
    assert pipeline.run(1)["status"] == "abandoned"
    assert not interrupted.closed


def test_a_lock_that_was_kept_does_not_stand_in_the_way_of_a_start(
    pipeline: Pipeline, interrupted: Connection
) -> None:
    assert pipeline.start() == (2, "succeeded")
    assert pipeline.run(1)["status"] == "abandoned"
    assert pipeline.start(interrupted) == (3, "succeeded")
    assert is_lock_free(pipeline)


def test_a_run_that_was_interrupted_is_resumed_by_another_session(
    pipeline: Pipeline, interrupted: Connection
) -> None:
    row = pipeline.conn.execute("call etl.resume_run(1)").fetchone()
    assert row == (2, "succeeded")
    assert pipeline.trace() == ["load"]
    assert not interrupted.closed


def test_what_an_interrupted_session_does_next_does_not_bring_its_run_to_life(
    pipeline: Pipeline, interrupted: Connection
) -> None:
    with pipeline.gate() as gate:
        busy = Background(lambda: interrupted.execute(f"do $$ begin {Gate.WAIT}; end $$".encode()))
        gate.wait_for_arrivals()
        assert pipeline.value("select is_dead from etl.run_history")
        assert pipeline.start() == (2, "succeeded")
    busy.result()


def test_a_kept_lock_does_not_stand_in_the_way_of_an_upgrade(
    pipeline: Pipeline, interrupted: Connection
) -> None:
    assert migrate(pipeline.db.dsn).after
    assert not interrupted.closed


def test_where_sessions_are_hidden_a_run_lives_as_long_as_its_lock(private_server: Server) -> None:
    db = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(db) as pipeline:
        three_steps(pipeline)
        pipeline.conn.execute("revoke pg_read_all_stats from etl_engine")
        with pipeline.gate() as gate:
            started = pipeline.start_in_background(pipeline.login("etl_operator"))
            gate.wait_for_arrivals()
            assert not pipeline.value("select is_dead from etl.run_history")
            with refused("PT409", "run.active"):
                pipeline.start(pipeline.login("etl_operator"))
            gate.open()
            assert started.result().status == "succeeded"
    db.drop()


def test_a_step_that_is_terminated_does_not_block_another_pipeline(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    other = Pipeline(pipeline.db, "other")
    other.add("theirs")
    other.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(pipeline="bronze_to_silver")
        (pid,) = gate.wait_for_arrivals()
        run_id = active_run(pipeline)
        pipeline.value("select pg_terminate_backend(%s, 5000)", pid)
        with pytest.raises(psycopg.OperationalError):
            started.result()
        assert other.start(pipeline="other").status == "succeeded"
    assert pipeline.run(run_id)["status"] == "running"
