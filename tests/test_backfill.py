"""A past range read again in chunks, beside the runs: exact, resumable, and without moving a watermark."""

from __future__ import annotations

import io
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from b2s.backfillview import LiveBackfillDisplay, PlainBackfillDisplay
from b2s.cli import main
from b2s.errors import DatabaseError
from b2s.migrate import migrate
from b2s.render import Style
from tests.pipelines import Background, Gate, Pipeline, Row, Run, call, messages_of, refused
from tests.servers import Connection, Database, wait_until

OBJECTS: Final = """
create table bronze.events (
  id bigint primary key, at timestamptz not null, etl_xid xid8 not null default pg_current_xact_id(),
  value int not null);
create index on bronze.events (at);
create index on bronze.events (etl_xid);
create table silver.rows (step text, id bigint, value int, reads int, primary key (step, id));
create function silver.trouble(step text, since text, run_id bigint) returns void language plpgsql as $$
begin end $$;
"""
TYPES: Final = {"timestamp": "timestamptz", "id": "bigint", "xid": "pg_snapshot"}
COLUMNS: Final = {"timestamp": "at", "id": "id", "xid": "etl_xid"}
WINDOWS: Final = {
    "timestamp": "(p_since is null or e.at >= p_since) and e.at < p_until",
    "id": "(p_since is null or e.id >= p_since) and e.id < p_until",
    "xid": "etl.arrived(e.etl_xid, p_since, p_until)",
}
WAITS_FOR_ITS_PROCEDURE: Final = """
select true from pg_locks where locktype = 'advisory' and classid = 6435445 and not granted
   and database = (select oid from pg_database where datname = current_database())"""
NUMBERS: Final[Row] = {"from_": "1", "until": "11", "chunk": "1"}
"""Ten chunks of the rows of `numbers`."""
DAYS: Final[Row] = {"from_": "2024-01-01 00:00+00", "until": "2024-01-11 00:00+00", "chunk": "1 day"}
"""Ten chunks of the rows of `days`."""


def body(strategy: str, name: str) -> str:
    """Reads its window, then trouble may come, then writes what it has read."""
    return (
        f"create temp table if not exists taken_{name} (id bigint, value int) on commit drop;"
        f" insert into taken_{name} select e.id, e.value from bronze.events e where {WINDOWS[strategy]};"
        f" perform silver.trouble('{name}', p_since::text, p_run_id);"
        f" insert into silver.rows select '{name}', t.id, t.value, 1 from taken_{name} t"
        " on conflict (step, id) do update set value = excluded.value, reads = rows.reads + 1"
    )


def add(pipeline: Pipeline, name: str, strategy: str = "timestamp", **settings: Any) -> None:
    """A procedure that reads bronze.events by time, id or transaction."""
    kind = TYPES[strategy]
    pipeline.add(
        name,
        body(strategy, name),
        arguments=f"p_since {kind}, p_until {kind}, p_run_id bigint",
        watermark={
            "strategy": strategy,
            "source": [f"bronze.events.{COLUMNS[strategy]}"],
            "state_key": name,
            "delay_ms": 0,
        },
        **settings,
    )


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql(OBJECTS)
        yield pipeline


@pytest.fixture
def days(pipeline: Pipeline) -> Pipeline:
    """A procedure `load`, and a row at noon of each of the first ten days of 2024."""
    add(pipeline, "load")
    pipeline.apply()
    pipeline.sql(
        "insert into bronze.events (id, at, value) select n,"
        " timestamptz '2023-12-31 12:00+00' + n * interval '24 hours', n from generate_series(1, 10) n"
    )
    return pipeline


@pytest.fixture
def numbers(pipeline: Pipeline) -> Pipeline:
    """A procedure `load` that reads by id, and ten rows."""
    add(pipeline, "load", "id")
    pipeline.apply()
    pipeline.sql("insert into bronze.events (id, at, value) select n, now(), n from generate_series(1, 10) n")
    return pipeline


def backfill(pipeline: Pipeline, conn: Connection | None = None, **arguments: Any) -> Run:
    """`call etl.backfill` with these arguments."""
    row = (conn or pipeline.conn).execute(*call("etl.backfill", arguments)).fetchone()
    assert row is not None
    return Run(*row)


def in_background(pipeline: Pipeline, conn: Connection | None = None, **arguments: Any) -> Background:
    conn = conn or pipeline.db.connect()
    return Background(lambda: backfill(pipeline, conn, **arguments))


def plan(pipeline: Pipeline, **arguments: Any) -> list[tuple[str, str, str]]:
    """`etl.plan_backfill`: procedure, since and until of each chunk."""
    rows = pipeline.conn.execute(*call("etl.plan_backfill", arguments, "select * from")).fetchall()
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    return [(row[1], row[2], row[3]) for row in rows]


def trouble(pipeline: Pipeline, statements: str) -> None:
    """Every step does this between reading and writing; it knows `step`, `since`, `run_id`, `is_backfill`."""
    pipeline.sql(
        "create or replace function silver.trouble(step text, since text, run_id bigint) returns void"
        " language plpgsql as $$ declare is_backfill boolean :="
        " (select r.kind = 'backfill' from etl.runs r where r.run_id = trouble.run_id);"
        f" begin {statements}; end $$"
    )


def reads(pipeline: Pipeline, step: str = "load") -> dict[int, int]:
    """How often each row was written."""
    return {
        row["id"]: row["reads"] for row in pipeline.rows("select * from silver.rows where step = %s", step)
    }


