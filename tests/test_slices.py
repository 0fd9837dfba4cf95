"""max_window: a long window is read in slices, each with its own transaction, attempt and watermark step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import psycopg
import pytest

from tests.pipelines import Gate, Pipeline, messages_of, refused
from tests.servers import Database

COPY = "insert into silver.copy select e.* from bronze.events e where "
SINCE = "(p_since is null or {column} >= p_since) and {column} < p_until"
DAYS = "insert into bronze.events (at) select timestamptz '2026-01-01 00:00+00' + n * interval '1 hour'"


@pytest.fixture
def events(db: Database) -> Iterator[Pipeline]:
    """Bronze: 96 hours of events, one an hour, in one transaction each, from 2026-01-01."""
    with Pipeline(db) as pipeline:
        fill(pipeline)
        yield pipeline


def fill(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create table bronze.events (id bigint generated always as identity primary key, at timestamptz,"
        " etl_xid xid8 not null default pg_current_xact_id());"
        "create index on bronze.events (at); create index on bronze.events (etl_xid);"
        "create table silver.copy (id bigint, at timestamptz, etl_xid xid8)"
    )
    with pipeline.db.connect() as conn:
        for hour in range(96):
            conn.execute(f"{DAYS} from generate_series({hour}, {hour}) n".encode())


def add(pipeline: Pipeline, strategy: str, max_window: object, guard: str = "", **settings: object) -> None:
    """A procedure that copies the window, after a statement that may refuse it."""
    column, kind = {
        "timestamp": ("at", "timestamptz"), "id": ("id", "bigint"), "xid": ("etl_xid", "pg_snapshot"),
    }[strategy]  # fmt: skip
    where = "etl.arrived(e.etl_xid, p_since, p_until)" if strategy == "xid" else SINCE.format(column=column)
    pipeline.add(
        "copy",
        f"{guard} {COPY}{where}",
        arguments=f"p_mode text, p_since {kind}, p_until {kind}",
        watermark={"strategy": strategy, "source": [f"bronze.events.{column}"], "state_key": "copy"},
        max_window=max_window,
        **settings,
    )
    pipeline.apply()


def assert_copied(pipeline: Pipeline) -> None:
    """Every event is in Silver exactly once."""
    assert pipeline.rows("select id from silver.copy order by id") == pipeline.rows(
        "select id from bronze.events order by id"
    )


@pytest.mark.parametrize(("strategy", "width"), [("timestamp", "1 day"), ("id", 24), ("xid", 24)])
def test_a_long_window_is_read_in_slices(events: Pipeline, strategy: str, width: object) -> None:
    add(events, strategy, width)
    run = events.start()
    assert run.status == "succeeded"
    attempts = events.steps(run.run_id)
    read = [a for a in attempts if a["rows_affected"]]
    assert [a["status"] for a in attempts] == ["advanced"] * (len(attempts) - 1) + ["succeeded"]
    assert [a["slice_index"] for a in attempts] == list(range(1, len(attempts) + 1))
    assert len(read) >= 4
    assert max(a["rows_affected"] for a in read) <= 24
    assert attempts[0]["window_since"] is None
    for earlier, later in pairwise(attempts):
        assert earlier["window_until"] == later["window_since"]
    assert (
        {a["window_goal"] for a in attempts} == {attempts[-1]["window_until"]} == {events.watermark("copy")}
    )
    moves = events.column("select new_watermark from etl.state_history order by state_history_id")
    assert moves == [a["window_until"] for a in attempts]
    assert_copied(events)
    assert events.start().status == "succeeded"
    assert_copied(events)


def test_years_without_rows_take_no_slice(events: Pipeline) -> None:
    events.sql("insert into bronze.events (at) values ('1999-12-31 23:00+00')")
    add(events, "timestamp", "1 day")
    run = events.start()
    assert len(events.steps(run.run_id)) <= 7
    assert_copied(events)


def test_a_failing_slice_keeps_those_before_it(events: Pipeline) -> None:
    add(events, "id", 24, "if p_since = 49 then raise 'no'; end if;")
    run = events.start()
    assert run.status == "failed"
    assert [a["status"] for a in events.steps(run.run_id)] == ["advanced", "advanced", "failed"]
    assert events.value("select count(*) from silver.copy") == 48
    assert events.watermark("copy") == "49"
    events.routine("copy", COPY + SINCE.format(column="id"), "p_mode text, p_since bigint, p_until bigint")
    assert events.start().status == "succeeded"
    assert_copied(events)


def test_a_slice_that_runs_out_of_a_resource_is_halved(events: Pipeline) -> None:
    guard = (
        "if (select count(*) > 10 from bronze.events"
        " where (p_since is null or id >= p_since) and id < p_until)"
        " then raise 'out of memory' using errcode = '53200'; end if;"
    )
    add(events, "id", 64, guard)
    run = events.start()
    assert run.status == "succeeded"
    attempts = events.steps(run.run_id)
    assert [a["status"] for a in attempts[:4]] == ["retrying", "retrying", "retrying", "advanced"]
    assert {a["error_class"] for a in attempts[:3]} == {"resource"}
    assert {a["slice_index"] for a in attempts[:4]} == {1}
    assert all(a["rows_affected"] == 8 for a in attempts[3:-1])
    assert_copied(events)


def test_a_single_row_that_runs_out_of_a_resource_fails_in_the_end(events: Pipeline) -> None:
    add(events, "id", 64, "raise 'disk full' using errcode = '53100';")
    run = events.start()
    assert run.status == "failed"
    attempts = events.steps(run.run_id)
    assert [a["status"] for a in attempts] == ["retrying"] * (len(attempts) - 1) + ["failed"]
    assert len(attempts) == 7
    assert events.watermark("copy") is None


def test_each_slice_has_the_attempts_of_a_step(events: Pipeline) -> None:
    """A passing error in every slice: three attempts each, not three in all."""
    events.sql("create sequence silver.tries")
    guard = "if nextval('silver.tries') % 2 = 1 then raise 'deadlock' using errcode = '40P01'; end if;"
    add(events, "id", 16, guard)
    run = events.start()
    assert run.status == "succeeded"
    assert {a["slice_index"] for a in events.steps(run.run_id) if a["status"] == "retrying"} == set(
        range(1, 7)
    )
    assert_copied(events)


def test_what_depends_on_a_sliced_step_starts_after_its_last_slice(events: Pipeline) -> None:
    add(events, "id", 24)
    events.add(
        "after", "insert into silver.trace (step) select count(*) from silver.copy", dependencies=["copy"]
    )
    events.apply()
    run = events.start()
    assert run.status == "succeeded"
    assert events.trace() == ["96"]


def test_a_cancel_between_slices_keeps_what_was_committed(events: Pipeline) -> None:
    add(events, "id", 24, f"if p_since = 25 then {Gate.WAIT}; end if;")
    with events.gate() as gate:
        started = events.start_in_background()
        gate.wait_for_arrivals()
        events.conn.execute("select etl.cancel_run(run_id, reason => 'enough') from etl.runs")
        gate.open()
        run = started.result()
    assert run.status == "cancelled"
    assert [a["skip_reason"] or a["status"] for a in events.steps(run.run_id)] == [
        "advanced", "advanced", "cancelled",
    ]  # fmt: skip
    assert events.watermark("copy") == "49"
    assert events.start().status == "succeeded"
    assert_copied(events)


def test_a_full_refresh_is_read_in_one_piece(events: Pipeline) -> None:
    add(events, "id", 24, "if p_mode = 'full' then delete from silver.copy; end if;", allow_full_refresh=True)
    events.start()
    run = events.start(mode="full", confirm_full_refresh=True, reason="anew")
    assert [a["status"] for a in events.steps(run.run_id)] == ["succeeded"]
    assert_copied(events)


def test_clients_are_told_of_every_slice(events: Pipeline) -> None:
    add(events, "id", 48)
    received = messages_of(events.conn)
    events.start()
    texts = [m.text for m in received]
    assert texts[0].startswith("[1] copy advanced 48 rows in ")
    assert texts[0].endswith("slice 1, up to 49")
    assert texts[1].startswith("[1] copy succeeded 48 rows in ")


def test_the_plan_says_how_far_the_first_slice_goes(events: Pipeline) -> None:
    add(events, "id", 24)
    (step,) = events.plan()
    assert step["window_until"] == "97"
    assert "read in slices, the first one up to 25" in step["notes"]


def test_max_window_needs_columns(events: Pipeline) -> None:
    events.add(
        "copy",
        arguments="p_until bigint",
        watermark={"strategy": "id", "source": ["select max(id) from bronze.events"], "state_key": "copy"},
        max_window=5,
    )
    with refused("PT422", "config.invalid") as refusal:
        events.apply()
    assert refusal.messages == [
        "max_window needs columns as source of the watermark: a query does not say where the rows are"
    ]


def test_slices_survive_the_death_of_their_session(events: Pipeline, db: Database) -> None:
    add(events, "id", 24, f"if p_since = 25 then {Gate.WAIT}; end if;")
    with events.gate() as gate:
        started = events.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        db.connect().execute("select pg_terminate_backend(%s, 10000)", [pid])
        with pytest.raises(psycopg.OperationalError):
            started.result()
    assert events.start().status == "succeeded"
    assert_copied(events)
