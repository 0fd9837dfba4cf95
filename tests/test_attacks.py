"""What a hostile session, routine or configuration must not achieve."""

from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from b2s.db import connect
from tests.pipelines import Gate, Pipeline, messages_of, refused
from tests.servers import Database, wait_until


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql("create table bronze.src (at timestamptz); create table bronze.numbered (id bigint)")
        yield pipeline


def watermark(strategy: str = "id", source: str = "bronze.numbered.id") -> dict[str, Any]:
    return {"strategy": strategy, "source": [source], "state_key": "load", "delay_ms": 0}


def test_a_source_that_is_gone_fails_its_step_and_not_the_run(pipeline: Pipeline) -> None:
    pipeline.add("a_good")
    pipeline.add("b_load", arguments="p_since bigint, p_until bigint", watermark=watermark())
    pipeline.add("c_good")
    pipeline.apply()
    pipeline.sql("drop table bronze.numbered")
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.outcomes(run.run_id) == {"a_good": "succeeded", "b_load": "failed", "c_good": "succeeded"}
    assert pipeline.step(run.run_id, "b_load")["error_code"] == "42P01"
    assert pipeline.watermark("load") is None


def test_a_state_key_does_not_change_its_strategy(pipeline: Pipeline) -> None:
    window = "p_since text, p_until text"
    pipeline.add("load", arguments=window, watermark=watermark("timestamp", "bronze.src.at"))
    pipeline.apply()
    pipeline.start()
    with refused("PT422", "config.invalid") as refusal:
        pipeline.change("load", watermark=watermark())
    assert "the watermark of state_key load is of the timestamp strategy" in refusal.message
    assert pipeline.start().status == "succeeded"


def test_a_message_that_the_client_cannot_read_does_not_end_the_run(pipeline: Pipeline) -> None:
    pipeline.add("a_broken", "raise exception 'не так'")
    pipeline.add("b_good")
    pipeline.apply()
    client = pipeline.db.connect()
    client.execute("set client_encoding = 'LATIN1'")
    received = messages_of(client)
    run = pipeline.start(client)
    assert run.status == "failed"
    assert pipeline.outcomes(run.run_id) == {"a_broken": "failed", "b_good": "succeeded"}
    assert pipeline.step(run.run_id, "a_broken")["error_message"] == "не так"
    assert any("a_broken failed" in message.text and "?? ???" in message.text for message in received)


def test_a_code_too_long_to_notify_does_not_end_the_run(pipeline: Pipeline) -> None:
    detail = """format('{"code": "%s"}', repeat('x', 9000))"""
    pipeline.add("load", f"raise exception using errcode = 'PT999', message = 'no', detail = {detail}")
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.step(run.run_id, "load")["error_code"] == "x" * 9000


def test_a_step_cannot_make_the_rest_of_the_run_read_only(pipeline: Pipeline) -> None:
    pipeline.add("a", "perform set_config('default_transaction_read_only', 'on', false)")
    pipeline.add("b")
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert pipeline.trace() == ["b"]


def test_part_of_a_group_cannot_be_executed_by_hand(pipeline: Pipeline) -> None:
    pipeline.add("a", group="g", transaction_scope="per_group")
    pipeline.add("b", group="g", transaction_scope="per_group")
    pipeline.apply()
    session = pipeline.login("etl_operator")
    with refused("42501", "run.not_owned"), session.transaction():
        begun = session.execute("select run_id from etl._begin_run('{}')").fetchone()
        assert begun is not None
        session.execute("select etl._claim(%s, null, false)", begun)
        session.execute("select etl._execute_scope(%s, 1, 1, etl._change_baseline())", begun)
    assert pipeline.trace() == []


