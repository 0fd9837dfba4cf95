"""What routines have to say: whose it is, that it survives, and how b2s logs shows it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from b2s.cli import main
from b2s.progress import JsonDisplay, LogDisplay, PlainDisplay, level_of, logger
from b2s.render import Style
from tests.pipelines import Background, Gate, Pipeline, Row, messages_of, refused
from tests.processes import b2s
from tests.servers import Connection, Database, Server, wait_until

SAYS = "perform etl.log('info', 'about to begin', '{\"n\": 1}')"
CATCHES = (
    "begin perform etl.log('warning', 'tried in vain'); raise exception 'x';"
    " exception when raise_exception then null; end"
)


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


_COLUMNS: Final = (
    "run_id", "order_index", "attempt", "procedure_name", "level", "message", "is_rolled_back",
)  # fmt: skip


def lines(pipeline: Pipeline) -> list[tuple[Any, ...]]:
    """Whose each line is, what it says, and whether its step was undone."""
    rows = pipeline.rows("select * from etl.step_logs order by log_id")
    return [
        tuple(row[name] for name in _COLUMNS) for row in rows
    ]  # fmt: skip


def left_over(conn: Connection) -> int:
    row = conn.execute("select count(*) from pg_prepared_statements where name like 'b2s%'").fetchone()
    assert row is not None
    count: int = row[0]
    return count


# -- etl.log --


def test_a_line_knows_its_run_and_step_without_being_told(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.add(
        "b", "perform etl.log('ERROR', 'it is odd'); perform etl.log('debug', 'a detail')", dependencies=["a"]
    )
    pipeline.apply()
    pipeline.start()
    pipeline.start()
    assert lines(pipeline) == [
        line
        for run in (1, 2)
        for line in (
            (run, 1, 1, "a", "info", "about to begin", False),
            (run, 2, 1, "b", "error", "it is odd", False),
            (run, 2, 1, "b", "debug", "a detail", False),
        )
    ]
    assert pipeline.column("select data from etl.step_logs where run_id = 1 order by log_id") == [
        {"n": 1},
        None,
        None,
    ]
    step = pipeline.step(1, "a")
    (logged_at,) = pipeline.column("select logged_at from etl.step_logs where run_id = 1 and order_index = 1")
    assert step["started_at"] <= logged_at <= step["ended_at"]
    assert left_over(pipeline.conn) == 0


def test_what_a_step_said_survives_that_it_is_rolled_back(pipeline: Pipeline) -> None:
    pipeline.add(
        "a",
        "insert into silver.trace (step) values ('a'); perform etl.log('error', 'it''s \\ bad: é');"
        " raise exception 'no'",
    )
    pipeline.apply()
    pipeline.start()
    assert pipeline.trace() == []
    assert lines(pipeline) == [(1, 1, 1, "a", "error", "it's \\ bad: é", True)]


def test_what_a_failed_step_said_is_there_while_the_run_goes_on(pipeline: Pipeline) -> None:
    pipeline.add("a", f"{SAYS}; raise exception 'no'")
    pipeline.add("b", Gate.WAIT)
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        assert lines(pipeline) == [(1, 1, 1, "a", "info", "about to begin", True)]
    running.result()


def test_each_attempt_keeps_what_it_said(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.tries")
    pipeline.add("a", "perform etl.log('info', 'try ' || nextval('silver.tries'));"
                      " if currval('silver.tries') < 3 then raise sqlstate '40001'; end if")  # fmt: skip
    pipeline.apply()
    pipeline.start()
    assert [(line[2], line[5], line[6]) for line in lines(pipeline)] == [
        (1, "try 1", True), (2, "try 2", True), (3, "try 3", False),
    ]  # fmt: skip


def test_a_group_that_is_rolled_back_keeps_the_lines_of_all_its_members(pipeline: Pipeline) -> None:
    group: Row = {"group": "g", "transaction_scope": "per_group"}
    pipeline.add("a", SAYS, **group)
    pipeline.add(
        "b", "perform etl.log('info', 'and then'); raise exception 'no'", dependencies=["a"], **group
    )
    pipeline.apply()
    pipeline.start()
    assert [(line[1], line[5], line[6]) for line in lines(pipeline)] == [
        (1, "about to begin", True),
        (2, "and then", True),
    ]


@pytest.mark.parametrize("after", ["", "; raise exception 'no'", f"; {SAYS}"])
def test_a_block_that_is_rolled_back_within_a_step_keeps_what_it_said(pipeline: Pipeline, after: str) -> None:
    pipeline.add("a", CATCHES + after)
    pipeline.apply()
    pipeline.start()
    first = lines(pipeline)[0]
    assert (first[5], first[6]) == ("tried in vain", "no" in after)
    assert left_over(pipeline.conn) == 0


def test_a_check_may_log_too(pipeline: Pipeline) -> None:
    pipeline.routine("fits", f"{SAYS}; return 0")
    pipeline.add(
        "a", checks=[{"name": "fits", "type": "routine", "routine": "silver.fits", "severity": "error"}]
    )
    pipeline.apply()
    pipeline.start()
    assert [line[3] for line in lines(pipeline)] == ["a"]


def test_a_step_that_is_cancelled_keeps_what_it_said(pipeline: Pipeline) -> None:
    pipeline.add("a", f"{SAYS}; {Gate.WAIT}")
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        pipeline.conn.execute("select etl.cancel_run(1, force => true)")
        assert running.result().status == "cancelled"
    assert lines(pipeline) == [(1, 1, 1, "a", "info", "about to begin", True)]


def test_slices_and_chunks_have_lines_of_their_own(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.t (id bigint); insert into bronze.t select generate_series(1, 10)")
    pipeline.add("a", "perform etl.log('info', p_since::text)", arguments="p_since bigint, p_until bigint",
                 watermark={"strategy": "id", "source": ["bronze.t.id"], "state_key": "a"})  # fmt: skip
    pipeline.apply()
    pipeline.conn.execute("call etl.backfill(procedures => '{a}', from_ => '1', until => '11', chunk => '5')")
    assert [(line[1], line[5]) for line in lines(pipeline)] == [(1, "1"), (2, "6")]


def test_of_very_many_lines_all_are_kept_or_the_last_ones(pipeline: Pipeline) -> None:
    many = "for i in 1 .. 2500 loop perform etl.log('info', i::text); end loop"
    pipeline.add("a", many)
    pipeline.add("b", f"{many}; raise exception 'no'")
    pipeline.apply()
    pipeline.start()
    assert [int(line[5]) for line in lines(pipeline) if line[3] == "a"] == list(range(1, 2501))
    assert [int(line[5]) for line in lines(pipeline) if line[3] == "b"] == list(range(2001, 2501))


@pytest.mark.parametrize("strategy", ["timestamp", "id"])
def test_serializable_steps_with_watermarks_log_side_by_side(pipeline: Pipeline, strategy: str) -> None:
    """In tables that the server knows to be tiny, and would rather read whole."""
    kind = {"timestamp": "timestamptz", "id": "bigint"}[strategy]
    pipeline.add("first", "perform pg_advisory_xact_lock_shared(77)")
    for name in "ab":
        pipeline.sql(f"create table bronze.{name} (x {kind})")
        pipeline.add(
            name,
            f"{SAYS}; {Gate.WAIT}",
            isolation="serializable",
            dependencies=["first"],
            arguments=f"p_since {kind}, p_until {kind}",
            watermark={
                "strategy": strategy,
                "source": [f"bronze.{name}.x"],
                "state_key": name,
                "delay_ms": 0,
            },
        )
    pipeline.apply()
    doorman = pipeline.db.connect()
    pipeline.start()  # inserts the rows of the watermarks, as neighbours in a page of their index
    pipeline.conn.execute(
        "vacuum (analyze) etl.procedure_runs, etl.runs, etl.run_scopes, etl.state, etl.state_history"
    )
    for name in "ab":
        pipeline.sql(f"insert into bronze.{name} values ({'now()' if strategy == 'timestamp' else '1'})")
    with pipeline.gate() as gate:
        doorman.execute("select pg_advisory_lock(77)")
        running = pipeline.start_in_background()
        wait_until(pipeline.conn, "select exists (select from etl.procedure_runs where status = 'running')")
        helping = Background(lambda: pipeline.db.connect().execute("call etl.work()"))
        wait_until(pipeline.conn, "select exists (select from etl.run_workers where run_id = 2)")
        doorman.execute("select pg_advisory_unlock(77)")
        gate.wait_for_arrivals(2)
        gate.open()
        assert running.result().status == "succeeded"
        helping.result()
    assert [(s["attempt"], s["error_message"]) for s in pipeline.steps(2)] == [(1, None)] * 3
    assert len(lines(pipeline)) == 4


def test_serializable_steps_log_side_by_side(pipeline: Pipeline) -> None:
    for name in "ab":
        pipeline.add(name, f"{SAYS}; {Gate.WAIT}", isolation="serializable")
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        helping = Background(lambda: pipeline.db.connect().execute("call etl.work()"))
        gate.wait_for_arrivals(2)
        gate.open()
        assert running.result().status == "succeeded"
        helping.result()
    assert [line[2] for line in lines(pipeline)] == [1, 1]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("INFO", "info"),
        ("Warn", "warning"),
        ("critical", "error"),
        ("DEBUG2", "debug"),
        ("verbose", "info"),
        (None, "info"),
    ],
)
def test_an_unknown_level_fails_nothing(pipeline: Pipeline, given: str | None, kept: str) -> None:
    level = "null" if given is None else f"'{given}'"
    pipeline.add("a", f"perform etl.log({level}, 'x'); perform etl.log({level}, null)")
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert [(line[4], line[5]) for line in lines(pipeline)] == [(kept, "x"), (kept, "")]


def test_outside_of_a_step_only_the_client_is_told(pipeline: Pipeline) -> None:
    heard = messages_of(pipeline.conn)
    pipeline.conn.execute("select etl.log('warning', 'by hand')")
    assert [(m.severity, m.text) for m in heard] == [("WARNING", "by hand")]
    assert lines(pipeline) == []
    assert left_over(pipeline.conn) == 0


def test_a_rehearsal_keeps_no_line(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.add("b", f"{SAYS}; raise exception 'no'")
    pipeline.apply()
    pipeline.start(dry_run="execute")
    assert lines(pipeline) == []
    assert left_over(pipeline.conn) == 0


def test_the_client_sees_each_line_at_once(pipeline: Pipeline) -> None:
    heard = messages_of(pipeline.conn)
    pipeline.add(
        "a",
        "perform etl.log('info', 'hello'); perform etl.log('error', 'oh'); perform etl.log('debug', 'psst')",
    )
    pipeline.apply()
    pipeline.start()
    assert [(m.severity, m.text) for m in heard][:2] == [("NOTICE", "[1] a: hello"), ("WARNING", "[1] a: oh")]
    assert not [m for m in heard if "psst" in m.text], "client_min_messages is notice"


def test_a_character_that_the_client_has_not_fails_nothing(pipeline: Pipeline) -> None:
    pipeline.add("a", "perform etl.log('info', 'Łódź €')")
    pipeline.apply()
    conn = pipeline.db.connect(options="-c client_encoding=LATIN1")
    assert pipeline.start(conn).status == "succeeded"
    assert [line[5] for line in lines(pipeline)] == ["Łódź €"]


# -- whose they are --


def test_what_a_client_prepares_under_such_a_name_is_neither_executed_nor_kept(pipeline: Pipeline) -> None:
    """With the rights of the owner it would be."""
    pipeline.add("a", SAYS)
    pipeline.apply()
    operator = pipeline.login("etl_operator")
    for text in (
        "select set_config('b2s.evidence', current_user, false)",
        "select 'bm90IGpzb24='",
        "select 'x'",
        "select 1",
    ):
        operator.execute(f"prepare b2s_log_{abs(hash(text)) % 10**9} as {text}".encode())
    assert pipeline.start(operator).status == "succeeded"
    assert [line[5] for line in lines(pipeline)] == ["about to begin"]
    assert operator.execute("select current_setting('b2s.evidence', true)").fetchone() == (None,)
    assert left_over(operator) == 0


def test_a_setting_of_the_session_makes_nobody_a_step(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.apply()
    reader = pipeline.login("etl_reader")
    pipeline.start()
    for setting in ("1 1 1 a", "x", "99999999999999999999 1 1 a", ""):
        reader.execute("select set_config('b2s.step', %s, false), etl.log('error', 'forged')", [setting])
    assert lines(pipeline) == []


def test_whoever_says_very_much_in_the_name_of_a_step_is_none(pipeline: Pipeline) -> None:
    pipeline.add("a", Gate.WAIT)
    pipeline.apply()
    reader = pipeline.login("etl_reader")
    forge = "select etl.log('error', 'forged') from generate_series(1, 1000)"
    reader.execute("set b2s.step = '1 1 1 a'; set client_min_messages = error")
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        reader.execute(forge)
        gate.open()
        running.result()
    reader.execute(forge)
    assert lines(pipeline) == []
    assert left_over(reader) == 0


def test_whoever_executes_a_run_says_nothing_in_the_name_of_another_session(pipeline: Pipeline) -> None:
    pipeline.add("a", Gate.WAIT)
    pipeline.add(
        "b",
        "perform set_config('b2s.step', '1 1 1 a', true);"
        " perform etl.log('error', 'forged') from generate_series(1, 1500)",
    )
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        helper = pipeline.db.connect(options="-c client_min_messages=error")
        helping = Background(lambda: helper.execute("call etl.work()"))
        wait_until(pipeline.conn, "select count(*) = 1 from etl.procedure_runs where status = 'succeeded'")
        gate.open()
        assert running.result().status == "succeeded"
        helping.result()
    assert lines(pipeline) == []


def prepared(name: str, changes: str = "") -> str:
    """What a routine says to leave a line of its own making."""
    line = (
        "jsonb_build_object('run_id', p_run_id, 'order_index', 1, 'attempt', 1, 'level', 'info',"
        f" 'message', '{name}', 'at', clock_timestamp()){changes}"
    )
    return (
        f"execute format('prepare {name} as select %L',"
        f" replace(encode(convert_to(({line})::text, 'UTF8'), 'base64'), chr(10), ''))"
    )


NO_LINES: Final = (
    """ || '{"level": "loud"}'""", """ || '{"at": "294276-12-31"}'""", """ || '{"at": "infinity"}'""",
    """ || '{"at": "yesterday or so"}'""", """ || '{"at": null}'""", """ || '{"message": null}'""",
    """ || '{"run_id": "x"}'""", """ || '{"run_id": 99}'""", """ || '{"order_index": 2}'""",
    """ || '{"attempt": 12345678901}'""", " - 'at'", " - 'level'", " - 'run_id'", " - 'message'",
)  # fmt: skip


@pytest.mark.parametrize("end", ["", "; raise exception 'no'"])
def test_what_a_step_leaves_under_such_a_name_is_passed_over(pipeline: Pipeline, end: str) -> None:
    body = [
        "execute 'prepare b2s_log_5 as select ' || quote_literal('not base64!')",
        "execute 'prepare b2s_log_6 as select 6'",
        "execute 'prepare b2s_log_60 as select ' || quote_literal('W10=')",
        *(prepared(f"b2s_log_{70 + n}", changes) for n, changes in enumerate(NO_LINES)),
        prepared("b2s_log_99999999999999999999"),
        *(prepared(f"b2s_log_{name}", " || jsonb_build_object('at', now())") for name in ("7", "07")),
        SAYS,
    ]
    pipeline.add("a", "; ".join(body) + end, arguments="p_run_id bigint")
    pipeline.apply()
    run = pipeline.start()
    assert run.status == ("failed" if end else "succeeded")
    assert "b2s_log" not in str(pipeline.step(run.run_id, "a")["error_message"])
    assert len(lines(pipeline)) == 2
    assert {line[5] for line in lines(pipeline)} <= {"b2s_log_7", "b2s_log_07", "about to begin"}
    assert left_over(pipeline.conn) == 0


def test_a_counter_that_a_step_has_spoilt_fails_no_other_one(pipeline: Pipeline) -> None:
    pipeline.add("a", "perform set_config('b2s.log_lines', 'many', false)")
    pipeline.add("b", SAYS, dependencies=["a"])
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert [line[5] for line in lines(pipeline)] == ["about to begin"]


def test_lines_of_a_call_that_was_interrupted_are_not_taken_for_those_of_the_next(pipeline: Pipeline) -> None:
    pipeline.add("a", f"{SAYS}; {Gate.WAIT}")
    pipeline.apply()
    session = pipeline.db.connect()
    session.execute("set statement_timeout = 0")
    session.execute("prepare b2s_log_7 as select 'left behind'")
    with pipeline.gate() as gate:
        gate.open()
        pipeline.start(session)
    assert [line[5] for line in lines(pipeline)] == ["about to begin"]


def test_log_lines_are_append_only(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.apply()
    pipeline.start()
    for statement in (
        "update etl.step_logs set message = 'x'",
        "delete from etl.step_logs",
        "truncate etl.step_logs",
    ):
        with pytest.raises(psycopg.Error) as caught:
            pipeline.conn.execute(statement.encode())
        assert "history.immutable" in (caught.value.diag.message_detail or "")
    for role in ("etl_reader", "etl_operator", "etl_admin"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            pipeline.login(role).execute("insert into etl.step_logs select * from etl.step_logs")


# -- months --


def partitions(pipeline: Pipeline) -> list[str]:
    return pipeline.column(
        "select inhrelid::regclass::text from pg_inherits"
        " where inhparent = 'etl.step_logs'::regclass order by 1"
    )


def this_month_and_the_next() -> list[str]:
    now = datetime.now(UTC)
    following = now.replace(year=now.year + now.month // 12, month=now.month % 12 + 1, day=1)
    return [f"etl.step_logs_p{one:%Y%m}" for one in (now, following)]


def forget_months(pipeline: Pipeline, *names: str) -> None:
    """As if the install had been so long ago."""
    for name in names or this_month_and_the_next():
        pipeline.conn.execute(f"drop table {name}".encode())


def test_an_install_makes_this_month_and_the_next(pipeline: Pipeline) -> None:
    assert partitions(pipeline) == this_month_and_the_next()


def test_each_month_has_a_partition_made_by_whoever_needs_it_first(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.add("b")
    pipeline.apply()
    forget_months(pipeline)
    pipeline.start()
    assert partitions(pipeline) == this_month_and_the_next()
    pipeline.start()
    assert len(partitions(pipeline)) == 2


STRUCTURE: Final = """
with it as (select oid, relname, relowner, relacl from pg_class where oid = %s::text::regclass)
select format('%%s %%s', relowner::regrole, relacl::text) from it
union all
select format('%%s %%s %%s %%s', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
              pg_get_expr(d.adbin, d.adrelid))
  from it join pg_attribute a on a.attrelid = it.oid and a.attnum > 0
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
union all
select replace(pg_get_indexdef(i.indexrelid), it.relname, 'it') from pg_index i join it on i.indrelid = it.oid
union all
select replace(pg_get_triggerdef(t.oid), it.relname, 'it') from pg_trigger t join it on t.tgrelid = it.oid
union all
select format('%%s %%s %%s', k.contype, k.coninhcount, pg_get_constraintdef(k.oid))
  from pg_constraint k join it on k.conrelid = it.oid
