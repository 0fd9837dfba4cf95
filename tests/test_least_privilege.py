"""What is run is kept away from what is recorded: steps run as etl_owner, schema etl is etl_engine's."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.pipelines import Pipeline, refused
from tests.servers import Connection, Database

ENTERED = "create table silver.who (name text);"
"""Where hostile code leaves the name of the role that it ran as."""

TAMPERING = (
    "alter table etl.runs disable trigger all",
    "drop trigger an_ended_run_is_immutable on etl.runs",
    "drop table etl.state_history",
    "drop schema etl cascade",
    "update etl.state set last_success_watermark = null",
    "insert into etl.state_history (state_key, cause, changed_by) values ('k', 'set', 'nobody')",
    "delete from etl.runs",
    "truncate etl.procedure_runs",
    "lock table etl.runs in exclusive mode",
    "perform from etl.runs for update",
    "create table etl.mine (n int)",
    "create function etl.mine() returns int language sql as 'select 1'",
    "create or replace function etl._call_routine(step etl.procedure_runs, is_last boolean,"
    " out row_count numeric, out unmet_checks jsonb)"
    " language sql as 'select 1, null::jsonb'",
    "alter table etl.runs owner to etl_owner",
    "alter function etl._fail(text, text, text, text, jsonb) rename to fail",
    "perform etl._claim(1, null, false)",
    "perform etl._create_run('{}', 1, 1, null)",
    "perform etl.apply_config('{}')",
    "perform etl.freeze_full_refresh(false, 'x')",
    "perform etl.set_watermark('k', null, 'x')",
    "set role etl_engine",
    "perform set_config('role', 'etl_engine', false)",
    "set session authorization etl_engine",
)

ALTERATIONS = (
    "security invoker",
    "security invoker set search_path = trap, pg_catalog",
)


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


@pytest.mark.parametrize("statement", TAMPERING)
def test_a_step_cannot_touch_what_belongs_to_the_engine(pipeline: Pipeline, statement: str) -> None:
    pipeline.add("hostile", statement)
    pipeline.add("good")
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == {"hostile": "failed", "good": "succeeded"}
    assert pipeline.step(run.run_id, "hostile")["sqlstate"] in ("42501", "0A000")


@pytest.mark.parametrize("change", ALTERATIONS)
def test_a_routine_that_a_step_has_altered_runs_nothing_with_more_rights(
    pipeline: Pipeline, change: str
) -> None:
    pipeline.conn.execute("create schema trap authorization etl_owner; grant usage on schema trap to public")
    pipeline.sql(
        f"{ENTERED} create function trap.differs(name, text) returns boolean language sql as"
        " 'insert into silver.who values (current_user); select false';"
        " create operator trap.<> (leftarg = name, rightarg = text, function = trap.differs);"
        " create function trap.differs(name, name) returns boolean language sql as"
        " 'insert into silver.who values (current_user); select false';"
        " create operator trap.<> (leftarg = name, rightarg = name, function = trap.differs);"
    )
    signature = "etl._call_routine(etl.procedure_runs, boolean)"
    pipeline.add(
        "a_hostile",
        f"execute 'alter function {signature} {change}'; insert into silver.trace (step) values ('a')",
    )
    pipeline.add("b_next", "insert into silver.who values (current_user)", dependencies=["a_hostile"])
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.outcomes(run.run_id) == {"a_hostile": "succeeded", "b_next": "failed"}
    step = pipeline.step(run.run_id, "b_next")
    assert step["error_code"] == "engine.altered"
    assert "b2s migrate" in step["error_hint"]
    assert pipeline.column("select name from silver.who") == []
    found = pipeline.rows("select status, remedy from etl.diagnose() where check_name = 'engine'")
    assert found == [{"status": "fail", "remedy": "find out who did that; then b2s migrate installs it anew"}]


def test_what_runs_the_team_s_code_first_asks_who_it_runs_as(db: Database) -> None:
    """Nothing of it, no initial value of a variable either, is evaluated before."""
    found = (
        db.connect()
        .execute(
            "select p.proname::text, l.lanname::text, p.prosecdef, p.prosrc from pg_proc p"
            " join pg_language l on l.oid = p.prolang"
            " where p.pronamespace = 'etl'::regnamespace and p.proowner = 'etl_owner'::regrole"
        )
        .fetchall()
    )
    for name, language, is_definer, source in found:
        declared, _, body = source.partition("begin\n")
        refusal = f"perform etl._fail_altered('etl.{name}'); end if;"
        guard = f"if current_user operator(pg_catalog.<>) 'etl_owner' then {refusal}"
        assert (language, is_definer) == ("plpgsql", True), name
        assert body.lstrip().startswith(guard), name
        assert ":=" not in declared, name
        assert " default " not in declared, name
    assert len(found) >= 6


DEFERRED = """
create table {schema}.watched (n int);
create function {schema}.tell() returns trigger language plpgsql as $$
begin
  insert into {schema}.told values (current_user);
  return null;
