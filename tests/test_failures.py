"""When a step fails: what is undone, what is recorded, what still runs, what is tried again."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipelines import Background, Gate, Pipeline
from tests.servers import Database, wait_until

Row = dict[str, Any]


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql("create table bronze.src (at timestamptz)")
        yield pipeline


WINDOW = "p_since timestamptz, p_until timestamptz"
BROKEN = "insert into silver.trace (step) values ('broken'); perform 1 / 0"
FAILS_ONCE = "if nextval('silver.tries') = 1 then raise sqlstate '40001' using message = 'try again'; end if"


def watermark(state_key: str) -> Row:
    return {"strategy": "timestamp", "source": ["bronze.src.at"], "state_key": state_key, "delay_ms": 0}


# -- one transaction --


def test_data_watermark_and_outcome_are_one_commit(pipeline: Pipeline) -> None:
    pipeline.add("load", arguments=WINDOW, watermark=watermark("load"))
    pipeline.apply()
    run = pipeline.start()
    transactions = pipeline.column(
        "select xmin::text from silver.trace"
        " union select xmin::text from etl.state"
        " union select xmin::text from etl.state_history"
        " union select xmin::text from etl.procedure_runs where run_id = %s",
        run.run_id,
    )
    assert len(transactions) == 1


def test_a_failing_step_undoes_only_itself(pipeline: Pipeline) -> None:
    pipeline.add("a_good", arguments=WINDOW, watermark=watermark("good"))
    pipeline.add("b_broken", BROKEN, arguments=WINDOW, watermark=watermark("broken"))
    pipeline.add("c_good")
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.trace() == ["a_good", "c_good"]
    assert pipeline.watermark("good") is not None
    assert pipeline.watermark("broken") is None


def test_a_failed_step_leaves_its_watermark_where_it_was(pipeline: Pipeline) -> None:
    pipeline.add("load", arguments=WINDOW, watermark=watermark("load"))
    pipeline.apply()
    pipeline.start()
    before = pipeline.watermark("load")
    pipeline.routine("load", BROKEN, WINDOW)
    failed = pipeline.start()
    assert failed.status == "failed"
    assert pipeline.watermark("load") == before
    pipeline.routine("load", None, WINDOW)
    repaired = pipeline.start()
    assert pipeline.step(repaired.run_id, "load")["window_since"] == before


def test_a_step_whose_watermark_was_moved_under_it_keeps_nothing(pipeline: Pipeline) -> None:
    pipeline.add("load", f"{Gate.WAIT}; insert into silver.trace (step) values ('load')", arguments=WINDOW,
                 watermark=watermark("load"))  # fmt: skip
    pipeline.apply()
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        pipeline.value("insert into etl.state (state_key, strategy, last_success_watermark)"
                     " values ('load', 'timestamp', '2024-06-01T00:00:00+00:00') returning 1")  # fmt: skip
        gate.open()
        run = started.result()
    assert pipeline.step(run.run_id, "load")["error_code"] == "watermark.moved"
    assert pipeline.watermark("load") == "2024-06-01T00:00:00+00:00"
    assert pipeline.trace() == []
    assert pipeline.start().status == "succeeded"


def test_everything_that_needs_a_failed_step_is_skipped_and_the_rest_goes_on(pipeline: Pipeline) -> None:
    pipeline.add("a_broken", BROKEN)
    pipeline.add("b_child", dependencies=["a_broken"])
    pipeline.add("c_grandchild", dependencies=["b_child"])
    pipeline.add("d_two_parents", dependencies=["a_broken", "e_free"])
    pipeline.add("e_free")
    pipeline.add("f_follows", dependencies=["e_free"])
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == {
        "a_broken": "failed", "b_child": "upstream_failed", "c_grandchild": "upstream_failed",
        "d_two_parents": "upstream_failed", "e_free": "succeeded", "f_follows": "succeeded",
    }  # fmt: skip
    assert sorted(pipeline.trace()) == ["e_free", "f_follows"]


def test_on_failure_stop_ends_the_run(pipeline: Pipeline) -> None:
    pipeline.add("a_good")
    pipeline.add("b_broken", BROKEN, on_failure="stop")
    pipeline.add("c_child", dependencies=["b_broken"])
    pipeline.add("d_free")
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.outcomes(run.run_id) == {
        "a_good": "succeeded", "b_broken": "failed", "c_child": "upstream_failed", "d_free": "stopped",
    }  # fmt: skip


def test_the_run_names_its_first_failure(pipeline: Pipeline) -> None:
    pipeline.add("a_broken", "perform 1 / 0")
    pipeline.add("b_broken", "raise 'second'")
    pipeline.apply()
    row = pipeline.run(pipeline.start().run_id)
    assert (row["error_code"], row["error_message"]) == ("22012", "a_broken: division by zero")


# -- groups --


def group(pipeline: Pipeline, *bodies: str | None, **settings: Any) -> None:
    """Steps a, b, c of one group that is one transaction."""
    for name, body in zip("abc", bodies, strict=False):
        pipeline.add(
            name, body, arguments=WINDOW, watermark=watermark(name), group="g",
            transaction_scope="per_group", **settings,
        )  # fmt: skip


def test_a_group_is_all_or_nothing(pipeline: Pipeline) -> None:
    group(pipeline, None, BROKEN, None)
    pipeline.add("child_of_a", dependencies=["a"])
    pipeline.add("free")
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.trace() == ["free"]
    assert [pipeline.watermark(key) for key in "abc"] == [None, None, None]
    assert pipeline.outcomes(run.run_id) == {
        "a": "rolled_back", "b": "failed", "c": "rolled_back", "child_of_a": "upstream_failed",
        "free": "succeeded",
    }  # fmt: skip
    a = pipeline.step(run.run_id, "a")
    b = pipeline.step(run.run_id, "b")
    assert a["error_message"] == f"rolled back with its group: step {b['order_index']} failed"
    assert a["rows_affected"] is None


def test_a_group_that_succeeds_is_one_commit(pipeline: Pipeline) -> None:
    group(pipeline, None, None, None)
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == dict.fromkeys("abc", "succeeded")
    transactions = pipeline.column(
        "select xmin::text from silver.trace union select xmin::text from etl.state"
        " union select xmin::text from etl.procedure_runs where run_id = %s",
        run.run_id,
    )
    assert len(transactions) == 1


def test_a_group_is_tried_again_from_its_first_step(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    group(pipeline, None, FAILS_ONCE + "; insert into silver.trace (step) values ('b')", None)
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "succeeded"
    assert pipeline.trace() == ["a", "b", "c"]
    assert [(s["procedure_name"], s["attempt"], s["status"]) for s in pipeline.steps(run.run_id)] == [
        ("a", 1, "rolled_back"), ("a", 2, "succeeded"), ("b", 1, "retrying"), ("b", 2, "succeeded"),
        ("c", 1, "rolled_back"), ("c", 2, "succeeded"),
    ]  # fmt: skip


def test_members_of_a_group_may_share_a_watermark(pipeline: Pipeline) -> None:
    for name in ("a", "b"):
        pipeline.add(
            name, arguments=WINDOW, watermark=watermark("shared"), group="g", transaction_scope="per_group"
        )
    pipeline.apply()
    runs = [pipeline.start(), pipeline.start()]
    assert [run.status for run in runs] == ["succeeded", "succeeded"]
    for run in runs:
        windows = {(s["window_since"], s["window_until"]) for s in pipeline.steps(run.run_id)}
        assert len(windows) == 1
    assert pipeline.value("select count(*) from etl.state_history") == 2


# -- what is caught, and how it is recorded --


def failure(pipeline: Pipeline, **settings: Any) -> Row:
    """Run and return the only step, which failed."""
    pipeline.apply(**settings)
    run = pipeline.start()
    assert run.status == "failed"
    (step,) = pipeline.steps(run.run_id)
    assert step["status"] == "failed"
    return step


@pytest.mark.parametrize(
    ("body", "sqlstate", "error_class", "message", "hint"),
    [
        ("perform 1 / 0", "22012", "data_quality", "division by zero", "repair the rows"),
        ("assert false, 'no sales today'", "P0004", "code", "no sales today", "correct the routine"),
        (
            "raise sqlstate 'ZX001' using message = 'mine', hint = 'do this'",
            "ZX001",
            "code",
            "mine",
            "do this",
        ),
        ("raise 'plain'", "P0001", "code", "plain", "correct the routine"),
        (
            "perform silver.nowhere()",
            "42883",
            "schema_mismatch",
            "silver.nowhere() does not exist",
            "No function",
        ),
        (
            "perform * from silver.nowhere",
            "42P01",
            "schema_mismatch",
            "does not exist",
            "create what is missing",
        ),
        ("perform 'x'::int", "22P02", "data_quality", "invalid input syntax", "repair the rows"),
        ("perform repeat('x', 2000000000)", "54000", "resource", "requested length too large", "free some"),
        ("raise sqlstate '53200' using message = 'oom'", "53200", "resource", "oom", "ran out of a resource"),
        ("commit", "2D000", "code", "invalid transaction termination", "the routine commits or rolls back"),
        ("rollback", "2D000", "code", "invalid transaction termination", "the routine commits or rolls back"),
        ("set role postgres", "42501", "code", "", "etl_owner"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) == 5 else "",
)
def test_an_error_is_recorded_with_class_cause_and_remedy(
    pipeline: Pipeline, body: str, sqlstate: str, error_class: str, message: str, hint: str
) -> None:
    pipeline.add("load", "insert into silver.trace (step) values ('x'); " + body)
    step = failure(pipeline)
    assert (step["sqlstate"], step["error_code"], step["error_class"]) == (sqlstate, sqlstate, error_class)
    assert message in step["error_message"]
    assert hint in step["error_hint"]
    assert step["error_context"].splitlines()[-1].startswith("PL/pgSQL function silver.load()")
    assert pipeline.trace() == []


def test_a_procedure_that_commits_is_told_not_to(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create procedure silver.commits() language plpgsql as"
        " $$ begin insert into silver.trace (step) values ('x'); commit; end $$"
    )
    pipeline.add("load", routine="silver.commits")
    step = failure(pipeline)
    assert step["sqlstate"] == "2D000"
    assert "take that out" in step["error_hint"]
    assert pipeline.trace() == []


def test_a_routine_that_is_gone_fails_its_step_only(pipeline: Pipeline) -> None:
    pipeline.add("a_gone")
    pipeline.add("b_here")
    pipeline.apply()
    pipeline.sql("drop function silver.a_gone()")
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == {"a_gone": "failed", "b_here": "succeeded"}
    assert pipeline.step(run.run_id, "a_gone")["error_class"] == "schema_mismatch"


DEFERRED = """
create table silver.parent (id int primary key);
create table silver.child (id int references silver.parent deferrable initially deferred);
"""


def test_a_deferred_constraint_fails_the_step_and_not_the_commit(pipeline: Pipeline) -> None:
    pipeline.sql(DEFERRED)
    pipeline.add("load", "insert into silver.child values (1)", arguments=WINDOW, watermark=watermark("load"))
    step = failure(pipeline)
    assert (step["sqlstate"], step["error_class"]) == ("23503", "data_quality")
    assert step["rows_affected"] is None
    assert pipeline.watermark("load") is None


def test_a_deferred_constraint_may_be_met_by_a_later_step_of_the_group(pipeline: Pipeline) -> None:
    pipeline.sql(DEFERRED)
    group(pipeline, "insert into silver.child values (1)", "insert into silver.parent values (1)")
    pipeline.apply()
    assert pipeline.start().status == "succeeded"


def test_a_deferred_constraint_that_no_step_of_a_group_meets_undoes_the_group(pipeline: Pipeline) -> None:
    pipeline.sql(DEFERRED)
    group(pipeline, "insert into silver.child values (1)", None)
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == {"a": "rolled_back", "b": "failed"}
    assert pipeline.step(run.run_id, "b")["sqlstate"] == "23503"
    assert pipeline.trace() == []


def test_a_deferred_trigger_runs_as_the_owner_of_the_steps(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create table silver.noticed (who text);"
        " create function silver.note() returns trigger language plpgsql as"
        " $$ begin insert into silver.noticed values (current_user); return null; end $$;"
        " create constraint trigger note after insert on silver.trace deferrable initially deferred"
        " for each row execute function silver.note()"
    )
    pipeline.add("load")
    pipeline.apply()
    run = pipeline.start(pipeline.login("etl_operator"))
    assert run.status == "succeeded"
    assert pipeline.column("select who from silver.noticed") == ["etl_owner"]


# -- checks --


SALES = "create table silver.sales (id int, customer int)"


@pytest.mark.parametrize(
    ("check", "violations"),
    [
        ({"type": "not_null", "columns": ["customer"]}, 1),
        ({"type": "not_null", "columns": ["id", "customer"]}, 1),
        ({"type": "unique", "columns": ["id"]}, 1),
        ({"type": "row_count", "min": 4}, 1),
        ({"type": "row_count", "max": 2}, 1),
        ({"type": "routine", "routine": "silver.says_no"}, 1),
        ({"type": "routine", "routine": "silver.counts"}, 3),
    ],
    ids=str,
)
def test_a_check_that_does_not_hold_keeps_the_data_from_being_published(
    pipeline: Pipeline, check: Row, violations: int
) -> None:
    pipeline.sql(SALES)
    pipeline.sql("create function silver.says_no() returns boolean language sql as 'select false'")
    pipeline.sql(
        "create function silver.counts() returns bigint language sql as 'select count(*) from silver.sales'"
    )
    if check["type"] != "routine":
        check = {"table": "silver.sales", **check}
    body = "insert into silver.sales values (1, 1), (2, null), (2, 3)"
    pipeline.add("load", body, checks=[{"name": "holds", "severity": "error", **check}])
    step = failure(pipeline)
    assert (step["error_code"], step["error_class"]) == ("check.failed", "data_quality")
    assert step["error_message"] == f"load: check holds found {violations} violation(s)"
    assert pipeline.value("select count(*) from silver.sales") == 0


def test_a_check_that_holds_says_nothing(pipeline: Pipeline) -> None:
    pipeline.sql(SALES)
    pipeline.sql("create function silver.says_yes() returns boolean language sql as 'select true'")
    of = {"severity": "error", "table": "silver.sales"}
    pipeline.add(
        "load",
        "insert into silver.sales values (1, 1), (2, 1), (null, 1)",
        checks=[
            {"name": "a", "type": "not_null", "columns": ["customer"], **of},
            {"name": "b", "type": "unique", "columns": ["id"], **of},
            {"name": "c", "type": "row_count", "min": 3, "max": 3, **of},
            {"name": "d", "type": "routine", "routine": "silver.says_yes", "severity": "error"},
        ],
    )
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "succeeded"
    assert pipeline.step(run.run_id, "load")["warnings"] is None


def test_a_check_of_severity_warn_publishes_and_is_remembered(pipeline: Pipeline) -> None:
    pipeline.sql(SALES)
    checks = [
        {"name": "full", "type": "row_count", "table": "silver.sales", "min": 9, "severity": "warn"},
        {
            "name": "owned",
            "type": "not_null",
            "table": "silver.sales",
            "columns": ["customer"],
            "severity": "warn",
        },
    ]
    pipeline.add("load", "insert into silver.sales values (1, null), (2, null)", checks=checks)
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "completed_with_warnings"
    assert [(w["name"], w["violations"]) for w in pipeline.step(run.run_id, "load")["warnings"]] == [
        ("full", 1),
        ("owned", 2),
    ]
    assert pipeline.value("select count(*) from silver.sales") == 2


def test_all_checks_of_severity_error_are_reported_at_once(pipeline: Pipeline) -> None:
    pipeline.sql(SALES)
    of = {"table": "silver.sales", "severity": "error"}
    checks = [
        {"name": "full", "type": "row_count", "min": 9, **of},
        {"name": "owned", "type": "not_null", "columns": ["customer"], **of},
    ]
    pipeline.add("load", "insert into silver.sales values (1, null)", checks=checks)
    message = failure(pipeline)["error_message"]
    assert message == "load: check full found 1 violation(s); check owned found 1 violation(s)"


# -- trying again --


def attempts(pipeline: Pipeline, run_id: int) -> list[tuple[int, str, str | None]]:
    return [(s["attempt"], s["status"], s["sqlstate"]) for s in pipeline.steps(run_id)]


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "55P03", "53300", "57P01", "57P03", "08006"])
def test_a_transient_error_is_tried_again_in_the_same_window(pipeline: Pipeline, sqlstate: str) -> None:
    pipeline.sql("create sequence silver.tries")
    body = FAILS_ONCE.replace("40001", sqlstate) + "; insert into silver.trace (step) values (p_until::text)"
    pipeline.add("load", body, arguments=WINDOW, watermark=watermark("load"))
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "succeeded"
    first, second = pipeline.steps(run.run_id)
    assert attempts(pipeline, run.run_id) == [(1, "retrying", sqlstate), (2, "succeeded", None)]
    assert (first["error_class"], first["error_message"]) == ("transient", "try again")
    assert first["window_until"] == second["window_until"] == pipeline.watermark("load")
    assert first["ended_at"] <= second["started_at"]


def test_every_attempt_is_kept_and_the_last_one_fails(pipeline: Pipeline) -> None:
    retries = {"attempts": 4, "backoff_ms": 1, "max_backoff_ms": 1}
    pipeline.add("load", "raise sqlstate '40001' using message = 'again'", retries=retries)
    pipeline.add("child", dependencies=["load"])
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "failed"
    load = [s["status"] for s in pipeline.steps(run.run_id) if s["procedure_name"] == "load"]
    assert load == ["retrying", "retrying", "retrying", "failed"]
    assert pipeline.outcomes(run.run_id)["child"] == "upstream_failed"
    assert pipeline.run(run.run_id)["error_code"] == "40001"


def test_an_error_that_is_not_transient_is_not_tried_again(pipeline: Pipeline) -> None:
    pipeline.add("load", "perform 1 / 0")
    assert failure(pipeline)["attempt"] == 1


def test_a_single_attempt_is_not_tried_again(pipeline: Pipeline) -> None:
    pipeline.add(
        "load", "raise sqlstate '40001'", retries={"attempts": 1, "backoff_ms": 1, "max_backoff_ms": 1}
    )
    assert failure(pipeline)["attempt"] == 1


def test_a_step_waits_between_attempts(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    pipeline.add("load", FAILS_ONCE, retries={"attempts": 2, "backoff_ms": 200, "max_backoff_ms": 30_000})
    pipeline.apply()
    first, second = pipeline.steps(pipeline.start().run_id)
    assert (second["started_at"] - first["ended_at"]).total_seconds() >= 0.1


def test_lock_timeout_ends_the_wait_and_counts_as_transient(pipeline: Pipeline) -> None:
    pipeline.add("load", lock_timeout_ms=10)
    pipeline.add("other")
    pipeline.apply()
    holder = pipeline.db.connect()
    holder.execute("begin; lock table silver.trace in exclusive mode")
    run = pipeline.start(procedures=["load"])
    holder.execute("rollback")
    assert attempts(pipeline, run.run_id) == [
        (1, "retrying", "55P03"),
        (2, "retrying", "55P03"),
        (3, "failed", "55P03"),
    ]
    assert "pg_locks" in pipeline.step(run.run_id, "load")["error_hint"]
    assert pipeline.start().status == "succeeded"


def test_lock_timeout_of_one_step_does_not_bind_the_next_one_of_its_group(pipeline: Pipeline) -> None:
    reports = "insert into silver.trace (step) values (current_setting('lock_timeout'))"
    for name, lock_timeout_ms in (("a", 1234), ("b", None)):
        pipeline.add(name, reports, group="g", transaction_scope="per_group", lock_timeout_ms=lock_timeout_ms)
    pipeline.apply()
    pipeline.start()
    assert pipeline.trace() == ["1234ms", "0"]


def test_a_deadlock_with_another_session_is_tried_again(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create table silver.account (id int primary key, v int);"
        " insert into silver.account values (1, 0), (2, 0)"
    )
    pipeline.add(
        "load",
        f"update silver.account set v = v + 1 where id = 1; {Gate.WAIT};"
        " update silver.account set v = v + 1 where id = 2",
    )
    pipeline.apply()
    other = pipeline.db.connect()
    other.execute(b"set deadlock_timeout = '1h'; begin; update silver.account set v = v + 10 where id = 2")
    with pipeline.gate() as gate:
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        blocked = Background(lambda: other.execute("update silver.account set v = v + 10 where id = 1"))
        wait_until(
            gate.conn,
            "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s",
            [other.info.backend_pid],
        )
        gate.open()
        blocked.result()
        other.execute("commit")
        run = started.result()
    assert attempts(pipeline, run.run_id) == [(1, "retrying", "40P01"), (2, "succeeded", None)]
    assert pipeline.column("select v from silver.account order by id") == [11, 11]


# -- isolation --


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
@pytest.mark.parametrize("default", ["read committed", "repeatable read", "serializable"])
def test_a_step_runs_at_its_own_isolation_whatever_the_session_defaults_to(
    pipeline: Pipeline, isolation: str, default: str
) -> None:
    body = "insert into silver.trace (step) values (current_setting('transaction_isolation'))"
    pipeline.add("a_load", body, isolation=isolation)
    pipeline.add("b_broken", "perform 1 / 0", isolation=isolation)
    pipeline.add("c_load", body, isolation=isolation)
    pipeline.add("d_plain", body)
    pipeline.apply()
    pipeline.conn.execute(f"set default_transaction_isolation = '{default}'".encode())
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.trace() == [isolation, isolation, "read committed"]
    assert pipeline.step(run.run_id, "a_load")["isolation"] == isolation
    assert pipeline.value("show default_transaction_isolation") == default


def test_a_read_only_session_default_is_an_error_of_the_server_and_leaves_nothing(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    pipeline.conn.execute("set default_transaction_read_only = on")
    with pytest.raises(Exception, match="read-only transaction"):
        pipeline.start()
    assert pipeline.value("select count(*) from etl.runs") == 0


SKEW = "create table silver.oncall (doctor text, is_on boolean)"


SWITCH_OFF = "update silver.oncall set is_on = false where doctor = 'ann'"


@pytest.mark.parametrize("scope", ["per_procedure", "per_group"])
@pytest.mark.parametrize(
    "body", [f"{Gate.WAIT}; {SWITCH_OFF}", f"{SWITCH_OFF}; {Gate.WAIT}"], ids=["then_writes", "has_written"]
)
def test_a_serializable_step_that_lost_against_another_session_is_tried_again(
    pipeline: Pipeline, scope: str, body: str
) -> None:
    pipeline.sql(f"{SKEW}; insert into silver.oncall values ('ann', true), ('bob', true)")
    pipeline.add(
        "load",
        f"if (select count(*) from silver.oncall where is_on) > 1 then {body}; end if",
        isolation="serializable",
        group="g",
        transaction_scope=scope,
    )
    pipeline.apply()
    other = pipeline.db.connect()
    with pipeline.gate() as gate:
        other.execute("begin isolation level serializable")
        assert other.execute("select count(*) from silver.oncall where is_on").fetchone() == (2,)
        started = pipeline.start_in_background()
        gate.wait_for_arrivals()
        other.execute("update silver.oncall set is_on = false where doctor = 'bob'")
        other.execute("commit")
        gate.open()
        run = started.result()
    assert attempts(pipeline, run.run_id) == [(1, "retrying", "40001"), (2, "succeeded", None)]
    assert pipeline.column("select doctor from silver.oncall where is_on") == ["ann"]


# -- search_path --


def test_the_search_path_of_the_pipeline_is_in_force_in_steps_only(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.only_here (id int); insert into bronze.only_here values (1)")
    pipeline.add("a_load", "insert into trace (step) select current_setting('search_path') from only_here")
    pipeline.add("b_broken", "perform 1 / 0")
    pipeline.apply(search_path=["silver", "bronze"])
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == {"a_load": "succeeded", "b_broken": "failed"}
    assert pipeline.trace() == ["pg_catalog, silver, bronze, pg_temp"]
    pipeline.apply(search_path=[])
    step = pipeline.step(pipeline.start().run_id, "a_load")
    assert step["sqlstate"] == "42P01"
    assert "search_path" in step["error_hint"]