order by 1"""


def test_a_month_that_a_run_has_made_is_as_those_of_the_install(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.apply()
    this, following = this_month_and_the_next()
    before = pipeline.column(STRUCTURE, following)
    assert [line for line in before if "TRUNCATE" in line]
    forget_months(pipeline, following)
    pipeline.start(pipeline.login("etl_operator"))
    assert pipeline.column(STRUCTURE, following) == before == pipeline.column(STRUCTURE, this)


def test_a_month_is_append_only_too(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.apply()
    pipeline.start()
    this, _ = this_month_and_the_next()
    for statement in ("update {} set message = 'x'", "delete from {}", "truncate {}"):
        with refused("PT409", "history.immutable"):
            pipeline.conn.execute(statement.format(this).encode())


def test_nobody_waits_for_a_transaction_that_has_made_a_month(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.apply()
    this, following = this_month_and_the_next()
    forget_months(pipeline, following)
    queued = pipeline.value("select run_id from etl.submit_run()")
    impatient = pipeline.db.connect(options="-c lock_timeout=2s")
    with pipeline.db.connect(autocommit=False) as open_end:
        open_end.execute("select etl.cancel_run(%s)", [queued])
        assert pipeline.start(impatient).status == "succeeded"
        assert impatient.execute("select count(*) from etl.run_events where event = 'log'").fetchone() == (1,)
        assert partitions(pipeline) == [this]
    assert partitions(pipeline) == [this, following]


def test_a_reader_of_the_log_does_not_keep_a_month_from_being_made(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.apply()
    forget_months(pipeline)
    with pipeline.db.connect(autocommit=False) as reader:
        reader.execute("select * from etl.step_logs")
        assert pipeline.start(pipeline.db.connect(options="-c lock_timeout=2s")).status == "succeeded"
        assert partitions(pipeline) == this_month_and_the_next()
        assert reader.execute("select count(*) from etl.step_logs").fetchone() == (1,)


def test_a_month_to_come_is_left_to_a_later_run_while_the_log_is_being_changed(pipeline: Pipeline) -> None:
    pipeline.add("a")
    pipeline.apply()
    this, following = this_month_and_the_next()
    forget_months(pipeline, following)
    with pipeline.db.connect(autocommit=False) as other:
        other.execute("lock table only etl.step_logs in share update exclusive mode")
        assert pipeline.start(pipeline.db.connect(options="-c lock_timeout=2s")).status == "succeeded"
        assert partitions(pipeline) == [this]
        other.rollback()
    pipeline.start()
    assert partitions(pipeline) == [this, following]


def test_months_change_in_utc_and_at_the_turn_of_the_year(pipeline: Pipeline) -> None:
    pipeline.conn.execute("set timezone = 'Asia/Tokyo'")
    for moment in ("2026-12-31 23:59:59.999999+00", "2027-01-01 00:00:00+00"):
        pipeline.conn.execute("select etl._make_log_partition(%s, true)", [moment])
    assert {"etl.step_logs_p202612", "etl.step_logs_p202701"} <= set(partitions(pipeline))
    for moment, month in (("2026-12-31 23:59:59.999999+00", "202612"), ("2027-01-01 00:00:00+00", "202701")):
        (found,) = pipeline.column(
            "insert into etl.step_logs"
            " (logged_at, run_id, order_index, attempt, procedure_name, level, message, is_rolled_back)"
            " values (%s, 1, 1, 1, 'a', 'info', 'x', false) returning tableoid::regclass::text",
            moment,
        )
        assert found == f"etl.step_logs_p{month}"


def test_runs_that_make_the_same_month_wait_for_each_other(pipeline: Pipeline) -> None:
    for name in "ab":
        with Pipeline(pipeline.db, f"pipeline_{name}") as other:
            other.add(name, f"{SAYS}; {Gate.WAIT}")
            other.apply()
    forget_months(pipeline)
    with pipeline.gate() as gate:
        running = [pipeline.start_in_background(pipeline=f"pipeline_{name}") for name in "ab"]
        gate.wait_for_arrivals(2)
        gate.open()
        ids = [one.result().run_id for one in running]
    assert [s["error_message"] for run_id in ids for s in pipeline.steps(run_id)] == [None, None]
    assert len(lines(pipeline)) == 2
    assert len(partitions(pipeline)) == 2


# -- b2s logs --


def shown(capsys: pytest.CaptureFixture[str], pipeline: Pipeline, *words: str) -> list[Row]:
    assert main(["logs", *words, "--dsn", pipeline.db.dsn]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_logs_brings_events_and_lines_together_in_order(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.add("a", SAYS)
    pipeline.add("b", "perform etl.log('error', 'bad'); raise exception 'no'", dependencies=["a"])
    pipeline.apply()
    pipeline.start()
    found = shown(capsys, pipeline)
    assert [one["event"] for one in found] == [
        "run_started", "step_started", "log", "step_succeeded", "step_started", "log", "step_failed",
        "run_failed",
    ]  # fmt: skip
    assert found == shown(capsys, pipeline, "1")
    first, second = (one for one in found if one["event"] == "log")
    assert (first["message"], first["data"], first["level"], "is_rolled_back" in first) == (
        "about to begin",
        {"n": 1},
        "info",
        False,
    )
    assert (second["message"], second["level"], second["is_rolled_back"]) == ("bad", "error", True)
    assert [one["event"] for one in shown(capsys, pipeline, "--level", "warning")] == [
        "log",
        "step_failed",
        "run_failed",
    ]


def test_logs_for_people_say_the_same(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.add("a", SAYS)
    pipeline.apply()
    pipeline.start()
    assert main(["logs", "--log-format", "console", "--dsn", pipeline.db.dsn]) == 0
    printed = capsys.readouterr().out
    assert "message='about to begin'" in printed
    assert "{" not in printed.replace("data={'n': 1}", "")


def test_follow_ends_with_its_run_and_shows_each_event_once(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a", SAYS)
    pipeline.add("b", f"{SAYS}; {Gate.WAIT}", dependencies=["a"])
    pipeline.apply()
    with pipeline.gate() as gate:
        running = pipeline.start_in_background()
        gate.wait_for_arrivals()
        with b2s(tmp_path, pipeline.db.dsn, "logs", "latest", "--follow") as command:
            command.wait_for_output("step_started", 2)
            assert command.out.count('"event": "log"') == 1, "b has not ended"
            gate.open()
            running.result()
            assert command.end() == 0
            events = [json.loads(line)["event"] for line in command.out.splitlines()]
    assert sorted(events) == sorted(
        [
            "run_started",
            "step_started",
            "log",
            "step_succeeded",
            "step_started",
            "log",
            "step_succeeded",
            "run_succeeded",
        ]
    )


def test_follow_without_a_run_shows_what_begins_and_lives_through_a_restart(
    private_server: Server, tmp_path: Path
) -> None:
    db = private_server.create_database(template=private_server.migrated_template())
    with Pipeline(db) as pipeline:
        pipeline.add("a", SAYS)
        pipeline.apply()
        pipeline.start()
        with b2s(tmp_path, db.dsn, "logs", "--follow") as command:
            wait_until(
                pipeline.conn,
                "select exists (select from pg_stat_activity where application_name = 'b2s'"
                " and state = 'idle' and query like '%run_events%')",
            )
            pipeline.start()
            command.wait_for_output('"event": "run_succeeded"', 1)
            db.connections.clear()
            pipeline.conn.close()
            private_server.restart("immediate")
            command.wait_for("trying again")
            pipeline.conn = db.connect()
            third = pipeline.start().run_id
            command.wait_for_output('"event": "run_succeeded"', 2)
            assert {json.loads(line)["run_id"] for line in command.out.splitlines()} == {2, third}
            command.send(signal.SIGINT)
            assert command.end() == 130
    db.drop()


def test_follow_of_a_run_that_is_not_there_is_refused(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", "7", "--follow", "--dsn", pipeline.db.dsn]) == 3
    assert "there is no run 7" in capsys.readouterr().err
    assert main(["logs", "latest", "--follow", "--dsn", make_conninfo("host=127.0.0.1 port=1")]) == 3


# -- while a run goes on --


def test_run_shows_the_lines_of_routines_while_they_are_said(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.add("a", f"{SAYS}; {Gate.WAIT}")
    pipeline.apply()
    with pipeline.gate() as gate, b2s(tmp_path, pipeline.db.dsn, "run") as command:
        gate.wait_for_arrivals()
        command.wait_for("[1] a: about to begin")
        gate.open()
        assert command.end() == 0


def test_each_display_shows_a_line_of_a_routine(tmp_path: Path) -> None:
    event = {"event": "log", "run_id": 1, "order_index": 2, "attempt": 1, "procedure": "a",
             "level": "warning", "message": "odd\x1b[31m", "data": {"n": 1}}  # fmt: skip
    assert level_of(event) == "warning"
    path = tmp_path / "out"
    with path.open("w") as stream:
        PlainDisplay(stream, Style()).event(event)
        JsonDisplay(stream).event(event)
        LogDisplay("json", stream).event(event)
        logger("json", stream)
    plain, raw, logged = path.read_text().splitlines()
    assert plain == "[2] a: odd\ufffd[31m"
    assert json.loads(raw) == event
    assert json.loads(logged).items() >= {"event": "log", "level": "warning", "procedure": "a"}.items()
