"""One active run per pipeline, idempotency keys, and who may do what at the same time."""

import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psycopg
import pytest

from tests.pipelines import Background, Gate, Pipeline, Run, refused
from tests.servers import Connection, Database, wait_until

SESSIONS = 50


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


@pytest.fixture
def waiting(pipeline: Pipeline) -> Pipeline:
    """A pipeline whose only step stands at the gate."""
    pipeline.add("load", f"{Gate.WAIT}; insert into silver.trace (step) values ('load')")
    pipeline.apply()
    return pipeline


def start_all(pipeline: Pipeline, connections: list[Connection], **arguments: Any) -> list[Background]:
    """Start in all sessions at the same moment."""
    barrier = threading.Barrier(len(connections))

    def start(conn: Connection) -> Run:
        barrier.wait()
        return pipeline.start(conn, **arguments)

    return [Background(lambda conn=conn: start(conn)) for conn in connections]  # type: ignore[misc]


# -- one active run --


def test_a_second_start_is_refused_and_told_who_is_active(waiting: Pipeline) -> None:
    first = waiting.db.connect(application_name="nightly job")
    with waiting.gate() as gate:
        started = waiting.start_in_background(first)
        (pid,) = gate.wait_for_arrivals()
        with refused("PT409", "run.active") as refusal:
            waiting.start()
        gate.open()
        run = started.result()
    assert (refusal.detail["run_id"], refusal.detail["pid"]) == (run.run_id, pid)
    assert refusal.detail["user"] == first.info.user
    assert refusal.message == f"run {run.run_id} of this pipeline is active"
    assert f"etl.cancel_run({run.run_id}" in refusal.hint
    assert waiting.start().status == "succeeded"


def test_a_rehearsal_is_refused_while_a_run_is_active(waiting: Pipeline) -> None:
    with waiting.gate() as gate:
        started = waiting.start_in_background()
        gate.wait_for_arrivals()
        with refused("PT409", "run.active"):
            waiting.start(dry_run="execute")
        assert waiting.start(dry_run=True).status == "planned"
        gate.open()
        assert started.result().status == "succeeded"


def test_two_pipelines_run_side_by_side(waiting: Pipeline) -> None:
    other = Pipeline(waiting.db, "other")
    other.add("theirs", Gate.WAIT)
    other.apply()
    with waiting.gate() as gate:
        both = [waiting.start_in_background(pipeline=name) for name in ("bronze_to_silver", "other")]
        gate.wait_for_arrivals(2)
        assert waiting.value("select count(*) from etl.runs where status = 'running'") == 2
        gate.open()
        assert [started.result().status for started in both] == ["succeeded", "succeeded"]


def test_a_pipeline_must_be_named_when_there_are_several(pipeline: Pipeline) -> None:
    for name in ("first", "second"):
        other = Pipeline(pipeline.db, name)
        other.add("load")
        other.apply()
    with refused("PT404", "pipeline.unknown") as refusal:
        pipeline.start()
    assert refusal.detail["pipelines"] == ["first", "second"]
    assert pipeline.start(pipeline="second").status == "succeeded"


def test_of_fifty_simultaneous_starts_exactly_one_wins(waiting: Pipeline) -> None:
    connections = [waiting.db.connect() for _ in range(SESSIONS)]
    with waiting.gate() as gate:
        started = start_all(waiting, connections)
        gate.wait_for_arrivals()
        wait_until(
            gate.conn,
            "select count(*) = 1 from pg_stat_activity where state = 'active' and pid <> pg_backend_pid()"
            " and query ~ 'etl.start_run' and datname = current_database()",
            timeout=30,
        )
        gate.open()
        won, codes = [], []
        for one in started:
            try:
                won.append(one.result())
            except psycopg.Error as error:
                codes.append(error.sqlstate)
    assert [run.status for run in won] == ["succeeded"]
    assert codes == ["PT409"] * (SESSIONS - 1)
    assert waiting.value("select count(*) from etl.runs") == 1
    assert waiting.trace() == ["load"]