def statuses(pipeline: Pipeline, run_id: int) -> list[str]:
    """The last status of each chunk, in order."""
    return pipeline.column(
        "select distinct on (order_index) status::text from etl.procedure_runs where run_id = %s"
        " order by order_index, attempt desc",
        run_id,
    )


def progress(pipeline: Pipeline, run_id: int) -> Row:
    return pipeline.rows("select * from etl.backfill_progress where run_id = %s", run_id)[0]


def active_backfill(pipeline: Pipeline) -> int:
    run_id: int = wait_until(
        pipeline.conn, "select run_id from etl.runs where status = 'running' and kind = 'backfill'"
    )
    return run_id


# -- what is read --


def test_a_range_of_times_is_read_exactly_once_from_inclusive_until_exclusive(days: Pipeline) -> None:
    days.sql(
        "insert into bronze.events (id, at, value) values (20, '2024-01-03 00:00+00', 0),"
        " (21, '2024-01-06 00:00+00', 0), (22, '2024-01-02 23:59:59.999999+00', 0),"
        " (23, '2024-01-04 00:00+00', 0), (24, '2024-01-05 23:59:59.999999+00', 0)"
    )
    run = backfill(
        days, procedures=["load"], from_="2024-01-03 00:00+00", until="2024-01-06 00:00+00", chunk="5h"
    )
    assert run.status == "succeeded"
    assert reads(days) == {3: 1, 4: 1, 5: 1, 20: 1, 23: 1, 24: 1}
    assert progress(days, run.run_id)["rows_affected"] == 6


def test_a_range_of_ids_is_read_exactly_once_from_inclusive_until_exclusive(pipeline: Pipeline) -> None:
    add(pipeline, "load", "id")
    pipeline.apply()
    pipeline.sql(
        "insert into bronze.events (id, at, value) select n, now(), n from generate_series(-50, 500) n"
    )
    run = backfill(pipeline, procedures=["load"], from_="-10", until="123", chunk="7")
    assert run.status == "succeeded"
    assert reads(pipeline) == dict.fromkeys(range(-10, 123), 1)
    assert pipeline.run(run.run_id)["step_count"] == 19


def test_a_range_of_transactions_is_read_exactly_once_from_inclusive_until_exclusive(
    pipeline: Pipeline,
) -> None:
    add(pipeline, "load", "xid")
    pipeline.apply()
    for number in range(40):
        pipeline.sql(f"insert into bronze.events (id, at, value) values ({number}, now(), 0)")
    xids = pipeline.column("select etl_xid::text from bronze.events order by id")
    assert len(set(xids)) == 40
    run = backfill(pipeline, procedures=["load"], from_=xids[5], until=xids[30], chunk="4")
    assert run.status == "succeeded"
    assert reads(pipeline) == dict.fromkeys(range(5, 30), 1)
    assert len(pipeline.steps(run.run_id)) < 26


@pytest.mark.parametrize("strategy", ["timestamp", "id", "xid"])
def test_by_default_everything_up_to_the_watermark_is_read(pipeline: Pipeline, strategy: str) -> None:
    add(pipeline, "load", strategy)
    pipeline.apply()
    pipeline.sql(
        "insert into bronze.events (id, at, value)"
        " select n, now() - interval '1 hour' - n * interval '1 minute', n from generate_series(1, 100) n"
    )
    assert pipeline.start().status == "succeeded"
    watermark = pipeline.watermark("load")
    pipeline.sql("insert into bronze.events (id, at, value) values (1000, now(), 0)")
    run = backfill(pipeline, procedures=["load"], chunk="30 minutes" if strategy == "timestamp" else "40")
    assert run.status == "succeeded"
    # Transactions of other databases may be open below the watermark: it is complete up to the first.
    below = (
        "etl_xid < pg_snapshot_xmin(%s::pg_snapshot)"
        if strategy == "xid"
        else "%s::text is not null and id <= 100"
    )
    expected = dict(
        pipeline.conn.execute(
            f"select id, 1 + ({below})::int from bronze.events where id <= 100".encode(), [watermark]
        )
    )
    assert reads(pipeline) == expected
    assert pipeline.watermark("load") == watermark
    assert pipeline.value("select count(*) from etl.state_history") == 1


def test_chunks_without_a_row_are_left_out_and_the_others_stay_on_the_grid(days: Pipeline) -> None:
    days.sql("delete from bronze.events where id in (2, 3, 4, 8)")
    days.sql("insert into bronze.events (id, at, value) values (99, '2031-05-05 05:05+00', 0)")
    chunks = plan(days, procedures=["load"], **{**DAYS, "until": "2040-01-01 00:00+00"})
    assert [since[:10] for _, since, _ in chunks] == [
        "2024-01-01", "2024-01-05", "2024-01-06", "2024-01-07", "2024-01-09", "2024-01-10", "2031-05-05",
    ]  # fmt: skip
    assert {since[10:19] for _, since, _ in chunks} == {"T00:00:00"}


def test_months_keep_their_day_whatever_their_length(days: Pipeline) -> None:
    days.sql(
        "insert into bronze.events (id, at, value) select 100 + n,"
        " timestamptz '2024-01-31 00:00+00' + n * interval '1 day', 0 from generate_series(0, 3000) n"
    )
    days.conn.execute("set timezone = 'UTC'")
    arguments = {"from_": "2024-01-31 00:00+00", "until": "2032-01-31 00:00+00", "chunk": "1 month"}
    chunks = plan(days, procedures=["load"], **arguments)
    assert [until[:10] for _, _, until in chunks][:4] == [
        "2024-02-29",
        "2024-03-31",
        "2024-04-30",
        "2024-05-31",
    ]
    assert len(chunks) == 96
    assert [since for _, since, _ in chunks[1:]] == [until for _, _, until in chunks[:-1]]


