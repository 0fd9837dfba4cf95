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
from tests.pipelines import Background, Gate, Pipeline, Row, messages_of
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


def test_each_month_has_a_partition_made_by_whoever_needs_it_first(pipeline: Pipeline) -> None:
    pipeline.add("a", SAYS)
    pipeline.add("b")
    pipeline.apply()
    assert partitions(pipeline) == []
    pipeline.start()
    now = datetime.now(UTC)
    following = now.replace(year=now.year + now.month // 12, month=now.month % 12 + 1, day=1)
    assert partitions(pipeline) == [f"etl.step_logs_p{one:%Y%m}" for one in (now, following)]
    pipeline.start()
    assert len(partitions(pipeline)) == 2


def test_a_reader_of_the_log_holds_up_no_run(pipeline: Pipeline) -> None:
    """The month to come is made by a later run then; only a month that is needed now is waited for."""
    pipeline.add("a")
    pipeline.apply()
    with pipeline.db.connect(autocommit=False) as reader:
        reader.execute("select * from etl.step_logs")
        assert pipeline.start().status == "succeeded"
        assert partitions(pipeline) == []
        reader.rollback()
    pipeline.start()
    assert len(partitions(pipeline)) == 1


def test_months_change_in_utc_and_at_the_turn_of_the_year(pipeline: Pipeline) -> None:
    pipeline.conn.execute("set timezone = 'Asia/Tokyo'")
    for moment in ("2026-12-31 23:59:59.999999+00", "2027-01-01 00:00:00+00"):
        pipeline.conn.execute("select etl._make_log_partition(%s, true)", [moment])
    assert partitions(pipeline) == ["etl.step_logs_p202612", "etl.step_logs_p202701"]
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
    with pipeline.gate() as gate:
        running = [pipeline.start_in_background(pipeline=f"pipeline_{name}") for name in "ab"]
        gate.wait_for_arrivals(2)
        gate.open()
        assert [one.result().status for one in running] == ["succeeded", "succeeded"]
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