end $$;
create table {schema}.told (name text);
grant insert on {schema}.told to public;
create constraint trigger later after insert on {schema}.watched deferrable initially deferred
  for each row execute function {schema}.tell();
"""


def test_a_trigger_that_a_step_defers_runs_as_the_step(pipeline: Pipeline) -> None:
    pipeline.sql(DEFERRED.format(schema="silver"))
    for name in ("a", "b"):
        pipeline.add(name, "insert into silver.watched values (1)", group="g", transaction_scope="per_group")
    check = {"name": "c", "type": "routine", "routine": "silver.writes", "severity": "warn"}
    pipeline.sql(
        "create function silver.writes() returns bigint language plpgsql as $$ begin"
        " insert into silver.watched values (1); set constraints all deferred; return 0; end $$"
    )
    pipeline.add("c", checks=[check])
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert pipeline.column("select name from silver.told") == ["etl_owner"] * 3


def by_hand(session: Connection, *statements: str) -> None:
    with session.transaction():
        for statement in statements:
            session.execute(statement.encode())


def test_a_trigger_that_an_operator_defers_does_not_run_as_the_step(pipeline: Pipeline) -> None:
    """Until 17 a trigger that waits runs as whoever has deferred constraints checked."""
    pipeline.add("good")
    pipeline.apply()
    operator = pipeline.login("etl_operator")
    pipeline.conn.execute(f"create schema theirs authorization {operator.info.user}".encode())
    operator.execute(DEFERRED.format(schema="theirs").encode())
    with refused("PT409", "call.deferred_trigger"):
        by_hand(
            operator,
            "insert into theirs.watched values (1)",
            "select etl._begin_run('{}')",
            "select etl._claim((select max(run_id) from etl.runs), null, false)",
            "select etl._execute_scope((select max(run_id) from etl.runs), 1, 1, etl._change_baseline())",
        )
    with refused("PT409", "call.deferred_trigger"):
        by_hand(operator, "insert into theirs.watched values (1)", "select etl._rehearse('{}')")
    assert operator.execute("select name from theirs.told").fetchall() == []
    operator.execute("drop schema theirs cascade")
    assert pipeline.trace() == []


def test_a_trigger_that_an_admin_defers_does_not_run_as_the_step(pipeline: Pipeline) -> None:
    pipeline.add("good")
    pipeline.apply()
    admin = pipeline.login("etl_admin")
    pipeline.conn.execute(f"create schema theirs authorization {admin.info.user}".encode())
    admin.execute(DEFERRED.format(schema="theirs").encode())
    for call in ("select * from etl.test_procedure('good')", "select etl.rebase_watermark('k', 'x')"):
        with refused("PT409", "call.deferred_trigger"):
            by_hand(admin, "insert into theirs.watched values (1)", call)
    admin.execute("drop schema theirs cascade")


def test_the_source_of_a_watermark_is_read_by_the_step_s_role_and_writes_nothing(pipeline: Pipeline) -> None:
    pipeline.sql(
        f"{ENTERED} create table bronze.rows (id bigint); insert into bronze.rows values (1);"
        " create function bronze.note() returns bigint language plpgsql as $$ begin"
        " insert into silver.who values (current_user); return 1; end $$;"
        " create function bronze.who() returns bigint language plpgsql as $$ begin"
        " if current_user <> 'etl_owner' then raise exception 'read as %', current_user; end if;"
        " return 1; end $$"
    )
    watermark = {"strategy": "id", "source": ["select bronze.who()"], "state_key": "load", "delay_ms": 0}
    pipeline.add("load", arguments="p_since bigint, p_until bigint", watermark=watermark)
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    pipeline.sql(
        "create or replace function bronze.who() returns bigint language sql as 'select bronze.note()'"
    )
    run = pipeline.start()
    assert pipeline.step(run.run_id, "load")["error_code"] == "25006"
    assert pipeline.column("select name from silver.who") == []


def test_the_engine_has_no_right_on_what_steps_read_and_write(db: Database) -> None:
    """Everything a run touches, with only what the documentation has a team grant, to etl_owner alone."""
    conn = db.connect()
    conn.execute(
        "create schema raw; create schema clean;"
        " create table raw.orders (id bigint, at timestamptz default now());"
        " create table clean.orders (id bigint);"
        " create function clean.load(p_since bigint, p_until bigint) returns bigint language sql as"
        " 'with new as (insert into clean.orders select id from raw.orders where id < p_until"
        " and (p_since is null or id >= p_since) returning 1) select count(*) from new';"
        " insert into raw.orders values (1), (2);"
        " grant usage on schema raw, clean to etl_owner; grant select on raw.orders to etl_owner;"
        " grant select, insert on clean.orders to etl_owner;"
        " grant execute on function clean.load to etl_owner"
    )
    assert conn.execute(
        "select has_schema_privilege('etl_engine', 'clean', 'usage'),"
        " pg_has_role('etl_engine', 'etl_owner', 'member'), pg_has_role('etl_owner', 'etl_engine', 'member')"
    ).fetchone() == (False, False, False)
    with Pipeline(db) as pipeline:
        check = {
            "name": "some",
            "type": "not_null",
            "table": "clean.orders",
            "columns": ["id"],
            "severity": "error",
        }
        pipeline.add(
            "load",
            routine="clean.load(bigint, bigint)",
            watermark={"strategy": "id", "source": ["raw.orders.id"], "state_key": "load", "delay_ms": 0,
                       "on_empty": "skip"},
            max_window=1,
            checks=[check],
        )  # fmt: skip
        pipeline.apply()
        operator = pipeline.login("etl_operator")
        assert pipeline.start(operator).status == "succeeded"
        assert pipeline.column("select id from clean.orders order by 1") == [1, 2]
        admin = pipeline.login("etl_admin")
        found: list[Any] = admin.execute(
            "select check_name, status from etl.test_procedure('load')"
        ).fetchall()
        assert ("runs", "ok") in found
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            operator.execute("select * from clean.orders")


def test_running_needs_no_right_on_any_table(pipeline: Pipeline) -> None:
    """The verbs run on what they may be called with; reading tables and views is for people and programs."""
    pipeline.add("flaky", "if nextval('silver.tries') = 1 then raise exception 'no'; end if")
    pipeline.sql("create sequence silver.tries")
    pipeline.add("next", dependencies=["flaky"])
    pipeline.apply()
    pipeline.conn.execute("revoke select on all tables in schema etl from etl_reader")
    operator = pipeline.login("etl_operator")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        operator.execute("select * from etl.runs")
    run = pipeline.start(operator)
    assert run.status == "failed"
    assert operator.execute("call etl.resume_run(%s)", [run.run_id]).fetchone() == (
        run.run_id + 1,
        "succeeded",
    )
    queued = operator.execute("select run_id from etl.submit_run()").fetchone()
    assert operator.execute("call etl.work()").fetchone() == (1,)
    assert queued is not None
    document = operator.execute("select etl.get_run(%s)", queued).fetchone()
    assert document is not None
    assert document[0]["status"] == "succeeded"
    assert pipeline.trace() == ["next", "next"]