def test_a_day_is_a_day_of_the_time_zone_of_the_session(days: Pipeline) -> None:
    days.sql(
        "insert into bronze.events (id, at, value) select 100 + n,"
        " timestamptz '2024-03-29 00:00+00' + n * interval '1 hour', 0 from generate_series(0, 120) n"
    )
    days.conn.execute("set timezone = 'Europe/Berlin'")
    chunks = plan(days, procedures=["load"], from_="2024-03-30", until="2024-04-02", chunk="1d")
    assert [since for _, since, _ in chunks] == [
        "2024-03-30T00:00:00+01:00", "2024-03-31T00:00:00+01:00", "2024-04-01T00:00:00+02:00",
    ]  # fmt: skip


def test_without_an_index_on_the_source_no_chunk_is_left_out(days: Pipeline) -> None:
    days.sql("drop index bronze.events_at_idx; delete from bronze.events where id in (2, 3)")
    assert len(plan(days, procedures=["load"], **DAYS)) == 10
    run = backfill(days, procedures=["load"], **DAYS)
    assert reads(days) == dict.fromkeys([1, 4, 5, 6, 7, 8, 9, 10], 1)
    assert statuses(days, run.run_id) == ["succeeded"] * 10


def test_with_several_sources_a_row_in_any_of_them_makes_a_chunk(days: Pipeline) -> None:
    days.sql(
        "create table bronze.late (at timestamp); create index on bronze.late (at);"
        "insert into bronze.late values ('2024-01-20 12:00')"
    )
    watermark = {**days.procedures[0]["watermark"], "source": ["bronze.late.at", "bronze.events.at"]}
    days.change("load", watermark=watermark)
    days.conn.execute("set timezone = 'UTC'; set datestyle = 'German'")
    chunks = plan(days, procedures=["load"], **{**DAYS, "until": "2024-02-01 00:00+00"})
    assert [since[8:10] for _, since, _ in chunks] == [*(f"{n:02}" for n in range(1, 11)), "20"]
    assert (
        plan(days, procedures=["load"], until=DAYS["until"], chunk="10d")[0][1] == "2024-01-01T12:00:00+00:00"
    )


def test_a_range_without_a_row_is_a_backfill_of_no_chunk(days: Pipeline) -> None:
    run = backfill(days, procedures=["load"], from_="1999-01-01", until="2000-01-01", chunk="1 day")
    assert run.status == "succeeded"
    assert (days.steps(run.run_id), progress(days, run.run_id)["chunks_total"]) == ([], 0)


def test_one_procedure_is_done_before_the_next_in_the_order_of_dependencies(days: Pipeline) -> None:
    add(days, "a_child", dependencies=["load"])
    days.apply()
    run = backfill(days, procedures=["a_child", "load"], **{**DAYS, "chunk": "5 days"})
    assert [step["procedure_name"] for step in days.steps(run.run_id)] == [
        "load",
        "load",
        "a_child",
        "a_child",
    ]
    assert reads(days, "a_child") == reads(days) == dict.fromkeys(range(1, 11), 1)


def test_the_plan_shows_what_is_then_done_and_writes_nothing(days: Pipeline) -> None:
    chunks = plan(days, procedures=["load"], **DAYS)
    assert days.value("select count(*) from etl.runs") == 0
    run = backfill(days, procedures=["load"], **DAYS)
    done = [(s["procedure_name"], s["window_since"], s["window_until"]) for s in days.steps(run.run_id)]
    assert done == chunks


def test_parameters_reach_every_chunk(pipeline: Pipeline) -> None:
    pipeline.add(
        "load",
        "insert into silver.rows values ('load', extract(day from p_since), factor, 1)",
        arguments="p_since timestamptz, p_until timestamptz, factor int",
        params=[{"name": "factor", "type": "integer", "required": True}],
        watermark={
            "strategy": "timestamp",
            "source": ["bronze.events.at"],
            "state_key": "load",
            "delay_ms": 0,
        },
    )
    pipeline.apply()
    pipeline.sql(
        "insert into bronze.events (id, at, value) values (1, '2024-01-01', 0), (2, '2024-01-02', 0)"
    )
    with refused("PT422", "params.invalid"):
        backfill(pipeline, procedures=["load"], **DAYS)
    run = backfill(pipeline, procedures=["load"], params={"load": {"factor": 7}}, **DAYS)
    assert pipeline.column("select value from silver.rows") == [7, 7]
    assert pipeline.run(run.run_id)["parameters"] == {"load": {"factor": 7}}


def test_five_thousand_chunks_are_planned_and_stored_without_delay(days: Pipeline) -> None:
    days.sql(
        "insert into bronze.events (id, at, value) select 100 + n,"
        " timestamptz '2000-01-01 00:00+00' + n * interval '1 day', 0 from generate_series(0, 4999) n"
    )
    days.sql(
        "create or replace function silver.load(p_since timestamptz, p_until timestamptz, p_run_id bigint)"
        " returns bigint language sql as 'select 1::bigint'"
    )
    arguments = {"from_": "2000-01-01 00:00+00", "until": "2013-09-09 00:00+00", "chunk": "1 day"}
    started = time.monotonic()
    chunks = plan(days, procedures=["load"], **arguments)
    assert len(chunks) == 5000
    assert time.monotonic() - started < 10
    with days.db.connect() as conn:
        conn.execute("set client_min_messages = warning")
        run = backfill(days, conn, procedures=["load"], **arguments)
    assert (run.status, progress(days, run.run_id)["chunks_done"]) == ("succeeded", 5000)