THIEF = """
create function silver.steal(run_id bigint, out tries int, out status_then text) language plpgsql as $$
begin
  tries := 0;
  loop
    tries := tries + 1;
    exit when pg_try_advisory_lock(6435444, run_id::int);
  end loop;
  select r.status into status_then from etl.runs r;
  perform pg_advisory_unlock(6435444, run_id::int);
end $$
"""


def test_the_lock_is_never_free_between_two_steps(pipeline: Pipeline) -> None:
    for number in range(40):
        pipeline.add(f"step_{number:02}", "perform 1 / 0" if number % 4 == 0 else None)
    pipeline.apply()
    pipeline.sql(THIEF)
    started = pipeline.start_in_background()
    wait_until(pipeline.conn, "select count(*) > 0 from etl.runs")
    (theft,) = pipeline.rows("select s.* from etl.runs r, silver.steal(r.run_id) s")
    assert started.result().status == "failed"
    assert theft["tries"] > 100
    assert theft["status_then"] == "failed"
    assert len(pipeline.trace()) == 30


# -- idempotency --


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_transaction_that_cannot_see_the_run_of_its_key_is_told_to_try_again(
    pipeline: Pipeline, isolation: str
) -> None:
    pipeline.add("load")
    pipeline.apply()
    submit = "select run_id, is_new from etl.submit_run(idempotency_key => 'nightly')"
    first = pipeline.db.connect(autocommit=False)
    second = pipeline.db.connect(
        options=f"-c default_transaction_isolation={isolation.replace(' ', chr(92) + ' ')}"
    )
    row = first.execute(submit).fetchone()
    assert row is not None
    submitting = Background(lambda: second.execute(submit).fetchone())
    wait_until(
        pipeline.conn,
        "select exists (select from pg_locks where pid = %s and locktype = 'advisory' and not granted)",
        [second.info.backend_pid],
    )
    first.commit()
    with refused("40001", "idempotency_key.concurrent") as refusal:
        submitting.result()
    assert "try again" in refusal.hint
    assert second.execute(submit).fetchone() == (row[0], False)


