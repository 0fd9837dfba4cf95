"""Runs that wait in a queue, several sessions on one run, and runs that are taken up again."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.pipelines import Background, Gate, Pipeline, Row, call, messages_of, refused
from tests.servers import Connection, Database, wait_until

GATED = Gate.WAIT + "; insert into silver.trace (step) values ('{0}')"


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


def add_gated(pipeline: Pipeline, *names: str, **settings: Any) -> None:
    """Steps that stand at the gate and then leave their name."""
    for name in names:
        pipeline.add(name, GATED.format(name), **settings)


def submit(pipeline: Pipeline, conn: Connection | None = None, **arguments: Any) -> int:
    """The id of a run that waits."""
    row = (conn or pipeline.conn).execute(*call("etl.submit_run", arguments, "select * from")).fetchone()
    assert row is not None
    run_id: int = row[0]
    return run_id


def work(pipeline: Pipeline, conn: Connection | None = None, /, **arguments: Any) -> int:
    """How many runs a worker executed."""
    row = (conn or pipeline.conn).execute(*call("etl.work", arguments)).fetchone()
    assert row is not None
    executed: int = row[0]
    return executed


def workers(pipeline: Pipeline, count: int) -> list[Background]:
    """So many sessions that work."""
    connections = [pipeline.db.connect() for _ in range(count)]
    return [Background(lambda conn=conn: work(pipeline, conn)) for conn in connections]  # type: ignore[misc]


def resume(pipeline: Pipeline, run_id: int, conn: Connection | None = None, **arguments: Any) -> Row:
    """The run that resumed another one."""
    given = {"run_id": run_id, **arguments}
    row = (conn or pipeline.conn).execute(*call("etl.resume_run", given)).fetchone()
    assert row is not None
    run = pipeline.run(row[0])
    assert (run["status"], run["parent_run_id"]) == (row[1], run_id)
    return run


def attempts(pipeline: Pipeline, run_id: int, name: str) -> list[tuple[str, str | None]]:
    """Status and code of every attempt of a step."""
    return [(s["status"], s["error_code"]) for s in pipeline.steps(run_id) if s["procedure_name"] == name]


def wait_for_helper(pipeline: Pipeline) -> int:
    """Wait until another session has joined the active run and sleeps, as nothing is ready for it."""
    pid: int = wait_until(
        pipeline.conn,
        "select a.pid from etl.run_workers w join pg_stat_activity a using (pid)"
        " where a.wait_event = 'PgSleep'",
    )
    return pid


def kill(pipeline: Pipeline, pid: int) -> None:
    pipeline.value("select pg_terminate_backend(%s, 5000)", pid)


def locks(pipeline: Pipeline) -> list[Any]:
    """The sessions that hold a lock of b2s."""
    return pipeline.column(
        "select pid from pg_locks where locktype = 'advisory' and classid between 6435443 and 6435449"
        " and database = (select oid from pg_database where datname = current_database())"
    )


# -- the queue --


def test_a_submitted_run_waits_for_a_worker(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    row = pipeline.rows("select * from etl.submit_run(procedures => '{load}')")[0]
    assert (row["status"], row["is_new"]) == ("queued", True)
    run = pipeline.run(row["run_id"])
    assert (run["status"], run["started_at"], run["worker_pid"]) == ("queued", None, None)
    assert pipeline.steps(row["run_id"]) == []
    assert work(pipeline) == 1
    run = pipeline.run(row["run_id"])
    assert run["status"] == "succeeded"
    assert run["submitted_at"] <= run["started_at"] <= run["ended_at"]
    assert pipeline.trace() == ["load"]
    assert locks(pipeline) == []


def test_a_worker_with_nothing_to_do_returns_at_once(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    assert work(pipeline) == 0
    with refused("PT404", "pipeline.unknown"):
        work(pipeline, pipeline="nope")
    with refused("PT404", "run.unknown"):
        work(pipeline, run_id=4711)


def test_queued_runs_are_executed_in_the_order_they_came(pipeline: Pipeline) -> None:
    for name in ("first", "second", "third"):
        pipeline.add(name)
    pipeline.apply()
    for name in ("second", "third", "first"):
        submit(pipeline, procedures=[name])
    assert work(pipeline) == 3
    assert pipeline.trace() == ["second", "third", "first"]


def test_a_worker_can_be_asked_for_one_run_only(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    first, second = submit(pipeline), submit(pipeline)
    assert work(pipeline, run_id=second) == 1
    assert (pipeline.run(first)["status"], pipeline.run(second)["status"]) == ("queued", "succeeded")


def test_a_worker_in_a_transaction_block_is_told_why_it_cannot_work(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    submit(pipeline)
    with pipeline.conn.transaction(), pytest.raises(psycopg.Error, match="cannot run inside one"):
        work(pipeline)
    with pipeline.conn.transaction(), pytest.raises(psycopg.Error, match="cannot run inside one"):
        resume(pipeline, 1)


def test_a_request_is_checked_when_it_is_submitted(pipeline: Pipeline) -> None:
    pipeline.add("load", allow_full_refresh=True)
    pipeline.apply()
    with refused("PT404", "procedure.unknown"):
        submit(pipeline, procedures=["nope"])
    with refused("PT403", "full_refresh.not_admin"):
        submit(pipeline, pipeline.login("etl_operator"), mode="full", confirm_full_refresh=True, reason="tax")
    assert pipeline.value("select count(*) from etl.runs") == 0


def test_a_queued_run_whose_plan_fails_ends_as_failed_and_the_next_one_runs(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.add("other")
    pipeline.apply()
    doomed, next_one = submit(pipeline, procedures=["load"]), submit(pipeline, procedures=["other"])
    pipeline.procedures = [p for p in pipeline.procedures if p["name"] != "load"]
    pipeline.apply()
    received = messages_of(pipeline.conn)
    assert work(pipeline) == 1
    run = pipeline.run(doomed)
    assert (run["status"], run["error_code"]) == ("failed", "procedure.unknown")
    assert "load" in run["error_message"]
    assert pipeline.run(next_one)["status"] == "succeeded"
    assert any(m.severity == "WARNING" and f"run {doomed}" in m.text for m in received)
    assert pipeline.trace() == ["other"]


def test_a_queued_full_refresh_runs_with_the_rights_of_who_asked_for_it(pipeline: Pipeline) -> None:
    pipeline.add("load", allow_full_refresh=True)
    pipeline.apply()
    admin, operator = pipeline.login("etl_admin"), pipeline.login("etl_operator")
    request = {"mode": "full", "confirm_full_refresh": True, "reason": "tax"}
    granted, revoked = submit(pipeline, admin, **request), submit(pipeline, admin, **request)
    assert work(pipeline, operator, run_id=granted) == 1
    assert pipeline.run(granted)["status"] == "succeeded"
    assert pipeline.run(granted)["requested_by"] == admin.info.user
    pipeline.conn.execute(f"revoke etl_admin from {admin.info.user}".encode())
    assert work(pipeline, operator) == 0
    assert pipeline.run(revoked)["error_code"] == "full_refresh.not_admin"


def test_a_queued_run_can_be_cancelled_and_is_not_run(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    run_id = submit(pipeline)
    assert "it was queued" in pipeline.value("select etl.cancel_run(%s, reason => 'lunch')", run_id)
    run = pipeline.run(run_id)
    assert (run["status"], run["cancel_reason"], run["started_at"]) == ("cancelled", "lunch", None)
    assert work(pipeline) == 0
    with refused("PT409", "run.ended"):
        pipeline.value("select etl.cancel_run(%s)", run_id)


def test_twenty_sessions_that_submit_with_one_key_get_one_run(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    statement = "select run_id, is_new from etl.submit_run(idempotency_key => 'monday')"
    connections = [pipeline.db.connect() for _ in range(20)]
    asked = [Background(lambda c=c: c.execute(statement).fetchone()) for c in connections]  # type: ignore[misc]
    answers = [one.result() for one in asked]
    assert len({run_id for run_id, _ in answers}) == 1
    assert sorted(is_new for _, is_new in answers) == [False] * 19 + [True]
    assert work(pipeline) == 1
    assert pipeline.rows(statement)[0] == {"run_id": answers[0][0], "is_new": False}


def test_what_is_submitted_while_a_run_is_active_is_run_after_it(pipeline: Pipeline) -> None:
    add_gated(pipeline, "load")
    pipeline.apply()
    with pipeline.gate() as gate:
        submit(pipeline)
        (worker,) = workers(pipeline, 1)
        gate.wait_for_arrivals()
        submit(pipeline)
        assert [r["status"] for r in pipeline.rows("select status from etl.runs order by run_id")] == [
            "running",
            "queued",
        ]
        gate.open()
        assert worker.result() == 2
    assert pipeline.trace() == ["load", "load"]


# -- several sessions on one run --


def test_two_workers_execute_independent_steps_side_by_side(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b")
    pipeline.apply()
    run_id = submit(pipeline)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        pids = gate.wait_for_arrivals(2)
        gate.open()
        assert [one.result() for one in both] == [1, 1]
    assert {s["worker_pid"] for s in pipeline.steps(run_id)} == set(pids)
    assert pipeline.run(run_id)["status"] == "succeeded"
    assert sorted(pipeline.trace()) == ["a", "b"]
    assert locks(pipeline) == []


def test_a_worker_helps_a_run_that_was_started(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b")
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        gate.open()
        assert started.result().status == "succeeded"
        assert helper.result() == 1


def test_sessions_that_share_a_run_begin_with_the_longest_path(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a_gate")
    for name, needs in (("b_short", []), ("c_root", []), ("d_new", []), ("e_long", ["c_root"])):
        pipeline.add(name, dependencies=needs)
    pipeline.apply()
    pipeline.start(procedures=["b_short", "c_root", "e_long"])
    pipeline.sql(
        "truncate silver.trace; set role etl_engine;"
        "update etl.metrics m"
        " set last_seconds = case p.name when 'e_long' then 5 when 'c_root' then 1 else 3 end"
        " from etl.procedures p where m.family = 'step' and p.procedure_id = m.subject_id"
    )
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        # What was never run counts as much as the others on average; what waits for a root counts for it.
        wait_until(gate.conn, "select count(*) = 4 from silver.trace")
        assert pipeline.trace() == ["c_root", "e_long", "b_short", "d_new"]
        gate.open()
        assert helper.result() == 1
        run_id = started.result().run_id
    assert pipeline.run(run_id)["scope_ranks"] == [3000, 3000, 6000, 3000, 5000]


@pytest.mark.parametrize("slots", [1, 3])
def test_no_more_sessions_than_max_concurrency_execute_a_run(pipeline: Pipeline, slots: int) -> None:
    names = [f"step_{n}" for n in range(6)]
    add_gated(pipeline, *names)
    pipeline.apply()
    run_id = submit(pipeline, max_concurrency=slots)
    with pipeline.gate() as gate:
        admitted = workers(pipeline, 1)
        gate.wait_for_arrivals()
        admitted += workers(pipeline, slots - 1)
        gate.wait_for_arrivals(slots)
        assert [one.result() for one in workers(pipeline, 3)] == [0, 0, 0]
        assert len(gate.wait_for_arrivals(slots)) == slots
        gate.open()
        assert [one.result() for one in admitted] == [1] * slots
    assert pipeline.run(run_id)["status"] == "succeeded"
    assert sorted(pipeline.trace()) == names


def test_a_slot_that_a_session_left_is_free_again(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b", "c")
    pipeline.apply()
    submit(pipeline, max_concurrency=2)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        gate.wait_for_arrivals(2)
        helper = pipeline.value("select pid from etl.run_workers")
        kill(pipeline, helper)
        (third,) = workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        gate.open()
        assert third.result() == 1
        ended = [one for one in both if not isinstance(failure(one), psycopg.Error)]
        assert len(ended) == 1
    assert sorted(pipeline.trace()) == ["a", "b", "c"]


def failure(background: Background) -> BaseException | None:
    """The error a call ended with."""
    try:
        background.result()
    except psycopg.Error as error:
        return error
    return None


def test_no_fact_starts_before_the_last_dimension_whoever_executes_it(pipeline: Pipeline) -> None:
    pipeline.add("quick", type="dimension")
    add_gated(pipeline, "slow", type="dimension")
    pipeline.add("fact")
    pipeline.apply()
    run_id = submit(pipeline)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        gate.wait_for_arrivals()
        wait_for_helper_or_taker(pipeline)
        assert pipeline.step(run_id, "fact")["status"] == "pending"
        gate.open()
        assert [one.result() for one in both] == [1, 1]
    assert pipeline.trace() == ["quick", "slow", "fact"]


def wait_for_helper_or_taker(pipeline: Pipeline) -> int:
    """Wait until a session that executes the run sleeps, as nothing is ready for it."""
    pid: int = wait_until(
        pipeline.conn,
        "select a.pid from pg_locks l join pg_stat_activity a using (pid)"
        " where l.locktype = 'advisory' and l.classid = 6435444 and l.granted and a.wait_event = 'PgSleep'",
    )
    return pid


def test_a_step_waits_for_what_it_needs_whoever_executes_it(pipeline: Pipeline) -> None:
    add_gated(pipeline, "first")
    pipeline.add("second", dependencies=["first"])
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        wait_for_helper(pipeline)
        assert pipeline.trace() == []
        gate.open()
        assert started.result().status == "succeeded"
        helper.result()
    assert pipeline.trace() == ["first", "second"]


def test_a_group_is_one_transaction_of_one_worker(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.xids (step text, xid xid8, pid int)")
    for name in ("a", "b", "c"):
        pipeline.add(
            name,
            f"insert into silver.xids values ('{name}', pg_current_xact_id(), pg_backend_pid()); {Gate.WAIT}",
            group="g",
            transaction_scope="per_group",
        )
    add_gated(pipeline, "other")
    pipeline.apply()
    run_id = submit(pipeline)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        gate.wait_for_arrivals(2)
        gate.open()
        assert [one.result() for one in both] == [1, 1]
    assert pipeline.value("select count(distinct (xid, pid)) from silver.xids") == 1
    assert set(pipeline.outcomes(run_id).values()) == {"succeeded"}


def test_a_view_is_refreshed_after_the_steps_of_all_workers(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
    target = {"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}
    add_gated(pipeline, "a", "b", mv_refresh=[target])
    pipeline.apply()
    submit(pipeline)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        gate.wait_for_arrivals(2)
        gate.open()
        assert [one.result() for one in both] == [1, 1]
    assert pipeline.value("select n from silver.mv") == 2


def test_a_waiting_worker_holds_nothing_back(pipeline: Pipeline) -> None:
    add_gated(pipeline, "load")
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        pid = wait_for_helper(pipeline)
        for _ in range(3):
            xid = pipeline.value("select pg_current_xact_id()::text")
            wait_until(
                pipeline.conn,
                "select backend_xid is null and coalesce(backend_xmin::text::bigint > %s, true)"
                " from pg_stat_activity where pid = %s",
                [int(xid), pid],
            )
        gate.open()
        started.result()
        assert helper.result() == 1


def test_windows_are_read_once_whoever_executes_the_steps(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create table bronze.src (id bigint, at timestamptz, etl_xid xid8 default pg_current_xact_id());"
        " create index on bronze.src (etl_xid); create table silver.got (strategy text, id bigint)"
    )
    windows = {
        "at": ("timestamp", "timestamptz", "at < p_until and (p_since is null or at >= p_since)"),
        "id": ("id", "bigint", "id < p_until and (p_since is null or id >= p_since)"),
        "etl_xid": ("xid", "pg_snapshot", "etl.arrived(etl_xid, p_since, p_until)"),
    }
    for column, (strategy, kind, condition) in windows.items():
        pipeline.add(
            f"by_{strategy}",
            f"insert into silver.got select '{strategy}', id from bronze.src where {condition}; {Gate.WAIT}",
            arguments=f"p_since {kind}, p_until {kind}",
            watermark={
                "strategy": strategy,
                "source": [f"bronze.src.{column}"],
                "state_key": strategy,
                "delay_ms": 0,
            },
        )
    pipeline.apply(max_concurrency=3)

    def run() -> None:
        submit(pipeline)
        with pipeline.gate() as gate:
            three = workers(pipeline, 3)
            gate.wait_for_arrivals(3)
            gate.open()
            assert [one.result() for one in three] == [1, 1, 1]

    for n in range(3):
        pipeline.sql(f"insert into bronze.src values ({n}, now())")
        run()
    now = pipeline.value("select clock_timestamp()")
    wait_until(pipeline.conn, "select clock_timestamp() > %s + interval '1.05 seconds'", [now])
    run()
    read = pipeline.rows(
        "select strategy, array_agg(id order by id) as ids from silver.got group by 1 order by 1"
    )
    assert read == [{"strategy": strategy, "ids": [0, 1, 2]} for strategy in ("id", "timestamp", "xid")]


# -- sessions that die --


def test_the_step_of_a_dead_helper_is_tried_again_by_a_living_worker(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b")
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        kill(pipeline, pipeline.value("select pid from etl.run_workers"))
        gate.open()
        run = started.result()
        assert isinstance(failure(helper), psycopg.OperationalError)
    assert run.status == "succeeded"
    lost = [n for n in "ab" if attempts(pipeline, run.run_id, n) != [("succeeded", None)]]
    assert attempts(pipeline, run.run_id, lost[0]) == [("retrying", "worker.lost"), ("succeeded", None)]
    assert len(lost) == 1
    assert sorted(pipeline.trace()) == ["a", "b"]


def test_a_run_outlives_the_session_that_started_it(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b")
    pipeline.add("c", dependencies=["a", "b"])
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (taker,) = gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        kill(pipeline, taker)
        assert pipeline.value("select etl.reap()") == 0
        with refused("PT409", "run.active"):
            pipeline.start()
        gate.open()
        assert helper.result() == 1
        assert isinstance(failure(started), psycopg.OperationalError)
    run = pipeline.rows("select * from etl.runs")[0]
    assert run["status"] == "succeeded"
    assert sorted(pipeline.trace()[:2]) == ["a", "b"]
    assert pipeline.trace()[2:] == ["c"]
    assert locks(pipeline) == []


def test_what_a_session_ended_but_did_not_pass_on_before_it_died_is_not_lost(pipeline: Pipeline) -> None:
    """It dies between the commit of a step and the transaction that frees what waits for it."""
    pipeline.add("first")
    pipeline.add("second", dependencies=["first"])
    pipeline.apply()
    run_id = submit(pipeline)
    pipeline.conn.execute("update etl.runs set pause_ms = 60000")
    conn = pipeline.db.connect()
    taker = Background(lambda: work(pipeline, conn))
    wait_until(pipeline.conn, "select exists (select from silver.trace)")
    helpers = workers(pipeline, 1)
    wait_for_helper(pipeline)
    kill(pipeline, conn.info.backend_pid)
    wait_until(pipeline.conn, "select count(*) = 2 from silver.trace")
    pipeline.conn.execute("select etl.cancel_run(%s, force => true)", [run_id])  # it pauses after the step
    helpers[0].result()
    assert isinstance(failure(taker), psycopg.OperationalError)
    assert pipeline.outcomes(run_id) == {"first": "succeeded", "second": "succeeded"}
    assert pipeline.trace() == ["first", "second"]


def test_a_session_that_was_interrupted_between_two_steps_may_work_again(pipeline: Pipeline) -> None:
    """What it left running bears its number: it must not wait for itself."""
    add_gated(pipeline, "a")
    pipeline.add("b")
    pipeline.apply()
    run_id = submit(pipeline)
    with pipeline.gate() as gate:
        (other,) = workers(pipeline, 1)
        gate.wait_for_arrivals()
        conn = pipeline.db.connect()
        with conn.transaction():  # as a call does whose client is then cancelled
            conn.execute("select etl._enlist(null, null)")
            conn.execute("select etl._claim(%s, null, false)", [run_id])
        assert pipeline.step(run_id, "b")["status"] == "running"
        again = Background(lambda: work(pipeline, conn))
        wait_until(pipeline.conn, "select exists (select from silver.trace where step = 'b')")
        gate.open()
        assert (again.result(), other.result()) == (1, 1)
    assert attempts(pipeline, run_id, "b") == [("retrying", "worker.lost"), ("succeeded", None)]
    assert sorted(pipeline.trace()) == ["a", "b"]


def test_a_step_that_is_lost_again_and_again_fails(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", retries={"attempts": 1, "backoff_ms": 1, "max_backoff_ms": 1})
    add_gated(pipeline, "b", retries={"attempts": 1, "backoff_ms": 1, "max_backoff_ms": 1})
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        kill(pipeline, pipeline.value("select pid from etl.run_workers"))
        gate.open()
        run = started.result()
    assert run.status == "failed"
    assert pipeline.run(run.run_id)["error_code"] == "worker.lost"


def test_reap_records_runs_whose_sessions_are_all_gone(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b")
    pipeline.add("c", dependencies=["a"])
    pipeline.apply()
    run_id = submit(pipeline)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        pids = gate.wait_for_arrivals(2)
        assert pipeline.value("select etl.reap()") == 0
        for pid in pids:
            kill(pipeline, pid)
        for one in both:
            assert isinstance(failure(one), psycopg.OperationalError)
    assert pipeline.value("select etl.reap()") == 1
    assert pipeline.run(run_id)["status"] == "abandoned"
    assert pipeline.outcomes(run_id) == dict.fromkeys("abc", "abandoned")
    assert pipeline.value("select etl.reap()") == 0


def test_a_worker_that_finds_a_dead_run_records_it_and_takes_the_next_one(pipeline: Pipeline) -> None:
    add_gated(pipeline, "load")
    pipeline.apply()
    dead = submit(pipeline)
    with pipeline.gate() as gate:
        (first,) = workers(pipeline, 1)
        (pid,) = gate.wait_for_arrivals()
        waiting = submit(pipeline)
        kill(pipeline, pid)
        assert isinstance(failure(first), psycopg.OperationalError)
    assert work(pipeline) == 1
    assert [pipeline.run(run_id)["status"] for run_id in (dead, waiting)] == ["abandoned", "succeeded"]


# -- workers that fail and stop --


def test_steps_that_fail_side_by_side_skip_what_they_share_once(pipeline: Pipeline) -> None:
    add_gated(pipeline, "a", "b")
    for name in ("a", "b"):
        pipeline.routine(name, f"{Gate.WAIT}; perform 1 / 0")
    pipeline.add("child", dependencies=["a", "b"])
    pipeline.add("grandchild", dependencies=["child"])
    pipeline.add("free")
    pipeline.add("mixed", dependencies=["grandchild", "free"])
    pipeline.apply()
    for _ in range(5):
        run_id = submit(pipeline)
        with pipeline.gate() as gate:
            both = workers(pipeline, 2)
            gate.wait_for_arrivals(2)
            gate.open()
            assert [one.result() for one in both] == [1, 1]
        assert pipeline.outcomes(run_id) == {
            "a": "failed", "b": "failed", "child": "upstream_failed", "grandchild": "upstream_failed",
            "free": "succeeded", "mixed": "upstream_failed",
        }  # fmt: skip


@pytest.mark.parametrize("force", [False, True])
def test_a_run_of_several_sessions_is_cancelled_as_a_whole(pipeline: Pipeline, force: bool) -> None:
    add_gated(pipeline, "a", "b")
    pipeline.add("c", dependencies=["a"])
    pipeline.add("d", dependencies=["b", "c"])
    pipeline.apply()
    run_id = submit(pipeline)
    with pipeline.gate() as gate:
        both = workers(pipeline, 2)
        gate.wait_for_arrivals(2)
        pipeline.value("select etl.cancel_run(%s, force => %s)", run_id, force)
        if not force:
            gate.open()
        assert [one.result() for one in both] == [1, 1]
    ended = "cancelled" if force else "succeeded"
    assert pipeline.outcomes(run_id) == {"a": ended, "b": ended, "c": "cancelled", "d": "cancelled"}
    assert pipeline.run(run_id)["status"] == "cancelled"
    assert locks(pipeline) == []


def test_a_waiting_sibling_does_not_cut_a_backoff_short(pipeline: Pipeline) -> None:
    slow = {"attempts": 3, "backoff_ms": 60_000, "max_backoff_ms": 60_000}
    pipeline.add("load", "raise sqlstate '40001'", retries=slow)
    pipeline.apply()
    conn = pipeline.db.connect()
    started = pipeline.start_in_background(conn)
    wait_until(pipeline.conn, "select exists (select from etl.procedure_runs where status = 'retrying')")
    (helper,) = workers(pipeline, 1)
    pid = wait_for_helper(pipeline)
    polls = "select xact_start from pg_stat_activity where pid = %s"
    for _ in range(3):
        began = pipeline.value(polls, pid)
        wait_until(pipeline.conn, polls.replace("xact_start", "xact_start > %s"), [began, pid])
    run_id = pipeline.value("select run_id from etl.runs")
    assert [s["status"] for s in pipeline.steps(run_id)] == ["retrying", "pending"]
    pipeline.value("select etl.cancel_run(%s)", run_id)
    assert started.result().status == "cancelled"
    helper.result()


# -- timeouts --


def test_the_watchdog_cancels_a_step_whose_timeout_has_passed_and_the_run_goes_on(pipeline: Pipeline) -> None:
    add_gated(pipeline, "slow", timeout_ms=1)
    pipeline.add("child", dependencies=["slow"])
    pipeline.add("other")
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        assert wait_until(pipeline.conn, "select etl.watchdog()") == 1
        run = started.result()
    assert run.status == "failed"
    step = pipeline.step(run.run_id, "slow")
    assert (step["status"], step["error_class"], step["error_code"]) == ("failed", "timeout", "step.timeout")
    assert step["timed_out_at"] <= step["ended_at"]
    assert pipeline.outcomes(run.run_id)["child"] == "upstream_failed"
    assert pipeline.trace() == ["other"]
    assert pipeline.run(run.run_id)["cancel_requested_at"] is None


def test_a_timeout_is_known_as_one_however_long_the_watchdog_takes_to_commit(pipeline: Pipeline) -> None:
    add_gated(pipeline, "slow", timeout_ms=1)
    pipeline.apply()
    watchdog = pipeline.db.connect(autocommit=False)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        wait_until(
            pipeline.conn, "select clock_timestamp() > started_at + interval '1 ms' from etl.procedure_runs"
        )
        assert watchdog.execute("select etl.watchdog()").fetchone() == (1,)
        wait_until(pipeline.conn, "select watchdog = any (pg_blocking_pids(%s)) from (select %s) q(watchdog)",
                   [pid, watchdog.info.backend_pid])  # fmt: skip
        watchdog.commit()
        run = started.result()
    assert run.status == "failed"
    assert pipeline.step(run.run_id, "slow")["error_code"] == "step.timeout"


def test_a_timeout_whose_signal_is_refused_is_tried_again(pipeline: Pipeline) -> None:
    add_gated(pipeline, "slow", timeout_ms=1)
    pipeline.apply()
    operator = pipeline.login("etl_operator")
    received = messages_of(operator)
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()  # a superuser's, whom an operator cannot cancel
        gate.wait_for_arrivals()
        wait_until(
            pipeline.conn, "select clock_timestamp() > started_at + interval '1 ms' from etl.procedure_runs"
        )
        for _ in range(2):
            assert operator.execute("select etl.watchdog()").fetchone() == (0,)
        assert pipeline.column("select timed_out_at from etl.procedure_runs") == [None]
        assert pipeline.value("select etl.watchdog()") == 1
        run = started.result()
    assert len([message for message in received if "may cancel it" in message.text]) == 2
    assert pipeline.step(run.run_id, "slow")["error_code"] == "step.timeout"


def test_the_watchdog_leaves_alone_what_is_in_time_or_has_no_timeout(pipeline: Pipeline) -> None:
    add_gated(pipeline, "patient", timeout_ms=3_600_000)
    add_gated(pipeline, "endless")
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        assert pipeline.value("select etl.watchdog()") == 0
        gate.open()
        assert started.result().status == "succeeded"


# -- resume --


def three_steps(pipeline: Pipeline, body: str = "perform 1 / 0") -> None:
    """good, then bad, then child that needs bad."""
    pipeline.add("good")
    pipeline.add("bad", body, dependencies=["good"])
    pipeline.add("child", dependencies=["bad"])
    pipeline.apply()


RESUMED = {"good": "reused", "bad": "succeeded", "child": "succeeded"}


def test_resuming_a_failed_run_executes_only_what_is_left(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    failed = pipeline.start()
    assert pipeline.outcomes(failed.run_id) == {
        "good": "succeeded",
        "bad": "failed",
        "child": "upstream_failed",
    }
    pipeline.routine("bad")
    run = resume(pipeline, failed.run_id)
    assert run["status"] == "succeeded"
    assert pipeline.outcomes(run["run_id"]) == RESUMED
    assert pipeline.trace() == ["good", "bad", "child"]
    assert pipeline.run(failed.run_id)["status"] == "failed"


def test_a_run_that_resumed_another_one_can_be_resumed(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    first = pipeline.start()
    second = resume(pipeline, first.run_id)
    assert second["status"] == "failed"
    pipeline.routine("bad")
    third = resume(pipeline, second["run_id"])
    assert third["status"] == "succeeded"
    assert pipeline.outcomes(third["run_id"]) == RESUMED
    assert pipeline.trace() == ["good", "bad", "child"]


def test_resuming_a_cancelled_run(pipeline: Pipeline) -> None:
    three_steps(pipeline, GATED.format("bad"))
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        pipeline.value("select etl.cancel_run(run_id, force => true) from etl.runs")
        cancelled = started.result()
    run = resume(pipeline, cancelled.run_id)
    assert pipeline.outcomes(run["run_id"]) == RESUMED
    assert pipeline.trace() == ["good", "bad", "child"]


def test_resuming_a_run_whose_session_died(pipeline: Pipeline) -> None:
    three_steps(pipeline, GATED.format("bad"))
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        run_id = pipeline.value("select run_id from etl.runs")
        with refused("PT409", "run.active"):
            resume(pipeline, run_id)
        kill(pipeline, pid)
        assert failure(started) is not None
    run = resume(pipeline, run_id)
    assert pipeline.run(run_id)["status"] == "abandoned"
    assert pipeline.outcomes(run["run_id"]) == RESUMED
    assert pipeline.trace() == ["good", "bad", "child"]


def test_a_run_that_is_retried_and_then_fails_is_resumed_without_further_questions(
    pipeline: Pipeline,
) -> None:
    """A new attempt has the definition of the one before."""
    pipeline.sql("create sequence silver.tries")
    pipeline.add("good", "if nextval('silver.tries') < 3 then raise sqlstate '40001'; end if")
    pipeline.add("bad", "perform 1 / 0", dependencies=["good"])
    pipeline.apply()
    failed = pipeline.start()
    assert [s["status"] for s in pipeline.steps(failed.run_id)] == [
        "retrying",
        "retrying",
        "succeeded",
        "failed",
    ]
    run = resume(pipeline, failed.run_id)
    assert pipeline.outcomes(run["run_id"])["good"] == "reused"


def test_resuming_keeps_the_parameters(pipeline: Pipeline) -> None:
    declared = {"name": "country", "type": "string", "default": "DE"}
    body = "perform 1 / (select count(*) from silver.trace); insert into silver.trace (step) values (country)"
    pipeline.add("load", body, arguments="country text", params=[declared])
    pipeline.apply()
    failed = pipeline.start(params={"load": {"country": "AT"}})
    assert failed.status == "failed"
    pipeline.sql("insert into silver.trace (step) values ('now')")
    pipeline.change("load", params=[{**declared, "default": "CH"}])
    assert resume(pipeline, failed.run_id)["status"] == "succeeded"
    assert pipeline.trace() == ["now", "AT"]


def windowed(pipeline: Pipeline) -> None:
    """A step by id that fails as long as there is no `silver.ok`."""
    pipeline.sql("create table bronze.src (id bigint); create table silver.got (id bigint)")
    pipeline.add(
        "load",
        "insert into silver.got select id from bronze.src"
        " where id < p_until and (p_since is null or id >= p_since);"
        " if to_regclass('silver.ok') is null then raise sqlstate '22012'; end if",
        arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.src.id"], "state_key": "load", "delay_ms": 0},
    )
    pipeline.apply()
    pipeline.sql("insert into bronze.src values (1), (2)")


def test_resuming_reads_the_window_that_the_failed_attempt_had(pipeline: Pipeline) -> None:
    windowed(pipeline)
    failed = pipeline.start()
    pipeline.sql("insert into bronze.src values (3); create table silver.ok ()")
    run = resume(pipeline, failed.run_id)
    before, after = pipeline.step(failed.run_id, "load"), pipeline.step(run["run_id"], "load")
    assert (after["window_since"], after["window_until"]) == (before["window_since"], before["window_until"])
    assert pipeline.column("select id from silver.got order by 1") == [1, 2]
    assert pipeline.watermark("load") == "3"
    pipeline.start()
    assert pipeline.column("select id from silver.got order by 1") == [1, 2, 3]


def test_resuming_takes_a_new_window_when_another_run_has_moved_the_watermark(pipeline: Pipeline) -> None:
    windowed(pipeline)
    failed = pipeline.start()
    pipeline.sql("insert into bronze.src values (3); create table silver.ok ()")
    assert pipeline.start().status == "succeeded"
    pipeline.sql("insert into bronze.src values (4)")
    run = resume(pipeline, failed.run_id)
    step = pipeline.step(run["run_id"], "load")
    assert (step["window_since"], step["window_until"]) == ("4", "5")
    assert pipeline.column("select id from silver.got order by 1") == [1, 2, 3, 4]


def test_workers_help_a_run_that_is_resumed(pipeline: Pipeline) -> None:
    pipeline.add("good")
    for name in ("a", "b"):
        pipeline.add(name, "perform 1 / 0", dependencies=["good"])
    pipeline.apply()
    failed = pipeline.start()
    for name in ("a", "b"):
        pipeline.routine(name, GATED.format(name))
    conn = pipeline.db.connect()
    with pipeline.gate() as gate:
        resumed = Background(lambda: resume(pipeline, failed.run_id, conn))
        gate.wait_for_arrivals()
        (helper,) = workers(pipeline, 1)
        gate.wait_for_arrivals(2)
        gate.open()
        helper.result()
        run = resumed.result()
    assert pipeline.outcomes(run["run_id"]) == {"good": "reused", "a": "succeeded", "b": "succeeded"}


def test_what_changed_since_it_succeeded_is_asked_about(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    failed = pipeline.start()
    pipeline.routine("good", "insert into silver.trace (step) values ('better')")
    pipeline.routine("bad")
    with refused("PT409", "run.definition_changed") as refusal:
        resume(pipeline, failed.run_id)
    assert refusal.detail["steps"] == ["good"]
    with refused("PT422", "request.invalid"):
        resume(pipeline, failed.run_id, changed_steps="perhaps")
    reused = resume(pipeline, failed.run_id, changed_steps="reuse")
    assert pipeline.outcomes(reused["run_id"]) == RESUMED
    assert pipeline.trace() == ["good", "bad", "child"]


def test_what_changed_since_it_succeeded_can_be_run_again(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    failed = pipeline.start()
    pipeline.routine("good", "insert into silver.trace (step) values ('better')")
    pipeline.routine("bad")
    again = resume(pipeline, failed.run_id, changed_steps="rerun")
    assert pipeline.outcomes(again["run_id"]) == dict.fromkeys(("good", "bad", "child"), "succeeded")
    assert pipeline.trace() == ["good", "better", "bad", "child"]


def test_a_step_that_failed_and_was_corrected_is_announced(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    failed = pipeline.start()
    pipeline.routine("bad")
    received = messages_of(pipeline.conn)
    resume(pipeline, failed.run_id)
    (notice,) = [m.text for m in received if m.severity == "NOTICE" and "changed since" in m.text]
    assert notice.endswith(": bad")


def test_runs_that_cannot_be_resumed(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    with refused("PT404", "run.unknown"):
        resume(pipeline, 4711)
    run_id = submit(pipeline)
    with refused("PT409", "run.queued"):
        resume(pipeline, run_id)
    work(pipeline)
    with refused("PT409", "run.nothing_left"):
        resume(pipeline, run_id)
    cancelled = submit(pipeline)
    pipeline.value("select etl.cancel_run(%s)", cancelled)
    with refused("PT409", "run.nothing_left"):
        resume(pipeline, cancelled)
    assert pipeline.trace() == ["load"]


def test_a_step_that_is_no_longer_configured_cannot_be_resumed(pipeline: Pipeline) -> None:
    three_steps(pipeline)
    failed = pipeline.start()
    pipeline.procedures = [p for p in pipeline.procedures if p["name"] != "child"]
    pipeline.apply()
    with refused("PT404", "procedure.unknown") as refusal:
        resume(pipeline, failed.run_id)
    assert refusal.detail["steps"] == ["child"]


def test_resuming_a_full_refresh_keeps_its_guardrails(pipeline: Pipeline) -> None:
    pipeline.add("load", "perform 1 / 0", allow_full_refresh=True)
    pipeline.apply()
    admin = pipeline.login("etl_admin")
    failed = pipeline.start(admin, mode="full", confirm_full_refresh=True, reason="tax")
    assert failed.status == "failed"
    pipeline.routine("load")
    with refused("PT403", "full_refresh.not_admin"):
        resume(pipeline, failed.run_id, pipeline.login("etl_operator"))
    pipeline.value("select etl.freeze_full_refresh(true, reason => 'audit')")
    with refused("PT403", "full_refresh.frozen"):
        resume(pipeline, failed.run_id, admin)
    pipeline.value("select etl.freeze_full_refresh(false, reason => 'done')")
    run = resume(pipeline, failed.run_id, admin)
    assert (run["mode"], run["reason"], run["status"]) == ("full", "tax", "succeeded")
    assert pipeline.step(run["run_id"], "load")["mode"] == "full"


def test_a_resumed_run_with_nothing_to_refresh_has_no_warning(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
    target = {"name": "silver.mv", "after": "procedure", "on": "success", "concurrently": "auto"}
    pipeline.add("good", mv_refresh=[target])
    pipeline.add("bad", "perform 1 / 0")
    pipeline.apply()
    failed = pipeline.start()
    pipeline.routine("bad")
    run = resume(pipeline, failed.run_id)
    assert pipeline.column("select skip_reason from etl.mv_refreshes where run_id = %s", run["run_id"]) == [
        "reused"
    ]
    assert run["status"] == "succeeded"


def test_a_view_that_was_not_refreshed_is_refreshed_when_the_run_is_resumed(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
    target = {"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}
    pipeline.add("good", mv_refresh=[target])
    pipeline.add("bad", "perform 1 / 0", mv_refresh=[target])
    pipeline.apply()
    failed = pipeline.start()
    pipeline.routine("bad")
    run = resume(pipeline, failed.run_id)
    assert run["status"] == "succeeded"
    assert pipeline.value("select n from silver.mv") == 2


# -- roles --


@pytest.mark.parametrize(
    "statement",
    [
        "select * from etl.submit_run()", "call etl.work()", "call etl.resume_run(1)", "select etl.reap()",
        "select etl.watchdog()",
    ],
)  # fmt: skip
def test_a_reader_cannot_run_anything(pipeline: Pipeline, statement: str) -> None:
    pipeline.add("load")
    pipeline.apply()
    with refused("42501"):
        pipeline.login("etl_reader").execute(statement.encode())


def test_operators_work_for_each_other_and_whoever_asked_is_on_record(pipeline: Pipeline) -> None:
    pipeline.add("load", "insert into silver.trace (step) values (current_user || ' for ' || session_user)")
    pipeline.apply()
    asking, working = pipeline.login("etl_operator"), pipeline.login("etl_operator")
    run_id = submit(pipeline, asking)
    assert work(pipeline, working) == 1
    assert pipeline.trace() == [f"etl_owner for {working.info.user}"]
    assert pipeline.run(run_id)["requested_by"] == asking.info.user
    assert working.execute("show application_name").fetchone() == ("",)