def test_the_bounds_that_were_found_are_kept_with_the_request(numbers: Pipeline) -> None:
    numbers.start()
    run = backfill(numbers, procedures=["load"], chunk="4")
    request = numbers.run(run.run_id)["request"]
    assert (request["from"], request["until"], request["strategy"]) == ("1", "11", "id")
    seen = progress(numbers, run.run_id)
    assert (seen["from_"], seen["until"], seen["chunks_total"]) == ("1", "11", 3)


# -- beside the runs --


def test_a_run_goes_on_beside_a_backfill_and_only_the_run_moves_the_watermark(numbers: Pipeline) -> None:
    add(numbers, "other", "id")
    numbers.apply()
    assert numbers.start().status == "succeeded"
    assert numbers.watermark("load") == "11"
    trouble(numbers, f"if is_backfill then {Gate.WAIT}; end if")
    numbers.sql("insert into bronze.events (id, at, value) values (50, now(), 0)")
    with numbers.gate() as gate:
        started = in_background(numbers, procedures=["load"], **NUMBERS)
        gate.wait_for_arrivals()
        assert numbers.start(procedures=["other"]).status == "succeeded"
        assert reads(numbers, "other") == {**dict.fromkeys(range(1, 11), 1), 50: 1}
        live = numbers.start_in_background(procedures=["load"])
        wait_until(numbers.conn, WAITS_FOR_ITS_PROCEDURE)
        assert numbers.watermark("load") == "11"
        gate.open()
        assert (live.result().status, started.result().status) == ("succeeded", "succeeded")
    assert reads(numbers) == {**dict.fromkeys(range(1, 11), 2), 50: 1}
    moves = "select new_watermark || ' by ' || kind from etl.state_history join etl.runs using (run_id)"
    moves += " where state_key = 'load' order by state_history_id"
    assert numbers.column(moves) == ["11 by run", "51 by run"]


def test_a_chunk_does_not_write_an_older_row_over_the_newer_one_of_a_run(pipeline: Pipeline) -> None:
    """The chunk has read the row; then it is updated, and a run that began later reads and writes it."""
    add(pipeline, "load", "xid")
    pipeline.apply()
    pipeline.sql("insert into bronze.events (id, at, value) values (5, now(), 1)")
    assert pipeline.start().status == "succeeded"
    xid = pipeline.value("select etl_xid::text::bigint from bronze.events")
    trouble(pipeline, f"if is_backfill then {Gate.WAIT}; end if")
    with pipeline.gate() as gate:
        started = in_background(pipeline, procedures=["load"], from_="1", until=str(xid + 1), chunk="1000000")
        gate.wait_for_arrivals()
        pipeline.sql("update bronze.events set value = 777, etl_xid = pg_current_xact_id()")
        live = pipeline.start_in_background()
        wait_until(pipeline.conn, WAITS_FOR_ITS_PROCEDURE)
        gate.open()
        assert (live.result().status, started.result().status) == ("succeeded", "succeeded")
    assert pipeline.value("select value from silver.rows") == 777
    assert reads(pipeline) == {5: 3}


def test_a_chunk_waits_for_a_run_of_its_procedure_and_then_reads_what_there_is(days: Pipeline) -> None:
    trouble(days, f"if not is_backfill then {Gate.WAIT}; end if")
    with days.gate() as gate:
        live = days.start_in_background()
        gate.wait_for_arrivals()
        started = in_background(days, procedures=["load"], **{**DAYS, "chunk": "30 days"})
        wait_until(days.conn, WAITS_FOR_ITS_PROCEDURE)
        days.sql("update bronze.events set value = 777 where id = 5")
        gate.open()
        assert (live.result().status, started.result().status) == ("succeeded", "succeeded")
    assert days.value("select value from silver.rows where id = 5") == 777


def test_two_backfills_of_different_procedures_run_side_by_side(days: Pipeline) -> None:
    add(days, "other")
    days.apply()
    trouble(days, Gate.WAIT)
    with days.gate() as gate:
        both = [in_background(days, procedures=[name], **DAYS) for name in ("load", "other")]
        gate.wait_for_arrivals(2)
        assert (
            days.value("select count(*) from etl.backfill_progress where status = 'running' and not is_dead")
            == 2
        )
        gate.open()
        assert [one.result().status for one in both] == ["succeeded", "succeeded"]


# -- failures --


def test_a_chunk_that_fails_leaves_the_others_alone_and_resume_does_only_what_is_left(days: Pipeline) -> None:
    trouble(days, "if since like '2024-01-04%' and is_backfill then raise exception 'bad day'; end if")
    run = backfill(days, procedures=["load"], reason="new column", **DAYS)
    assert run.status == "failed"
    assert statuses(days, run.run_id) == ["succeeded"] * 3 + ["failed"] + ["succeeded"] * 6
    seen = progress(days, run.run_id)
    assert (seen["chunks_done"], seen["chunks_failed"], seen["chunks_left"], seen["eta"]) == (9, 1, 0, None)
    trouble(days, "null")
    assert [since[:10] for _, since, _ in plan(days, resume=run.run_id)] == ["2024-01-04"]
    second = backfill(days, resume=run.run_id)
    assert second.status == "succeeded"
    row = days.run(second.run_id)
    assert (row["parent_run_id"], row["kind"], row["step_count"]) == (run.run_id, "backfill", 1)
    assert (row["reason"], row["request"]["chunk"]) == ("new column", "1 day")
    assert reads(days) == dict.fromkeys(range(1, 11), 1)
    for done in (run.run_id, second.run_id):
        with refused("PT409", "backfill.nothing_left"):
            backfill(days, resume=done)