def test_the_same_key_and_request_return_the_same_run(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    first = pipeline.start(idempotency_key="monday", procedures=["load"])
    assert pipeline.start(idempotency_key="monday", procedures=["load"]) == first
    assert pipeline.trace() == ["load"]
    assert pipeline.start(idempotency_key="tuesday", procedures=["load"]).run_id > first.run_id
    assert pipeline.run(first.run_id)["idempotency_key"] == "monday"


def test_a_run_that_failed_keeps_its_key(pipeline: Pipeline) -> None:
    pipeline.add("load", "perform 1 / 0")
    pipeline.apply()
    first = pipeline.start(idempotency_key="monday")
    assert first.status == "failed"
    assert pipeline.start(idempotency_key="monday") == first


def test_runs_without_a_key_are_all_new(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    assert pipeline.start().run_id != pipeline.start().run_id
    assert pipeline.trace() == ["load", "load"]


@pytest.mark.parametrize(
    "other", [{}, {"tags": ["daily"]}, {"procedures": ["load"], "params": {"load": {"n": 2}}}], ids=str
)
def test_the_same_key_with_another_request_is_refused(pipeline: Pipeline, other: dict[str, Any]) -> None:
    pipeline.add(
        "load", tags=["daily"], params=[{"name": "n", "type": "integer"}], arguments="n int default 1"
    )
    pipeline.apply()
    first = pipeline.start(idempotency_key="monday", procedures=["load"])
    with refused("PT409", "idempotency_key.reused") as refusal:
        pipeline.start(idempotency_key="monday", **other)
    assert refusal.detail["run_id"] == first.run_id
    assert refusal.detail["request"]["procedures"] == ["load"]
    assert pipeline.trace() == ["load"]


def test_the_time_zone_of_a_session_does_not_change_what_is_asked_for(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    as_of = datetime.fromisoformat("2024-06-01T12:00:00+00:00")
    first = pipeline.start(idempotency_key="monday", as_of=as_of)
    elsewhere = pipeline.db.connect(options="-c timezone=Asia/Tokyo")
    assert pipeline.start(elsewhere, idempotency_key="monday", as_of=as_of) == first
    assert pipeline.run(first.run_id)["as_of"] == as_of


def test_a_request_that_was_refused_does_not_use_up_its_key(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    with refused("PT404", "procedure.unknown"):
        pipeline.start(idempotency_key="monday", procedures=["nope"])
    assert pipeline.start(idempotency_key="monday").status == "succeeded"


def test_a_start_refused_because_a_run_is_active_does_not_use_up_its_key(waiting: Pipeline) -> None:
    with waiting.gate() as gate:
        started = waiting.start_in_background()
        gate.wait_for_arrivals()
        with refused("PT409", "run.active"):
            waiting.start(idempotency_key="monday")
        gate.open()
        run = started.result()
    assert waiting.start(idempotency_key="monday").run_id > run.run_id


def test_a_key_leads_to_its_run_while_that_is_active(waiting: Pipeline) -> None:
    with waiting.gate() as gate:
        started = waiting.start_in_background(idempotency_key="monday")
        gate.wait_for_arrivals()
        again = waiting.start(idempotency_key="monday")
        gate.open()
        run = started.result()
    assert again == (run.run_id, "running")
    assert run.status == "succeeded"


def test_fifty_sessions_with_the_same_key_lead_to_one_run(waiting: Pipeline) -> None:
    connections = [waiting.db.connect() for _ in range(SESSIONS)]
    with waiting.gate() as gate:
        started = start_all(waiting, connections, idempotency_key="monday")
        gate.wait_for_arrivals()
        wait_until(
            gate.conn,
            "select count(*) = 1 from pg_stat_activity where state = 'active' and pid <> pg_backend_pid()"
            " and query ~ 'etl.start_run' and datname = current_database()",
            timeout=30,
        )
        gate.open()
        runs = [one.result() for one in started]
    assert len({run.run_id for run in runs}) == 1
    assert sorted(run.status for run in runs) == ["running"] * (SESSIONS - 1) + ["succeeded"]
    assert waiting.value("select count(*) from etl.runs") == 1
    assert waiting.trace() == ["load"]


# -- roles --


def test_an_operator_without_any_right_on_the_tables_can_run(pipeline: Pipeline) -> None:
    body = "insert into silver.trace (step) values (current_user || ' for ' || session_user)"
    pipeline.add("load", body)
    pipeline.apply()
    operator = pipeline.login("etl_operator")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        operator.execute("select * from silver.trace")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        operator.execute("update etl.runs set reason = 'x'")
    run = pipeline.start(operator)
    assert run.status == "succeeded"
    assert pipeline.trace() == [f"etl_owner for {operator.info.user}"]
    row = pipeline.run(run.run_id)
    assert row["requested_by"] == row["session_user_name"] == operator.info.user


def test_set_role_decides_who_asks(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    pipeline.conn.execute("set role etl_operator")
    run = pipeline.start()
    pipeline.conn.execute("reset role")
    row = pipeline.run(run.run_id)
    assert row["requested_by"] == "etl_operator"
    assert row["session_user_name"] == pipeline.value("select session_user")


@pytest.mark.parametrize("roles", [(), ("etl_reader",)], ids=["nobody", "reader"])
def test_a_role_that_is_no_operator_cannot_start_a_run(pipeline: Pipeline, roles: tuple[str, ...]) -> None:
    pipeline.add("load")
    pipeline.apply()
    stranger = pipeline.login(*roles)
    with refused("42501"):
        pipeline.start(stranger)
    assert pipeline.value("select count(*) from etl.runs") == 0


def test_a_reader_can_read_and_plan(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    run = pipeline.start()
    reader = pipeline.login("etl_reader")
    assert [row["name"] for row in pipeline.plan(reader)] == ["load"]
    for view in ("run_history", "step_history", "procedure_health", "run_events"):
        assert reader.execute(f"select * from etl.{view}".encode()).fetchall()
    assert reader.execute("select etl.get_run(%s)->>'status'", [run.run_id]).fetchone() == ("succeeded",)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute("insert into etl.state (state_key, strategy) values ('x', 'id')")


# -- helpers out of turn --


ANY_CALLER: frozenset[str] = frozenset({
    "_change_baseline", "_request", "_run_status", "_requester", "_is_alive", "_hold", "_rehold",
    "_last_success_at", "_render_call", "_atomic_message", "_fail", "_fail_in_transaction", "_show_plan",
    "_unfinished", "_lock_key", "_show_backfill", "_backfill_request", "_watermark_now",
    "_definition", "_is_front_end", "_awaits_approval", "_subject", "_requesting_role", "_needs_approval",
    "_bucket_bounds", "_bucket", "_live_outcomes", "_waits", "_usual_ms", "_freshness",
    "_horizon_now", "_config_drift", "_counted_outcomes", "_close_helpers",
    "_lineage", "_lineage_findings",
    "_resumptions", "_sum_counts", "_succeeded_at",
})  # fmt: skip
"""Helpers that change nothing: they read, or take a lock or a connection that is the caller's own."""

OUT_OF_TURN = {
    "_claim": "select etl._claim({run_id}, null, false)",
    "_execute_scope": "select etl._execute_scope({run_id}, 1, 1, '{{}}')",
    "_execute_refresh": "select etl._execute_refresh({run_id}, 1)",
    "_record_failure": "select etl._record_failure({run_id}, 1, '{{}}')",
    "_is_cancelled": "select etl._is_cancelled({run_id}, 'x')",
    "_open_helpers": "select etl._open_helpers({run_id})",
}
"""Helpers of the session that executes a run."""

AS_A_REQUEST = {
    "_begin_run": "select etl._begin_run('{{}}')",
    "_rehearse": "select etl._rehearse('{{}}')",
    "_report_plan": "select etl._report_plan('{{}}', true)",
    "_request_cancel": "select etl._request_cancel({run_id}, 'x')",
    "_begin_resume": "select etl._begin_resume({run_id}, null)",
}
"""Helpers that refuse what the verb they belong to refuses."""

AS_THE_VERB = frozenset(
    {"_submit", "_enlist", "_time_out_steps", "_withdraw_timeout", "_purge_batch", "_note_purge"}
)
"""Helpers that are all there is to a verb which any operator may call at any time."""

ON_REQUEST = {
    "_cancel_statement": "select etl._cancel_statement({pid})",
    "_signal_as_engine": "select etl._signal_as_engine({pid})",
}
"""Helpers that do nothing to a run which nobody has asked to stop."""


def snapshot(pipeline: Pipeline) -> list[Any]:
    return pipeline.column(
        "select to_jsonb(r) from etl.runs r union all select to_jsonb(p) from etl.procedure_runs p"
        " union all select to_jsonb(s) from etl.run_scopes s"
        " union all select to_jsonb(m) from etl.mv_refreshes m"
    )


def test_helpers_called_out_of_turn_are_refused(waiting: Pipeline) -> None:
    granted = waiting.column(
        "select distinct p.proname::text from pg_proc p where p.pronamespace = 'etl'::regnamespace"
        " and p.proname like '\\_%%' and p.prokind = 'f'"
        " and has_function_privilege('etl_operator', p.oid, 'execute')"
    )
    assert set(granted) == ANY_CALLER | set(OUT_OF_TURN) | set(AS_A_REQUEST) | AS_THE_VERB | set(ON_REQUEST)
    attacker = waiting.login("etl_operator")
    with waiting.gate() as gate:
        started = waiting.start_in_background(waiting.login("etl_operator"))
        (pid,) = gate.wait_for_arrivals()
        run_id = waiting.value("select run_id from etl.runs")
        before = snapshot(waiting)
        for statement in ON_REQUEST.values():
            assert attacker.execute(statement.format(pid=pid).encode()).fetchone() == (False,)
        for name, statement in OUT_OF_TURN.items():
            with refused("42501", "run.not_owned"):
                attacker.execute(statement.format(run_id=run_id).encode())
            assert name in statement
        for name, statement in AS_A_REQUEST.items():
            is_cancel = name == "_request_cancel"
            code, sqlstate = ("run.not_yours", "PT403") if is_cancel else ("run.active", "PT409")
            with refused(sqlstate, code):
                attacker.execute(statement.format(run_id=run_id).encode())
        assert snapshot(waiting) == before
        gate.open()
        assert started.result().status == "succeeded"


CANCELLED = '{"class": "cancelled", "code": "57014", "sqlstate": "57014", "message": "forged"}'


def test_a_helper_does_not_end_what_it_has_not_begun(pipeline: Pipeline) -> None:
    pipeline.add("a", Gate.WAIT)
    pipeline.add("b", dependencies=["a"])
    pipeline.add("c", dependencies=["b"])
    pipeline.apply()
    attacker = pipeline.login("etl_operator")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background(pipeline.login("etl_operator"))
        gate.wait_for_arrivals()
        run_id = pipeline.value("select run_id from etl.runs")
        for scope_index in (1, 2, 3):
            with refused("42501", "run.not_owned"), attacker.transaction():
                attacker.execute("select * from etl._enlist(null, %s)", [run_id])
                attacker.execute("select etl._record_failure(%s, %s, %s)", [run_id, scope_index, CANCELLED])
        gate.open()
        assert started.result().status == "succeeded"
    with refused("42501", "run.not_owned"):
        attacker.execute("select etl._record_failure(%s, 1, %s)", [run_id, CANCELLED])
    assert pipeline.outcomes(run_id) == dict.fromkeys("abc", "succeeded")


def test_of_a_step_whose_session_is_gone_a_helper_can_say_that_alone(pipeline: Pipeline) -> None:
    pipeline.add("a", Gate.WAIT)
    pipeline.add("b", dependencies=["a"])
    pipeline.apply()
    attacker = pipeline.login("etl_operator")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        run_id = pipeline.value("select run_id from etl.runs")
        with attacker.transaction():
            attacker.execute("select * from etl._enlist(null, %s)", [run_id])
            pipeline.value("select pg_terminate_backend(%s, 5000)", pid)
            attacker.execute("select etl._record_failure(%s, 1, %s)", [run_id, CANCELLED])
        with pytest.raises(psycopg.OperationalError):
            started.result()
    (lost, again) = [step for step in pipeline.steps(run_id) if step["procedure_name"] == "a"]
    assert (lost["status"], lost["error_code"], again["status"]) == ("retrying", "worker.lost", "pending")
    assert str(pid) in lost["error_message"]
    assert pipeline.run(run_id)["cancel_requested_at"] is None


def test_nobody_else_can_walk_an_active_run(waiting: Pipeline) -> None:
    attacker = waiting.login("etl_operator")
    attacker.execute("set lock_timeout = '20ms'")
    with waiting.gate() as gate:
        started = waiting.start_in_background()
        gate.wait_for_arrivals()
        run_id, pipeline_id = waiting.conn.execute("select run_id, pipeline_id from etl.runs").fetchone() or (
            0,
            0,
        )
        before = snapshot(waiting)
        with refused("42501", "run.not_owned"):
            attacker.execute("call etl._walk(%s, %s)", [run_id, pipeline_id])
        with refused("42501", "run.not_owned"):
            attacker.execute("call etl._walk(%s, %s)", [run_id, pipeline_id + 1])
        assert snapshot(waiting) == before
        gate.open()
        assert started.result() == (run_id, "succeeded")
    with refused("42501", "run.not_owned"):
        attacker.execute("call etl._walk(%s, %s)", [run_id, pipeline_id])
    assert waiting.start().status == "succeeded"


def test_nothing_of_the_engine_is_granted_to_public(pipeline: Pipeline) -> None:
    open_to_all = pipeline.column(
        "select p.oid::regprocedure::text"
        " from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a"
        " where p.pronamespace = 'etl'::regnamespace and a.grantee = 0"
    )
    assert open_to_all == []


def test_every_security_definer_routine_pins_its_search_path(pipeline: Pipeline) -> None:
    loose = pipeline.column(
        "select p.oid::regprocedure::text from pg_proc p"
        " where p.pronamespace = 'etl'::regnamespace and p.prosecdef"
        " and not exists (select from unnest(p.proconfig) c where c like 'search_path=%%')"
    )
    assert loose == []
