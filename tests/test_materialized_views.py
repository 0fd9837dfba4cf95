"""Refreshes of materialized views: when, in which order, how, and what their failure means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.pipelines import Gate, Pipeline, Row, refused
from tests.servers import Database, wait_until


def target(name: str, **settings: Any) -> Row:
    return {"name": name, "after": "run", "on": "success", "concurrently": "auto", **settings}


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as made:
        made.conn.execute("create schema mart authorization etl_owner")
        yield made


def count_trace(pipeline: Pipeline, name: str) -> None:
    """A view that shows how many steps had written when it was refreshed last."""
    pipeline.sql(f"create materialized view {name} as select count(*)::int as n from silver.trace")
    pipeline.sql(f"create unique index on {name} (n)")


def refreshes(pipeline: Pipeline, run_id: int) -> list[Row]:
    return pipeline.rows("select * from etl.mv_refreshes where run_id = %s order by scope_index", run_id)


def outcomes(pipeline: Pipeline, run_id: int) -> dict[str, str]:
    """How each refresh ended: its status, or why it was skipped."""
    return {row["mv_name"]: row["skip_reason"] or row["status"] for row in refreshes(pipeline, run_id)}


# -- when --


def test_a_view_is_refreshed_after_its_procedure_its_group_or_the_run(pipeline: Pipeline) -> None:
    for name in ("p", "g", "r"):
        count_trace(pipeline, f"mart.{name}")
    group = {"group": "g", "transaction_scope": "per_group"}
    pipeline.add("a", mv_refresh=[target("mart.p", after="procedure"), target("mart.r", after="run")])
    pipeline.add("b", mv_refresh=[target("mart.g", after="group")], dependencies=["a"], **group)
    pipeline.add("c", mv_refresh=[target("mart.g", after="group")], dependencies=["b"], **group)
    pipeline.add("d", dependencies=["c"])
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "succeeded"
    assert [pipeline.value(f"select n from mart.{name}") for name in ("p", "g", "r")] == [1, 3, 4]
    assert [(row["mv_name"], row["refresh_after"]) for row in refreshes(pipeline, run.run_id)] == [
        ("mart.p", "procedure"),
        ("mart.g", "group"),
        ("mart.r", "run"),
    ]


def test_after_its_group_means_after_the_last_selected_member_whatever_the_transactions(
    pipeline: Pipeline,
) -> None:
    count_trace(pipeline, "mart.g")
    for name, needs in (("a", []), ("b", ["a"]), ("c", ["b"]), ("other", ["c"])):
        grouped: Row = (
            {"group": "g", "mv_refresh": [target("mart.g", after="group")]} if name != "other" else {}
        )
        pipeline.add(name, dependencies=needs, **grouped)
    pipeline.apply()
    pipeline.start()
    assert pipeline.value("select n from mart.g") == 3
    pipeline.start(procedures=["a", "b", "other"])
    assert pipeline.value("select n from mart.g") == 4 + 2


def test_a_view_fed_by_several_procedures_is_refreshed_once_at_the_end_of_the_run(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.r")
    for name in ("a", "b", "c"):
        pipeline.add(name, mv_refresh=[target("mart.r")])
    pipeline.apply()
    run = pipeline.start()
    (row,) = refreshes(pipeline, run.run_id)
    assert (row["feeders"], pipeline.value("select n from mart.r")) == ([1, 2, 3], 3)


def test_a_view_fed_by_several_procedures_takes_the_more_careful_of_their_settings(
    pipeline: Pipeline,
) -> None:
    count_trace(pipeline, "mart.r")
    pipeline.add("a", mv_refresh=[target("mart.r", on="always", concurrently="true")])
    pipeline.add("b", mv_refresh=[target("mart.r", on="success", concurrently="false")])
    pipeline.apply()
    run = pipeline.start()
    (row,) = refreshes(pipeline, run.run_id)
    assert (row["refresh_on"], row["concurrency"], row["is_concurrent"]) == ("always", "false", False)


def test_a_view_is_refreshed_only_because_of_procedures_that_run(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.r")
    pipeline.add("a", mv_refresh=[target("mart.r")])
    pipeline.add("b")
    pipeline.apply()
    assert refreshes(pipeline, pipeline.start(procedures=["b"]).run_id) == []


# -- in which order --


def test_views_are_refreshed_in_the_order_in_which_they_read_each_other(pipeline: Pipeline) -> None:
    pipeline.sql(
        """create materialized view mart.z_first as select count(*)::int as n from silver.trace;
           create view mart.between as select n from mart.z_first;
           create view mart.again as select n from mart.between;
           create materialized view mart.m_second as select n from mart.again where n > 0;
           create materialized view mart.a_third as select (select max(n) from mart.m_second) as n"""
    )
    pipeline.add("load", mv_refresh=[target("mart.a_third"), target("mart.m_second"), target("mart.z_first")])
    pipeline.apply()
    expected = ["mart.z_first", "mart.m_second", "mart.a_third"]
    assert [row["name"] for row in pipeline.plan() if row["kind"] == "refresh"] == expected
    run = pipeline.start()
    done = refreshes(pipeline, run.run_id)
    assert [row["mv_name"] for row in done] == expected
    assert done[2]["depends_on"] == [done[1]["scope_index"], done[0]["scope_index"]] or sorted(
        done[2]["depends_on"]
    ) == [
        done[0]["scope_index"],
        done[1]["scope_index"],
    ]
    assert done[0]["ended_at"] <= done[1]["started_at"] <= done[2]["started_at"]
    assert pipeline.value("select n from mart.a_third") == 1


def test_the_order_holds_when_the_view_between_is_not_configured(pipeline: Pipeline) -> None:
    pipeline.sql(
        """create materialized view mart.z as select count(*)::int as n from silver.trace;
           create materialized view mart.unlisted as select n from mart.z;
           create materialized view mart.a as select n from mart.unlisted"""
    )
    pipeline.add("load", mv_refresh=[target("mart.a"), target("mart.z")])
    pipeline.apply()
    run = pipeline.start()
    assert [row["mv_name"] for row in refreshes(pipeline, run.run_id)] == ["mart.z", "mart.a"]


def test_a_view_at_the_end_of_the_run_waits_for_one_after_a_procedure_that_it_reads(
    pipeline: Pipeline,
) -> None:
    pipeline.sql("create table mart.divisor as select 0 as n")
    pipeline.sql("create materialized view mart.early as select 1 / n as n from mart.divisor with no data")
    pipeline.sql("create materialized view mart.late as select n from mart.early with no data")
    pipeline.add(
        "load", mv_refresh=[target("mart.early", after="procedure"), target("mart.late", after="run")]
    )
    pipeline.apply()
    run = pipeline.start()
    assert outcomes(pipeline, run.run_id) == {"mart.early": "failed", "mart.late": "upstream_failed"}
    pipeline.sql("update mart.divisor set n = 1")
    run = pipeline.start()
    assert outcomes(pipeline, run.run_id) == {"mart.early": "succeeded", "mart.late": "succeeded"}


# -- on what outcome --


@pytest.mark.parametrize(
    ("on", "outcome", "shown"), [("success", "upstream_failed", 0), ("always", "succeeded", 1)]
)
@pytest.mark.parametrize("after", ["procedure", "run"])
def test_a_view_of_a_failed_procedure_is_refreshed_only_when_always(
    on: str, outcome: str, shown: int, after: str, pipeline: Pipeline
) -> None:
    count_trace(pipeline, "mart.r")
    pipeline.add("first")
    pipeline.add(
        "failing", "raise 'no'", dependencies=["first"], mv_refresh=[target("mart.r", on=on, after=after)]
    )
    pipeline.apply()
    run = pipeline.start()
    assert (run.status, outcomes(pipeline, run.run_id)) == ("failed", {"mart.r": outcome})
    assert pipeline.value("select n from mart.r") == shown


@pytest.mark.parametrize(("on", "outcome"), [("success", "upstream_failed"), ("always", "succeeded")])
def test_a_skipped_procedure_counts_as_a_failed_one(on: str, outcome: str, pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.r")
    pipeline.add("failing", "raise 'no'")
    pipeline.add("skipped", dependencies=["failing"], mv_refresh=[target("mart.r", on=on)])
    pipeline.apply()
    assert outcomes(pipeline, pipeline.start().run_id) == {"mart.r": outcome}


def test_one_failed_feeder_of_two_is_enough_to_skip(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.r")
    count_trace(pipeline, "mart.s")
    pipeline.add("failing", "raise 'no'", mv_refresh=[target("mart.r")])
    pipeline.add("fine", mv_refresh=[target("mart.r"), target("mart.s")])
    pipeline.apply()
    assert outcomes(pipeline, pipeline.start().run_id) == {"mart.r": "upstream_failed", "mart.s": "succeeded"}


def test_a_step_that_succeeds_on_its_second_attempt_has_its_view_refreshed(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.r")
    pipeline.sql("create sequence silver.attempts")
    body = (
        "if nextval('silver.attempts') = 1 then raise serialization_failure; end if; insert into "
        "silver.trace (step) values ('load')"
    )
    pipeline.add("load", body, mv_refresh=[target("mart.r", after="procedure")])
    pipeline.apply()
    run = pipeline.start()
    assert (run.status, outcomes(pipeline, run.run_id), pipeline.value("select n from mart.r")) == (
        "succeeded",
        {"mart.r": "succeeded"},
        1,
    )


# -- how --

INDEXES: dict[str, tuple[str, bool]] = {
    "a unique index": ("create unique index on mart.v (n)", True),
    "a unique index over two columns": ("create unique index on mart.v (n, t)", True),
    "a unique index that includes a column": ("create unique index on mart.v (n) include (t)", True),
    "a unique index with nulls not distinct": ("create unique index on mart.v (n) nulls not distinct", True),
    "no index": ("", False),
    "an index that is not unique": ("create index on mart.v (n)", False),
    "a partial unique index": ("create unique index on mart.v (n) where n > 0", False),
    "a unique index on an expression": ("create unique index on mart.v ((n + 1))", False),
    "a unique index on a column and an expression": ("create unique index on mart.v (n, lower(t))", False),
    "a partial one and a plain one": (
        "create unique index on mart.v (n) where n > 0; create unique index on mart.v (t)",
        True,
    ),
}


@pytest.mark.parametrize(("indexes", "is_possible"), INDEXES.values(), ids=INDEXES)
@pytest.mark.parametrize("asked", ["auto", "true", "false"])
def test_a_view_is_refreshed_concurrently_where_the_server_accepts_it(
    indexes: str, is_possible: bool, asked: str, pipeline: Pipeline
) -> None:
    pipeline.sql("create materialized view mart.v as select 1 as n, 'x'::text as t")
    if indexes:
        pipeline.sql(indexes)
    pipeline.add("load", mv_refresh=[target("mart.v", concurrently=asked)])
    pipeline.apply()
    run = pipeline.start()
    (row,) = refreshes(pipeline, run.run_id)
    is_warned = asked == "true" and not is_possible
    assert (row["status"], row["is_concurrent"]) == ("succeeded", asked != "false" and is_possible)
    assert (row["warning"] is not None) == is_warned
    assert run.status == ("completed_with_warnings" if is_warned else "succeeded")
    # The catalog rule agrees with the server itself.
    accepted = True
    try:
        pipeline.sql("refresh materialized view concurrently mart.v")
    except psycopg.errors.ObjectNotInPrerequisiteState:
        accepted = False
    assert accepted == is_possible


def test_a_view_without_data_is_filled_first_and_refreshed_concurrently_from_then_on(
    pipeline: Pipeline,
) -> None:
    pipeline.sql(
        "create materialized view mart.v as select 1 as n with no data; create unique index on mart.v (n)"
    )
    pipeline.add("load", mv_refresh=[target("mart.v", concurrently="true")])
    pipeline.apply()
    first, second = pipeline.start(), pipeline.start()
    (before,), (after,) = refreshes(pipeline, first.run_id), refreshes(pipeline, second.run_id)
    assert (first.status, before["is_concurrent"], second.status, after["is_concurrent"]) == (
        "completed_with_warnings",
        False,
        "succeeded",
        True,
    )
    assert before["warning"].startswith("mart.v was refreshed without CONCURRENTLY, readers waited: ")
    assert after["warning"] is None


def test_a_refusal_that_the_catalog_did_not_foretell_leads_to_a_plain_refresh_with_a_warning(
    pipeline: Pipeline,
) -> None:
    """The decision is made to answer yes where the server says no."""
    pipeline.sql("create materialized view mart.v as select 1 as n")
    pipeline.conn.execute(
        "create or replace function etl._can_refresh_concurrently(mv regclass) returns boolean language "
        "sql stable strict as 'select true'"
    )
    pipeline.add("load", mv_refresh=[target("mart.v")])
    pipeline.apply()
    run = pipeline.start()
    (row,) = refreshes(pipeline, run.run_id)
    assert (run.status, row["status"], row["is_concurrent"]) == (
        "completed_with_warnings",
        "succeeded",
        False,
    )
    assert "cannot refresh materialized view" in row["warning"]


def test_the_plan_says_how_each_view_will_be_refreshed(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.good")
    pipeline.sql("create materialized view mart.bare as select 1 as n")
    count_trace(pipeline, "mart.dropped")
    pipeline.add(
        "load",
        mv_refresh=[
            target("mart.good"),
            target("mart.bare", on="always", after="procedure"),
            target("mart.dropped"),
        ],
    )
    pipeline.apply()
    pipeline.sql("drop materialized view mart.dropped")
    notes = {
        row["name"]: (row["depends_on"], row["notes"]) for row in pipeline.plan() if row["kind"] == "refresh"
    }
    assert notes == {
        "mart.good": (["load"], "after run, on success, concurrently"),
        "mart.bare": (["load"], "after procedure, on always, readers wait"),
        "mart.dropped": (["load"], "after run, on success, which does not exist"),
    }


def test_readers_are_not_blocked_by_a_concurrent_refresh(pipeline: Pipeline, db: Database) -> None:
    count_trace(pipeline, "mart.v")
    pipeline.add("load", mv_refresh=[target("mart.v")])
    pipeline.apply()
    reader = db.connect(autocommit=False)
    reader.execute("set transaction isolation level repeatable read")
    assert reader.execute("select n from mart.v").fetchone() == (0,)
    assert pipeline.start().status == "succeeded"
    assert reader.execute("select n from mart.v").fetchone() == (0,)
    reader.commit()
    assert reader.execute("select n from mart.v").fetchone() == (1,)


def test_a_plain_refresh_waits_for_readers_and_holds_no_row_of_the_pipeline_meanwhile(
    pipeline: Pipeline, db: Database
) -> None:
    pipeline.sql("create materialized view mart.v as select count(*)::int as n from silver.trace")
    pipeline.add("load", mv_refresh=[target("mart.v")])
    pipeline.apply()
    reader = db.connect(autocommit=False)
    reader.execute("select n from mart.v")
    running = pipeline.start_in_background()
    wait_until(
        pipeline.conn,
        "select exists (select from pg_locks where not granted and relation = 'mart.v'::regclass)",
    )
    assert pipeline.trace() == ["load"]
    assert pipeline.column("select status from etl.procedure_runs") == ["succeeded"]
    reader.rollback()
    assert running.result().status == "succeeded"
    assert pipeline.value("select n from mart.v") == 1


def test_a_view_with_a_quoted_name_is_refreshed(pipeline: Pipeline) -> None:
    pipeline.sql(
        'create materialized view mart."Sales; Daily" as select count(*)::int as n from silver.trace'
    )
    pipeline.add("load", mv_refresh=[target('mart."Sales; Daily"')])
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert pipeline.value('select n from mart."Sales; Daily"') == 1


# -- failures --


def test_a_failing_refresh_warns_and_rolls_nothing_back(pipeline: Pipeline) -> None:
    pipeline.sql("create table mart.divisor as select 1 as n")
    pipeline.sql("create materialized view mart.bad as select 1 / n as n from mart.divisor")
    count_trace(pipeline, "mart.good")
    pipeline.add(
        "load",
        "update mart.divisor set n = 0; insert into silver.trace (step) values ('load')",
        mv_refresh=[target("mart.bad"), target("mart.good")],
    )
    pipeline.apply()
    run = pipeline.start()
    assert (run.status, outcomes(pipeline, run.run_id)) == (
        "completed_with_warnings",
        {"mart.bad": "failed", "mart.good": "succeeded"},
    )
    assert pipeline.outcomes(run.run_id) == {"load": "succeeded"}
    assert (pipeline.trace(), pipeline.value("select n from mart.divisor")) == (["load"], 0)
    assert pipeline.value("select n from mart.bad") == 1
    bad = refreshes(pipeline, run.run_id)[0]
    assert (bad["error_code"], bad["error_message"]) == ("22012", "division by zero")
    assert bad["error_hint"]
    record = pipeline.run(run.run_id)
    assert (record["error_code"], record["ended_at"] is not None) == (None, True)


def test_what_reads_a_view_that_failed_is_skipped_and_the_rest_is_not(pipeline: Pipeline) -> None:
    pipeline.sql(
        """create table mart.divisor as select 0 as n;
           create materialized view mart.a_bad as select 1 / n as n from mart.divisor with no data;
           create view mart.between as select n from mart.a_bad;
           create materialized view mart.b_reads as select n from mart.between with no data;
           create materialized view mart.c_reads as select n from mart.b_reads with no data"""
    )
    count_trace(pipeline, "mart.d_other")
    names = ["mart.a_bad", "mart.b_reads", "mart.c_reads", "mart.d_other"]
    pipeline.add("load", mv_refresh=[target(name, on="always") for name in names])
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "completed_with_warnings"
    assert [outcomes(pipeline, run.run_id)[name] for name in names] == [
        "failed",
        "upstream_failed",
        "upstream_failed",
        "succeeded",
    ]


def test_duplicate_rows_fail_a_concurrent_refresh_and_leave_the_old_content(pipeline: Pipeline) -> None:
    pipeline.sql("create table mart.source as select 1 as n")
    pipeline.sql(
        "create materialized view mart.v as select n from mart.source; create unique index on mart.v (n)"
    )
    pipeline.add("load", "insert into mart.source values (1)", mv_refresh=[target("mart.v")])
    pipeline.apply()
    run = pipeline.start()
    (row,) = refreshes(pipeline, run.run_id)
    assert (run.status, row["status"], row["error_code"]) == ("completed_with_warnings", "failed", "21000")
    assert pipeline.value("select count(*) from mart.v") == 1
    assert pipeline.value("select count(*) from mart.source") == 2


def test_a_view_that_etl_owner_does_not_own_any_more_fails_with_the_remedy(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.v")
    pipeline.add("load", mv_refresh=[target("mart.v")])
    pipeline.apply()
    pipeline.conn.execute("alter materialized view mart.v owner to postgres")
    run = pipeline.start()
    (row,) = refreshes(pipeline, run.run_id)
    assert (run.status, row["status"], row["error_code"]) == ("completed_with_warnings", "failed", "42501")
    assert "etl_owner" in row["error_hint"]


def test_a_view_that_was_dropped_since_fails_alone(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.v")
    count_trace(pipeline, "mart.w")
    pipeline.add("load", mv_refresh=[target("mart.v"), target("mart.w")])
    pipeline.apply()
    pipeline.sql("drop materialized view mart.v")
    run = pipeline.start()
    assert (run.status, outcomes(pipeline, run.run_id)) == (
        "completed_with_warnings",
        {"mart.v": "failed", "mart.w": "succeeded"},
    )
    assert refreshes(pipeline, run.run_id)[0]["error_code"] == "42P01"


def test_every_refresh_records_when_it_began_and_ended_and_how_long_it_took(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view mart.bad as select 1 / 0 as n with no data")
    count_trace(pipeline, "mart.good")
    pipeline.add("load", mv_refresh=[target("mart.bad"), target("mart.good")])
    pipeline.apply()
    run = pipeline.start()
    for row in refreshes(pipeline, run.run_id):
        assert row["started_at"] <= row["ended_at"]
        assert float(row["duration_ms"]) == pytest.approx(
            (row["ended_at"] - row["started_at"]).total_seconds() * 1000, abs=0.01
        )
    document = pipeline.value("select etl.get_run(%s)", run.run_id)
    assert [(m["mv_name"], m["status"]) for m in document["mv_refreshes"]] == [
        ("mart.bad", "failed"),
        ("mart.good", "succeeded"),
    ]
    events = pipeline.column("select event from etl.run_events where procedure like 'mart.%%' order by at")
    assert events == ["refresh_failed", "refresh_succeeded"]


# -- overrides --


@pytest.mark.parametrize(
    ("choice", "refreshed"),
    [
        (None, ["mart.a", "mart.b"]),
        (True, ["mart.a", "mart.b"]),
        (False, []),
        ([], []),
        (["mart.b"], ["mart.b"]),
        (["mart.c"], ["mart.c"]),
        (["mart.a", "mart.c"], ["mart.a", "mart.c"]),
    ],
    ids=str,
)
def test_a_request_can_choose_what_is_refreshed(
    choice: Any, refreshed: list[str], pipeline: Pipeline
) -> None:
    for name in ("a", "b", "c"):
        count_trace(pipeline, f"mart.{name}")
    pipeline.add("load", mv_refresh=[target("mart.a", after="procedure"), target("mart.b")])
    pipeline.add("other", mv_refresh=[target("mart.c")])
    pipeline.apply()
    run = (
        pipeline.start(procedures=["load"], mv_refresh=choice)
        if choice is not None
        else pipeline.start(procedures=["load"])
    )
    assert sorted(outcomes(pipeline, run.run_id)) == refreshed
    assert run.status == "succeeded"
    for name in ("a", "b", "c"):
        assert pipeline.value(f"select n from mart.{name}") == (1 if f"mart.{name}" in refreshed else 0)


def test_a_choice_that_names_unknown_views_is_refused_with_all_of_them(pipeline: Pipeline) -> None:
    count_trace(pipeline, "mart.a")
    pipeline.add("load", mv_refresh=[target("mart.a")])
    pipeline.apply()
    with refused("PT404", "mv_refresh.unknown") as refusal:
        pipeline.start(mv_refresh=["mart.a", "mart.x", "mart.y"])
    assert refusal.messages == ["there is no mv_refresh mart.x", "there is no mv_refresh mart.y"]


@pytest.mark.parametrize("choice", ["mart.a", 1, {"mart.a": True}])
def test_a_choice_that_is_no_boolean_and_no_list_is_refused(choice: Any, pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    with refused("PT422", "request.invalid"):
        pipeline.start(mv_refresh=choice)


# -- cancelling --


@pytest.fixture
def slow(pipeline: Pipeline) -> Pipeline:
    """Two views at the end of the run; refreshing the first one waits at the gate."""
    pipeline.sql(
        f"create function mart.wait() returns int language plpgsql as $$ begin {Gate.WAIT}; return 1; end $$"
    )
    pipeline.sql("create materialized view mart.a_slow as select mart.wait() as n with no data")
    count_trace(pipeline, "mart.b")
    pipeline.add("load", mv_refresh=[target("mart.a_slow"), target("mart.b")])
    pipeline.apply()
    return pipeline


@pytest.mark.parametrize("how", ["force", "signal"])
def test_a_refresh_that_is_cancelled_keeps_the_data_and_cancels_the_run(how: str, slow: Pipeline) -> None:
    with slow.gate() as gate:
        running = slow.start_in_background()
        (pid,) = gate.wait_for_arrivals()
        if how == "force":
            slow.value("select etl.cancel_run(1, reason => 'enough', force => true)")
        else:
            slow.value("select pg_cancel_backend(%s)", pid)
        run = running.result()
    assert (run.status, outcomes(slow, run.run_id)) == (
        "cancelled",
        {"mart.a_slow": "cancelled", "mart.b": "cancelled"},
    )
    assert [row["status"] for row in refreshes(slow, run.run_id)] == ["cancelled", "skipped"]
    assert (slow.outcomes(run.run_id), slow.trace()) == ({"load": "succeeded"}, ["load"])
    assert slow.start(mv_refresh=False).status == "succeeded"


def test_a_cooperative_cancel_lets_the_refresh_in_flight_end(slow: Pipeline) -> None:
    with slow.gate() as gate:
        running = slow.start_in_background()
        gate.wait_for_arrivals()
        slow.value("select etl.cancel_run(1, reason => 'enough')")
        gate.open()
        run = running.result()
    assert outcomes(slow, run.run_id) == {"mart.a_slow": "succeeded", "mart.b": "cancelled"}
    assert run.status == "cancelled"
    assert slow.value("select n from mart.a_slow") == 1


def test_a_session_that_dies_in_a_refresh_leaves_the_view_as_it_was(slow: Pipeline, db: Database) -> None:
    worker = db.connect()
    with slow.gate() as gate:
        running = slow.start_in_background(worker)
        (pid,) = gate.wait_for_arrivals()
        slow.value("select pg_terminate_backend(%s)", pid)
        with pytest.raises(psycopg.OperationalError):
            running.result()
        wait_until(slow.conn, "select not exists (select from pg_stat_activity where pid = %s)", [pid])
    assert slow.start().status == "succeeded"
    assert slow.run(1)["status"] == "abandoned"
    assert [row["status"] for row in refreshes(slow, 1)] == ["abandoned", "abandoned"]
    assert slow.trace() == ["load", "load"]