def test_what_one_resume_has_done_the_next_one_leaves_out(days: Pipeline) -> None:
    trouble(days, "if since < '2024-01-04' then raise exception 'bad days'; end if")
    first = backfill(days, procedures=["load"], **DAYS)
    trouble(days, "if since < '2024-01-03' then raise exception 'bad days'; end if")
    second = backfill(days, resume=first.run_id)
    assert statuses(days, second.run_id) == ["failed", "failed", "succeeded"]
    trouble(days, "null")
    third = backfill(days, resume=first.run_id)
    assert statuses(days, third.run_id) == ["succeeded", "succeeded"]
    with refused("PT409", "backfill.nothing_left"):
        backfill(days, resume=second.run_id)
    assert reads(days) == dict.fromkeys(range(1, 11), 1)


def test_a_procedure_that_stops_on_failure_stops_its_backfill(days: Pipeline) -> None:
    days.change("load", on_failure="stop")
    trouble(days, "if since like '2024-01-04%' then raise exception 'bad day'; end if")
    run = backfill(days, procedures=["load"], **DAYS)
    assert run.status == "failed"
    assert statuses(days, run.run_id) == ["succeeded"] * 3 + ["failed"] + ["skipped"] * 6
    trouble(days, "null")
    assert backfill(days, resume=run.run_id).status == "succeeded"
    assert reads(days) == dict.fromkeys(range(1, 11), 1)


def test_a_transient_error_is_tried_again(days: Pipeline) -> None:
    days.sql("create sequence silver.tries")
    trouble(days, "if nextval('silver.tries') = 3 then raise exception using errcode = '40001'; end if")
    run = backfill(days, procedures=["load"], **DAYS)
    assert run.status == "succeeded"
    assert len(days.steps(run.run_id)) == 11
    assert progress(days, run.run_id)["chunks_done"] == 10
    assert reads(days) == dict.fromkeys(range(1, 11), 1)


def test_a_resume_uses_the_configuration_as_it_is_now(days: Pipeline) -> None:
    add(days, "other")
    days.apply()
    trouble(days, "if since > '2024-01-09' then raise exception 'bad day'; end if")
    run = backfill(days, procedures=["load", "other"], **DAYS)
    trouble(days, "null")
    others = days.procedures.pop()
    days.apply()
    with refused("PT404", "procedure.unknown") as refusal:
        backfill(days, resume=run.run_id)
    assert refusal.message.startswith("other, of which")
    days.procedures.append(others)
    days.apply()
    assert backfill(days, resume=run.run_id).status == "succeeded"


# -- the end before the end --


def test_a_cancelled_backfill_finishes_its_chunk_and_can_be_resumed(days: Pipeline) -> None:
    trouble(days, f"if since like '2024-01-03%' then {Gate.WAIT}; end if")
    with days.gate() as gate:
        started = in_background(days, procedures=["load"], **DAYS)
        gate.wait_for_arrivals()
        run_id = active_backfill(days)
        with refused("PT409", "run.active") as refusal:
            backfill(days, resume=run_id)
        assert refusal.detail["run_id"] == run_id
        days.value("select etl.cancel_run(%s, reason => 'lunch')", run_id)
        gate.open()
        assert started.result() == (run_id, "cancelled")
    assert statuses(days, run_id) == ["succeeded"] * 3 + ["skipped"] * 7
    assert backfill(days, resume=run_id).status == "succeeded"
    assert reads(days) == dict.fromkeys(range(1, 11), 1)


def test_a_pause_can_be_cancelled(days: Pipeline) -> None:
    started = in_background(days, procedures=["load"], pause="1 hour", **DAYS)
    wait_until(days.conn, "select true from etl.backfill_progress where chunks_done = 1")
    wait_until(
        days.conn,
        "select true from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()",
    )
    run_id = active_backfill(days)
    assert days.run(run_id)["pause_ms"] == 3_600_000
    eta = days.value("select eta - clock_timestamp() > interval '8 hours' from etl.backfill_progress")
    assert eta is True
    days.value("select etl.cancel_run(%s)", run_id)
    assert started.result().status == "cancelled"
    assert statuses(days, run_id) == ["succeeded"] + ["skipped"] * 9
    resumed = backfill(days, resume=run_id, pause="0")
    assert (resumed.status, days.run(resumed.run_id)["pause_ms"]) == ("succeeded", 0)


def kill(days: Pipeline, gate: Gate, started: Background) -> int:
    """Ends the session of a backfill that stands at the gate."""
    (pid,) = gate.wait_for_arrivals()
    run_id = active_backfill(days)
    days.value("select pg_terminate_backend(%s)", pid)
    wait_until(days.conn, "select true where not exists (select from pg_stat_activity where pid = %s)", [pid])
    with pytest.raises(Exception, match="terminat"):
        started.result()
    assert progress(days, run_id)["is_dead"] is True
    return run_id


def test_a_backfill_whose_session_died_is_resumed_at_the_chunk_it_was_at(days: Pipeline) -> None:
    trouble(days, f"if since like '2024-01-03%' then {Gate.WAIT}; end if")
    with days.gate() as gate:
        run_id = kill(days, gate, in_background(days, procedures=["load"], **DAYS))
    assert len(plan(days, resume=run_id)) == 8
    said = messages_of(days.conn)
    run = backfill(days, resume=run_id)
    assert run.status == "succeeded"
    assert next(one.text for one in said if one.severity == "WARNING").startswith(
        f"backfill {run_id} was abandoned"
    )
    assert (days.run(run_id)["status"], days.run(run_id)["error_code"]) == ("abandoned", "run.abandoned")
    assert statuses(days, run_id) == ["succeeded"] * 2 + ["abandoned"] * 8
    assert reads(days) == dict.fromkeys(range(1, 11), 1)