def test_a_run_does_not_end_over_a_step_that_was_passed_by(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.add("b", dependencies=["a"])
    pipeline.apply()
    session = pipeline.login("etl_operator")
    with refused("42501", "run.not_owned"), session.transaction():
        begun = session.execute("select run_id from etl._begin_run('{}')").fetchone()
        assert begun is not None
        session.execute("select etl._claim(%s, null, false)", begun)
        session.execute("""select etl._claim(%s, '{"scope_index": 1}', true)""", begun)
        session.execute("select etl._execute_scope(%s, 2, 2, etl._change_baseline())", begun)
        session.execute("""select etl._claim(%s, '{"scope_index": 2}', false)""", begun)
    assert pipeline.trace() == []


def test_operators_on_the_callers_search_path_are_not_used(pipeline: Pipeline) -> None:
    pipeline.conn.execute("create schema trap; grant usage, create on schema trap to etl_owner")
    pipeline.sql(
        "create function trap.jsonb_pair(jsonb, jsonb) returns boolean language sql as 'select 1 / 0 = 1';"
        " create operator trap.? (leftarg = jsonb, rightarg = jsonb, function = trap.jsonb_pair);"
        " create function trap.number_pair(float8, int) returns boolean language sql as 'select 1 / 0 = 1';"
        " create operator trap.> (leftarg = float8, rightarg = int, function = trap.number_pair);"
        " create function trap.ints(int[], int[]) returns boolean language sql as 'select 1 / 0 = 1';"
        " create operator trap.<> (leftarg = int[], rightarg = int[], function = trap.ints)"
    )
    pipeline.add("a", "if nextval('silver.tries') = 1 then raise sqlstate '40001'; end if")
    pipeline.sql("create sequence silver.tries")
    pipeline.add("b", dependencies=["a"])
    pipeline.apply()
    pipeline.conn.execute("set search_path = trap")
    assert pipeline.start().status == "succeeded"


def test_a_step_does_not_choose_the_search_path_of_whoever_called(pipeline: Pipeline) -> None:
    """A path that a routine sets outlives it: with operators of integers in it, the caller would run them."""
    pipeline.conn.execute(
        "create schema trap authorization etl_owner; grant usage on schema trap to public;"
        " create table trap.seen (who text); grant insert on trap.seen to public"
    )
    pipeline.sql(
        "create function trap.plus(int, int) returns int language plpgsql as"
        " $$ begin insert into trap.seen values (current_user); return int4pl($1, $2); end $$;"
        " create operator trap.+ (leftarg = int, rightarg = int, function = trap.plus)"
    )
    pipeline.add("a", "perform set_config('search_path', 'trap, pg_catalog', false)")
    pipeline.add("b", dependencies=["a"])
    pipeline.apply()
    caller = pipeline.login("etl_operator")
    caller.execute("set search_path = public")
    assert pipeline.start(caller).status == "succeeded"
    assert pipeline.column("select who from trap.seen") == []
    assert caller.execute("show search_path").fetchone() == ("public",)


@pytest.mark.parametrize(
    ("left", "name"),
    [
        ("create domain pg_temp.float8 as pg_catalog.float8 check (trap.note(value))", "float8"),
        ("create temp view pg_stat_activity as select 1 as pid", "pg_stat_activity"),
    ],
)
def test_what_a_step_leaves_is_not_taken_for_something_of_the_server(
    pipeline: Pipeline, left: str, name: str
) -> None:
    pipeline.conn.execute("create schema trap authorization etl_owner; grant usage on schema trap to public")
    pipeline.sql("create function trap.note(pg_catalog.float8) returns boolean language sql as 'select true'")
    pipeline.add("a", f"execute $x$ {left} $x$")
    pipeline.add("b", "create temp table rest as select 1 as n", dependencies=[])
    pipeline.apply()
    caller = pipeline.login("etl_operator")
    run_id = pipeline.start(caller).run_id
    step = pipeline.step(run_id, "a")
    assert (step["error_code"], name in step["error_message"]) == ("session.temporary_names", True)
    assert pipeline.step(run_id, "b")["status"] == "succeeded"
    shadows = (
        "select count(*) from pg_catalog.pg_type where typnamespace = pg_my_temp_schema() and typname = %s"
    )
    assert caller.execute(shadows, [name]).fetchone() == (0,)


def test_nobody_says_what_the_steps_of_others_have_read(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.apply()
    other = pipeline.start().run_id
    session = pipeline.login("etl_operator")
    forged = (
        f'{{"scope_index": 0, "events": [{{"event": "x", "run_id": {other}, "order_index": 1, "attempt": 1,'
        ' "relations": [{"relation": "hr.salaries", "access": "write"}]}]}'
    )
    with refused("42501", "run.not_owned"), session.transaction():
        begun = session.execute("select run_id from etl._begin_run('{}')").fetchone()
        assert begun is not None
        session.execute("select etl._claim(%s, %s, false)", [begun[0], forged])
    assert pipeline.value("select count(*) from etl.lineage where relation = 'hr.salaries'") == 0


def test_bounds_of_a_check_are_numbers(pipeline: Pipeline) -> None:
    bound = "0 and 1) and (select etl.freeze_full_refresh(true, 'x') is null"
    check = {"name": "rows", "type": "row_count", "table": "silver.trace", "min": bound, "severity": "error"}
    pipeline.add("a", checks=[check])
    with refused("22P02"):
        pipeline.apply()


def test_parameters_are_validated_the_same_whatever_strings_mean_in_the_session(pipeline: Pipeline) -> None:
    declaration = {"name": "day", "type": "string", "format": "date", "required": True}
    pipeline.add("a", arguments="day date", params=[declaration])
    pipeline.apply()
    pipeline.conn.execute("set standard_conforming_strings = off")
    assert pipeline.start(params={"a": {"day": "2026-01-02"}}).status == "succeeded"
    with refused("PT422", "params.invalid"):
        pipeline.start(params={"a": {"day": "yesterday"}})


def test_a_step_does_not_end_between_a_forced_cancel_and_its_signal(pipeline: Pipeline) -> None:
    pipeline.add("a", Gate.WAIT)
    pipeline.apply()
    canceller = pipeline.db.connect()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        (worker,) = gate.wait_for_arrivals()
        with canceller.transaction(force_rollback=True):
            canceller.execute("select etl._request_cancel(max(run_id), null) from etl.runs")
            gate.open()
            wait_until(
                pipeline.conn,
                "select %s = any (pg_blocking_pids(%s))",
                [canceller.info.backend_pid, worker],
            )
        assert running.result().status == "succeeded"


def test_a_watermark_is_not_handed_to_a_procedure_that_has_not_read_up_to_it(pipeline: Pipeline) -> None:
    for name in ("a", "b"):
        pipeline.add(
            name, arguments="p_since bigint, p_until bigint", watermark=watermark() | {"state_key": name}
        )
    pipeline.apply()
    pipeline.start()
    a, b = pipeline.procedures
    a["watermark"], b["watermark"] = b["watermark"], a["watermark"]
    with refused("PT422", "config.invalid") as refusal:
        pipeline.apply()
    assert sorted(problem["loc"][1] for problem in refusal.detail["errors"]) == ["a", "b"]
    assert "has not read" in refusal.message
    a["watermark"], b["watermark"] = b["watermark"], a["watermark"]
    pipeline.apply()


def test_a_procedure_that_was_removed_comes_back_to_its_own_watermark(pipeline: Pipeline) -> None:
    pipeline.add("load", arguments="p_since bigint, p_until bigint", watermark=watermark())
    pipeline.add("other")
    pipeline.apply()
    pipeline.start()
    removed = pipeline.procedures.pop(0)
    pipeline.apply()
    pipeline.procedures.insert(0, removed)
    pipeline.apply()
    assert pipeline.start().status == "succeeded"


def test_a_temporary_table_of_the_caller_is_not_taken_for_a_step_s_own(pipeline: Pipeline) -> None:
    pipeline.add("load", "create temp table if not exists stage (id int); insert into stage values (1)")
    pipeline.apply()
    operator = pipeline.login("etl_operator")
    operator.execute("create temp table stage (id int)")
    run = pipeline.start(operator)
    assert run.status == "failed"
    step = pipeline.step(run.run_id, "load")
    assert step["error_code"] == "session.temporary_objects"
    assert "stage" in step["error_message"]
    operator.execute("discard temp")
    assert pipeline.start(operator).status == "succeeded"


def test_a_window_without_time_zone_is_refused(pipeline: Pipeline) -> None:
    pipeline.add(
        "load",
        arguments="p_since timestamp, p_until timestamp",
        watermark=watermark("timestamp", "bronze.src.at"),
    )
    with refused("PT422", "config.invalid") as refusal:
        pipeline.apply()
    assert "is of type timestamp without time zone" in refusal.message


CARDS = """
create schema secret authorization etl_owner; set role etl_owner; create table secret.cards (n text);
insert into secret.cards values ('4111'), ('5500'); reset role"""
LEAKS = (
    "select ('leak: ' || string_agg(n, ','))::int from secret.cards) q(value) on true -- ",
    "select ('leak: ' || string_agg(n, ','))::int from secret.cards",
    "select id from bronze.numbered) q(value) on true; select max(n)::int from secret.cards -- ",
)


@pytest.mark.parametrize("query", LEAKS)
def test_a_reader_who_plans_does_not_read_with_the_rights_of_the_steps(
    pipeline: Pipeline, query: str
) -> None:
    pipeline.conn.execute(CARDS.encode())
    pipeline.add("load", arguments="p_since bigint, p_until bigint", watermark=watermark(source=query))
    reader = pipeline.login("etl_reader")
    row = reader.execute("select etl.plan_config(%s)", [Jsonb(pipeline.spec())]).fetchone()
    assert row is not None
    assert [one["name"] for one in row[0]["changes"] if one["kind"] == "procedure"] == ["load"]


@pytest.mark.parametrize(
    "query",
    [
        LEAKS[0],
        "select max(id) from bronze.numbered) q(value) on true -- ",
        "select max(id) from bronze.numbered) q(value) on false; select 'bigint' -- ",
        "select max(id) from bronze.numbered; select 1",
        "select (max(id) from bronze.numbered",
        "select max(id) from bronze.numbered /* the newest",
    ],
)
def test_a_source_that_is_more_or_less_than_one_query_is_refused(pipeline: Pipeline, query: str) -> None:
    pipeline.conn.execute(CARDS.encode())
    pipeline.add("load", arguments="p_since bigint, p_until bigint", watermark=watermark(source=query))
    with refused("PT422", "config.invalid") as refusal:
        pipeline.apply()
    (problem,) = refusal.detail["errors"]
    assert problem["message"].startswith("the source query fails: ")
    assert "4111" not in str(refusal)


def test_a_source_may_end_with_a_comment(pipeline: Pipeline) -> None:
    query = "select max(id) from bronze.numbered -- the newest"
    pipeline.add("load", arguments="p_since bigint, p_until bigint", watermark=watermark(source=query))
    pipeline.apply()
    pipeline.sql("insert into bronze.numbered values (7)")
    assert pipeline.start().status == "succeeded"
    assert pipeline.watermark("load") == "8"


def test_b2s_prepares_nothing_that_a_step_could_replace(pipeline: Pipeline) -> None:
    with connect(pipeline.db.dsn) as connection:
        for _ in range(10):
            connection.execute("select %s::int", [1])
        left = connection.execute("select count(*) from pg_prepared_statements").fetchone()
    assert left == (0,)