def test_a_dead_backfill_is_recorded_by_the_next_run_and_a_living_one_left_alone(days: Pipeline) -> None:
    add(days, "other")
    days.apply()
    trouble(days, f"if is_backfill then {Gate.WAIT}; end if")
    with days.gate() as gate:
        dead = kill(days, gate, in_background(days, procedures=["load"], **DAYS))
        living = in_background(days, procedures=["other"], **DAYS)
        gate.wait_for_arrivals()
        assert days.run(dead)["status"] == "abandoned", "another backfill records it as well"
        second = kill(days, gate, living)
        living = in_background(days, procedures=["other"], idempotency_key="once", **DAYS)
        gate.wait_for_arrivals()
        assert days.run(second)["status"] == "abandoned"
        assert days.start(procedures=["load"]).status == "succeeded"
        assert days.value("select status from etl.runs where idempotency_key = 'once'") == "running"
        third = kill(days, gate, living)
    assert days.start(procedures=["load"]).status == "succeeded"
    assert days.run(third)["status"] == "abandoned"


# -- requests --


def test_the_same_key_and_request_return_the_same_backfill(days: Pipeline) -> None:
    first = backfill(days, procedures=["load"], idempotency_key="2024", **DAYS)
    assert backfill(days, procedures=["load"], idempotency_key="2024", **DAYS) == first
    assert reads(days) == dict.fromkeys(range(1, 11), 1)
    with refused("PT409", "idempotency_key.reused"):
        backfill(days, procedures=["load"], idempotency_key="2024", **{**DAYS, "chunk": "2 days"})
    with refused("PT409", "idempotency_key.reused"):
        days.start(idempotency_key="2024")


BAD_IDS: Final = {"procedures": ["by_id"], "from_": "1.5", "until": "ten", "chunk": "1 day"}
ALL_WRONG: Final = {"procedures": ["nope", "plain"], "chunk": "x"}


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "codes"),
    [
        ({"procedures": ["nope", "load"]}, "PT404", ["procedure.unknown"]),
        ({"procedures": None}, "PT422", ["selection.empty"]),
        ({"procedures": ["plain"]}, "PT422", ["backfill.no_watermark"]),
        ({"procedures": ["load", "by_id"]}, "PT422", ["backfill.mixed_strategies"]),
        ({"from_": "yesterdayish"}, "PT422", ["backfill.invalid"]),
        ({"from_": "-infinity"}, "PT422", ["backfill.invalid"]),
        ({"from_": "2024-01-11 00:00+00"}, "PT422", ["backfill.invalid"]),
        ({"from_": "2025-01-01", "until": "12 o'clock", "chunk": "86400"}, "PT422", ["backfill.invalid"] * 2),
        ({"chunk": "0 days"}, "PT422", ["backfill.invalid"]),
        ({"chunk": "1 month -3 days"}, "PT422", ["backfill.invalid"]),
        ({"chunk": None}, "PT422", ["backfill.invalid"]),
        ({"pause": "-1 s"}, "PT422", ["backfill.invalid"]),
        ({"until": None}, "PT422", ["backfill.no_until"]),
        ({"params": {"other": {"x": 1}}}, "PT422", ["params.unused"]),
        (BAD_IDS, "PT422", ["backfill.invalid"] * 3),
        ({"procedures": ["by_query"], "from_": None}, "PT422", ["backfill.no_from"]),
        (ALL_WRONG, "PT404", ["procedure.unknown", "backfill.no_watermark"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_cannot_be_done_is_refused_with_everything_that_is_wrong(
    days: Pipeline, arguments: Row, sqlstate: str, codes: list[str]
) -> None:
    days.add("plain")
    add(days, "by_id", "id")
    add(days, "by_query")
    days.procedures[-1]["watermark"]["source"] = ["select max(at) from bronze.events"]
    days.apply()
    request = {k: v for k, v in {"procedures": ["load"], **DAYS, **arguments}.items() if v is not None}
    for verb in ("call etl.backfill", "select * from etl.plan_backfill"):
        if "pause" in request and "plan" in verb:
            continue
        with refused(sqlstate, codes[0]) as refusal:
            days.conn.execute(*call(verb.split()[-1], request, verb.rpartition(" ")[0]))
        assert refusal.codes == codes
        assert refusal.hint
    assert days.value("select count(*) from etl.runs") == 0


def test_a_source_that_is_a_query_needs_to_be_told_where_to_begin(days: Pipeline) -> None:
    days.procedures[0]["watermark"]["source"] = ["select max(at) from bronze.events"]
    days.apply()
    run = backfill(days, procedures=["load"], **DAYS)
    assert statuses(days, run.run_id) == ["succeeded"] * 10
    assert reads(days) == dict.fromkeys(range(1, 11), 1)


def test_too_many_chunks_are_refused_with_a_size_that_would_do(days: Pipeline) -> None:
    add(days, "by_id", "id")
    days.apply()
    days.sql("drop index bronze.events_at_idx; alter table bronze.events drop constraint events_pkey")
    with refused("PT422", "backfill.too_many_chunks") as refusal:
        plan(days, procedures=["by_id"], from_="0", until="1000000", chunk="5")
    assert "200000" in refusal.message
    assert "chunk => '10'" in refusal.hint
    with refused("PT422", "backfill.too_many_chunks") as refusal:
        plan(days, procedures=["load"], **{**DAYS, "chunk": "1 second"})
    assert "864000" in refusal.message
    assert "chunk => '00:00:09'" in refusal.hint


def test_only_a_backfill_can_be_resumed_and_its_range_is_not_asked_for_again(days: Pipeline) -> None:
    run = days.start()
    with refused("PT422", "backfill.not_a_backfill"):
        backfill(days, resume=run.run_id)
    with refused("PT404", "run.unknown"):
        backfill(days, resume=4711)
    with refused("PT422", "backfill.invalid") as refusal:
        backfill(days, resume=run.run_id, procedures=["load"], chunk="1 day")
    assert len(refusal.codes) == 2


def test_a_backfill_is_for_admins(days: Pipeline) -> None:
    operator = days.login("etl_operator")
    with refused("42501"):
        backfill(days, operator, procedures=["load"], **DAYS)
    with refused("42501"):
        operator.execute("select etl._begin_backfill('{}')")
    assert (
        operator.execute(
            *call("etl.plan_backfill", {"procedures": ["load"], **DAYS}, "select * from")
        ).rowcount
        == 10
    )
    admin = days.login("etl_admin")
    run = backfill(days, admin, procedures=["load"], **DAYS)
    assert (run.status, days.run(run.run_id)["requested_by"]) == ("succeeded", admin.info.user)


def test_a_backfill_in_a_transaction_block_says_so(days: Pipeline) -> None:
    with days.db.connect(autocommit=False) as conn, refused("25001", "call.in_transaction") as refusal:
        backfill(days, conn, procedures=["load"], **DAYS)
    assert "etl.backfill" in refusal.message


# -- what people see --


def test_the_health_of_a_procedure_is_that_of_its_runs(days: Pipeline) -> None:
    live = days.start()
    before = days.rows("select * from etl.procedure_health")
    trouble(days, "if since like '2024-01-04%' then raise exception 'bad day'; end if")
    run = backfill(days, procedures=["load"], **DAYS)
    assert days.rows("select * from etl.procedure_health") == before
    assert before[0]["last_run_id"] == live.run_id
    kinds = days.column("select kind from etl.run_history order by run_id")
    assert kinds == ["run", "backfill"]
    document = days.value("select etl.get_run(%s)", run.run_id)
    assert [step["order_index"] for step in document["steps"]] == [4]
    assert document["backfill"]["chunks_done"] == 9
    assert "backfill" not in days.value("select etl.get_run(%s)", live.run_id)


def test_progress_counts_rows_and_says_when_it_will_have_ended(days: Pipeline) -> None:
    trouble(days, f"if since like '2024-01-06%' then {Gate.WAIT}; end if")
    with days.gate() as gate:
        started = in_background(days, procedures=["load"], **DAYS)
        gate.wait_for_arrivals()
        seen = progress(days, active_backfill(days))
        gate.open()
        started.result()
    assert (seen["chunks_total"], seen["chunks_done"], seen["chunks_left"]) == (10, 5, 5)
    assert (seen["procedures"], seen["rows_affected"], seen["chunk"]) == (["load"], 5, "1 day")
    assert seen["rows_per_second"] > 0
    assert seen["eta"] > seen["started_at"]
    assert progress(days, started.result().run_id)["eta"] is None


# -- the command line --


def b2s(days: Pipeline, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """A command: its exit code, stdout and stderr."""
    capsys.readouterr()
    code = main([*words, "--dsn", days.db.dsn])
    out, err = capsys.readouterr()
    return code, out, err


WORDS: Final = ("backfill", "load", "--from", DAYS["from_"], "--until", DAYS["until"], "--chunk", "1d")


def test_the_command_does_it_and_sums_up(days: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = b2s(days, capsys, *WORDS, "--reason", "new column", "--pause", "1ms")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["procedure", "chunks", "done", "rows", "took"]
    assert out.splitlines()[1].split()[:4] == ["load", "10", "10", "10"]
    assert "backfill 1 succeeded in" in out
    assert "10 of 10 chunks, 10 rows" in out
    assert "next:" not in out
    assert days.run(1)["reason"] == "new column"


def test_a_dry_run_shows_the_chunks_and_does_nothing(
    days: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = b2s(days, capsys, *WORDS, "--dry-run")
    assert code == 0
    assert out.splitlines()[-1] == "10 chunks"
    assert "[2024-01-10 00:00:00, 2024-01-11 00:00:00)" in out
    assert len(json.loads(b2s(days, capsys, *WORDS, "--dry-run", "--json")[1])) == 10
    many = [*WORDS[:-1], "1h", "--dry-run", "--pause", "1s", "--reason", "x"]
    days.sql("drop index bronze.events_at_idx")
    assert "... 219 more" in b2s(days, capsys, *many)[1]
    assert days.value("select count(*) from etl.runs") == 0


def test_after_a_failure_the_command_says_what_failed_and_how_to_go_on(
    days: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble(days, "if since < '2024-01-08' then raise exception 'bad day'; end if")
    code, out, err = b2s(days, capsys, *WORDS)
    assert code == 1
    assert "[1] load failed" in err
    assert "failed: [1] load [2024-01-01 00:00:00, 2024-01-02 00:00:00): bad day" in out
    assert "and 2 more chunks that failed" in out
    assert "next: b2s backfill --resume 1    does what is left, 7 chunks once the cause is repaired" in out
    shown = b2s(days, capsys, "show", "1")[1]
    assert "b2s backfill --resume 1" in shown
    assert "3 of 10 chunks" in shown
    assert "context:" in shown
    code, out, _ = b2s(days, capsys, "backfill", "--resume", "latest", "--dry-run")
    assert (code, out.splitlines()[-1]) == (0, "7 chunks")
    trouble(days, "null")
    code, out, _ = b2s(days, capsys, "backfill", "--resume", "latest")
    assert code == 0
    assert "7 of 7 chunks" in out
    code, out, _ = b2s(days, capsys, "runs")
    assert [line.split()[1:4] for line in out.splitlines()[1:]] == [
        ["bronze_to_silver", "backfill", "succeeded"], ["bronze_to_silver", "backfill", "failed"],
    ]  # fmt: skip
    code, _, err = b2s(days, capsys, "backfill", "--resume", "2")
    assert code == 3
    assert "nothing is left of backfill 2" in err


def test_as_json_the_command_prints_the_run(days: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = b2s(days, capsys, *WORDS, "--json")
    document = json.loads(out)
    assert (code, document["kind"], document["backfill"]["chunks_done"]) == (0, "backfill", 10)
    assert [json.loads(line)["event"] for line in err.splitlines()].count("step_succeeded") == 10


def test_what_the_command_cannot_understand_is_a_usage_error(
    days: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert b2s(days, capsys, *WORDS, "--pause", "soon")[0] == 2
    code, _, err = b2s(days, capsys, "backfill", "--resume", "latest")
    assert (code, "there is no backfill yet" in err) == (2, True)
    code, _, err = b2s(days, capsys, "backfill", "load", "--from", "never", "--chunk", "1")
    assert code == 3
    assert "from_ is not a time: never" in err
    assert "chunk 1 has no unit" in err


def test_status_shows_how_far_a_backfill_is_beside_the_last_run(
    days: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run = days.start()
    trouble(days, f"if is_backfill and since like '2024-01-05%' then {Gate.WAIT}; end if")
    with days.gate() as gate:
        started = in_background(days, procedures=["load"], **DAYS)
        gate.wait_for_arrivals()
        run_id = active_backfill(days)
        out = b2s(days, capsys, "status")[1]
        assert f"run {run.run_id} succeeded" in out
        assert f"backfill {run_id} of load running: 4 of 10 chunks, " in out
        assert "ends about" in out
        document = json.loads(b2s(days, capsys, "status", "--json")[1])
        assert [one["kind"] for one in document["runs"]] == ["run"]
        assert [one["run_id"] for one in document["backfills"]] == [run_id]
        assert "b2s cancel" in b2s(days, capsys, "show", str(run_id))[1]
        kill(days, gate, started)
    out = b2s(days, capsys, "status")[1]
    assert f"its session is gone; b2s backfill --resume {run_id} goes on with it" in out


def test_an_interrupt_finishes_the_chunk_and_leaves_the_rest_for_resume(days: Pipeline) -> None:
    trouble(days, f"if since like '2024-01-03%' then {Gate.WAIT}; end if")
    command = [sys.executable, "-m", "b2s.cli", *WORDS, "--dsn", days.db.dsn]
    with days.gate() as gate:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        gate.wait_for_arrivals()
        process.send_signal(signal.SIGINT)
        wait_until(days.conn, "select true from etl.runs where cancel_requested_at is not null")
        gate.open()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "cancelling run 1" in err
    assert "3 of 10 chunks" in out
    assert "next: b2s backfill --resume 1    does what is left, 7 chunks" in out


def test_a_second_interrupt_cancels_the_statement_of_the_chunk(days: Pipeline) -> None:
    trouble(days, f"if since like '2024-01-03%' then {Gate.WAIT}; end if")
    command = [sys.executable, "-m", "b2s.cli", *WORDS, "--dsn", days.db.dsn]
    with days.gate() as gate:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        gate.wait_for_arrivals()
        process.send_signal(signal.SIGINT)
        wait_until(days.conn, "select true from etl.runs where cancel_requested_at is not null")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "2 of 10 chunks" in out
    assert statuses(days, 1) == ["succeeded"] * 2 + ["cancelled"] + ["skipped"] * 7


def event(kind: str, number: int, **more: Any) -> Row:
    return {"event": kind, "run_id": 7, "order_index": number, "procedure": "load", "attempt": 1, **more}


def test_a_terminal_shows_one_line_with_rate_and_time_left() -> None:
    stream = io.StringIO()
    display = LiveBackfillDisplay(stream, Style(width=120), lambda run_id: 4 if run_id == 7 else None)
    display.event(event("step_started", 1))
    display.event(event("step_succeeded", 1, rows_affected=1500, duration_ms=5))
    display.event(event("step_started", 2))
    last = stream.getvalue().rpartition("\r")[2]
    assert "1 of 4 chunks, 1,500 rows, " in last
    assert " rows/s, about " in last
    assert " left: [2] load for " in last
    display.close()


def test_a_log_gets_failures_and_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    clock = itertools.count(time.monotonic(), 4)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    display = PlainBackfillDisplay(stream, Style(), lambda _run_id: 100)
    for number in range(1, 11):
        display.event(event("step_succeeded", number, rows_affected=10, duration_ms=5))
    display.event(event("step_failed", 11, duration_ms=5, error_message="bad day"))
    lines = stream.getvalue().splitlines()
    assert "[11] load failed in 5 ms: bad day" in lines
    assert 2 <= len([line for line in lines if " of 100 chunks, " in line]) <= 8
    assert not [line for line in lines if "succeeded" in line]


def test_an_upgrade_is_refused_while_a_backfill_is_active(days: Pipeline) -> None:
    trouble(days, Gate.WAIT)
    with days.gate() as gate:
        started = in_background(days, procedures=["load"], **DAYS)
        gate.wait_for_arrivals()
        with pytest.raises(DatabaseError, match=f"run {active_backfill(days)} .* is active"):
            migrate(days.db.dsn)
        gate.open()
        assert started.result().status == "succeeded"
