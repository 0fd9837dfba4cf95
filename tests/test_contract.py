"""b2s test and etl.test_procedure: routines that keep their contract pass, each way to break it is found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from b2s import demo
from b2s.cli import main
from b2s.demo.generate import arrive, generate
from b2s.sync import sync_config
from tests.pipelines import Background, Gate, Pipeline, Row, refused
from tests.servers import Connection, Database

PROJECT: Final = Path(__file__).resolve().parents[1]

OBJECTS: Final = """
create table bronze.events (
  id bigint primary key, key text not null, amount int not null, at timestamptz,
  etl_xid xid8 not null default pg_current_xact_id());
insert into bronze.events (id, key, amount, at)
select n, 'k' || n % 4, n, timestamptz '2026-11-01 00:00+00' + n * interval '1 hour'
  from generate_series(1, 12) n;
create table silver.events (id bigint primary key, key text not null, amount int not null);
create table silver.copies (id bigint, key text, amount int);
create table silver.totals (key text primary key, total bigint not null)
"""

WINDOW: Final = "p_since timestamptz, p_until timestamptz"
INSIDE: Final = "(p_since is null or e.at >= p_since) and e.at < p_until"
UPSERT: Final = (
    "insert into silver.events select e.id, e.key, e.amount from bronze.events e where {}"
    " on conflict (id) do update set key = excluded.key, amount = excluded.amount"
)
COPY: Final = "insert into silver.copies select e.id, e.key, e.amount from bronze.events e where {}"
TOTALS: Final = (
    "insert into silver.totals as t select e.key, sum(e.amount) from bronze.events e where {}"
    " group by e.key on conflict (key) do update set total = {}"
)


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql(OBJECTS)
        yield pipeline


def by(column: str = "at", strategy: str = "timestamp") -> Row:
    return {"strategy": strategy, "source": [f"bronze.events.{column}"], "state_key": "load", "delay_ms": 0}


def findings(
    pipeline: Pipeline, name: str = "load", conn: Connection | None = None, **given: Any
) -> list[Row]:
    """What a test of the procedure finds; contents and locks are as before."""
    before = contents(pipeline)
    conn = conn or pipeline.conn
    named = ", ".join(f"{key} => %({key})s" for key in given)
    query = f"select to_jsonb(t) from etl.test_procedure(%(name)s{', ' if given else ''}{named}) t"
    found = [row for (row,) in conn.execute(query.encode(), {"name": name, **given})]
    assert contents(pipeline) == before
    return found


def contents(pipeline: Pipeline) -> list[Any]:
    """Every row of every table of the test, and what is locked."""
    tables = pipeline.column(
        "select format('%%I.%%I', schemaname, tablename) from pg_tables"
        " where schemaname in ('bronze', 'silver')"
        " union all select 'etl.state' union all select 'etl.runs' order by 1"
    )
    rows = [pipeline.column(f"select to_jsonb(t)::text from {table} t order by 1") for table in tables]
    locks = pipeline.column(
        "select l.relation::regclass::text from pg_locks l join pg_stat_activity a using (pid)"
        " where a.backend_type = 'client backend' and l.locktype = 'relation' and l.relation >= 16384"
        " and l.mode <> 'AccessShareLock'"
        " and l.database = (select oid from pg_database where datname = current_database())"
    )
    return [tables, rows, locks]


def statuses(found: list[Row]) -> dict[str, str]:
    return {row["check_name"]: row["status"] for row in found}


def failures(found: list[Row]) -> list[str]:
    return [row["check_name"] for row in found if row["status"] == "fail" and row["check_name"] != "snapshot"]


def of(found: list[Row], check_name: str) -> Row:
    return next(row for row in found if row["check_name"] == check_name)


def rows_of(finding: Row) -> list[tuple[str, Row]]:
    """The difference as pairs of change and row."""
    return [(line["change"], line["row"]) for line in finding["difference"]]


def configure(pipeline: Pipeline, body: str, arguments: str = WINDOW, **settings: Any) -> None:
    pipeline.add("load", body, arguments=arguments, watermark=by(), **settings)
    pipeline.apply()


# -- routines that keep their contract --

GOOD: Final = {
    "insert on conflict": UPSERT.format(INSIDE),
    "merge": "merge into silver.events t using (select * from bronze.events e where " + INSIDE + ") e"
    " on t.id = e.id when matched then update set amount = e.amount"
    " when not matched then insert values (e.id, e.key, e.amount)",
    "delete and insert": "delete from silver.copies c using bronze.events e where c.id = e.id and "
    + INSIDE + "; " + COPY.format(INSIDE),
    "totals of touched keys": TOTALS.format(
        "e.key in (select e.key from bronze.events e where " + INSIDE + ")", "excluded.total"
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", GOOD.values(), ids=GOOD.keys())
def test_a_routine_that_keeps_its_contract_passes_every_check(pipeline: Pipeline, body: str) -> None:
    configure(pipeline, body)
    found = findings(pipeline)
    assert statuses(found) == {
        "runs": "ok", "deterministic": "ok", "idempotent": "ok", "splits": "ok", "boundary": "ok",
        "nulls": "ok", "rows_reported": "ok", "empty_window": "ok",
    }  # fmt: skip
    assert [row["difference"] for row in found] == [None] * len(found)
    assert "12 row(s) in its sources" in of(found, "runs")["detail"]


def test_a_loaded_target_is_tested_like_an_empty_one(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format("(p_since is null or e.at > p_since) and e.at < p_until"))
    assert pipeline.start().status == "succeeded"
    found = findings(pipeline)
    assert failures(found) == ["splits", "boundary"]
    assert "emptied for the checks that follow: silver.events" in of(found, "runs")["detail"]


def test_a_procedure_that_reports_rows_through_an_argument_is_tested(pipeline: Pipeline) -> None:
    body = UPSERT.format(INSIDE)
    pipeline.sql(
        f"create procedure silver.load({WINDOW}, inout p_rows bigint default null) language plpgsql as"
        f" $$ begin {body}; get diagnostics p_rows = row_count; end $$"
    )
    pipeline.add("load", routine="silver.load", watermark=by())
    pipeline.apply()
    found = findings(pipeline)
    assert failures(found) == []
    assert of(found, "rows_reported")["detail"] == "it returned 12; it wrote 12"


def test_windows_of_ids_are_tested(pipeline: Pipeline) -> None:
    pipeline.add("load", UPSERT.format("e.id >= coalesce(p_since, 0) and e.id < p_until"),
                 arguments="p_since bigint, p_until bigint", watermark=by("id", "id"))  # fmt: skip
    pipeline.apply()
    found = findings(pipeline)
    assert set(statuses(found).values()) == {"ok"}
    assert "[the beginning, 13)" in of(found, "runs")["detail"]
    assert "cut at 5, 9" in of(found, "splits")["detail"]


@pytest.mark.parametrize(
    "condition", ["e.id > p_since and e.id <= p_until", "e.id between p_since and p_until"]
)
def test_windows_of_ids_shifted_by_one_or_closed_are_found(pipeline: Pipeline, condition: str) -> None:
    pipeline.add("load", UPSERT.format(condition.replace("p_since", "coalesce(p_since, 0)")),
                 arguments="p_since bigint, p_until bigint", watermark=by("id", "id"))  # fmt: skip
    pipeline.apply()
    assert failures(findings(pipeline)) == ["boundary"]


def more_transactions(pipeline: Pipeline) -> None:
    for n in range(13, 19):
        pipeline.conn.execute(
            "insert into bronze.events values (%s, 'k1', %s, '2026-11-02 00:00+00')", [n, n]
        )


def test_windows_of_transactions_are_tested(pipeline: Pipeline) -> None:
    more_transactions(pipeline)
    pipeline.add("load", UPSERT.format("etl.arrived(e.etl_xid, p_since, p_until)"),
                 arguments="p_since pg_snapshot, p_until pg_snapshot",
                 watermark=by("etl_xid", "xid"))  # fmt: skip
    pipeline.apply()
    found = findings(pipeline)
    assert set(statuses(found).values()) == {"ok"}
    assert "18 row(s)" in of(found, "runs")["detail"]
    assert "in 3 pieces" in of(found, "splits")["detail"]


def test_ids_of_transactions_compared_as_numbers_are_found(pipeline: Pipeline) -> None:
    more_transactions(pipeline)
    condition = (
        "(p_since is null or e.etl_xid >= pg_snapshot_xmax(p_since))"
        " and e.etl_xid < pg_snapshot_xmax(p_until)"
    )
    pipeline.add("load", UPSERT.format(condition), arguments="p_since pg_snapshot, p_until pg_snapshot",
                 watermark=by("etl_xid", "xid"))  # fmt: skip
    pipeline.apply()
    boundary = of(findings(pipeline), "boundary")
    assert boundary["status"] == "fail"
    assert "etl.arrived(etl_xid, p_since, p_until)" in boundary["remedy"]


def test_a_procedure_without_a_watermark_is_run_twice(pipeline: Pipeline) -> None:
    pipeline.add("load", UPSERT.format("true"))
    pipeline.add("doubles", COPY.format("true"))
    pipeline.apply()
    assert statuses(findings(pipeline)) == {
        "runs": "ok", "deterministic": "ok", "idempotent": "ok", "rows_reported": "ok",
    }  # fmt: skip
    assert failures(findings(pipeline, "doubles")) == ["idempotent"]


def test_the_routines_of_the_demo_keep_their_contract(db: Database) -> None:
    conn = db.connect()
    demo.install(conn)
    generate(conn, customers=80, products=20, orders=150, ingested_at=datetime(2025, 6, 1, tzinfo=UTC))
    sync_config(conn, PROJECT / "transformations.yaml")
    conn.execute("call etl.start_run()")
    arrive(conn, ingested_at=datetime(2025, 6, 2, tzinfo=UTC))
    names = [name for (name,) in conn.execute("select name from etl.list_procedures()")]
    assert len(names) == 6
    for name in names:
        found = conn.execute(
            "select check_name, status, detail from etl.test_procedure(%s, ignore_columns => '{updated_at}')",
            [name],
        ).fetchall()
        assert {status for _, status, _ in found} == {"ok"}, (name, found)


# -- each way to break it --


def test_a_plain_insert_is_found_by_running_it_twice(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(INSIDE))
    found = findings(pipeline)
    assert failures(found) == ["idempotent"]
    doubled = of(found, "idempotent")
    assert doubled["detail"] == "run once (-) and twice (+): rows silver.copies +12"
    assert len(doubled["difference"]) == 12
    assert doubled["difference"][0]["table"] == "silver.copies"
    assert ("+", {"id": 1, "key": "k1", "amount": 1}) in rows_of(doubled)
    assert "on conflict" in doubled["remedy"]


def test_a_plain_insert_with_a_key_is_found_by_its_error(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE).partition(" on conflict")[0])
    twice = of(findings(pipeline), "idempotent")
    assert twice["status"] == "fail"
    assert "duplicate key value violates unique constraint" in twice["detail"]
    assert "Key (id)=(1) already exists." in twice["detail"]
    assert "PL/pgSQL function silver.load" in twice["detail"]
    assert "_contract" not in twice["detail"]


CLOSED: Final = {
    "<=": "(p_since is null or e.at >= p_since) and e.at <= p_until",
    "between": "e.at between coalesce(p_since, '-infinity') and p_until",
}


@pytest.mark.parametrize("condition", CLOSED.values(), ids=CLOSED.keys())
def test_a_closed_interval_is_found_at_the_boundary(pipeline: Pipeline, condition: str) -> None:
    configure(pipeline, UPSERT.format(condition))
    found = findings(pipeline)
    assert failures(found) == ["boundary"]
    boundary = of(found, "boundary")
    assert "at p_until" in boundary["detail"]
    assert rows_of(boundary) == [("+", {"id": 1, "key": "k1", "amount": 1})]
    assert "at < p_until" in boundary["remedy"]


def test_a_closed_interval_that_inserts_reads_a_row_of_the_cut_twice(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(CLOSED["<="]))
    splits = of(findings(pipeline), "splits")
    assert splits["status"] == "fail"
    assert [row["id"] for change, row in rows_of(splits) if change == "+"] == [5, 9]


def test_an_open_lower_bound_loses_the_rows_at_the_cut(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format("(p_since is null or e.at > p_since) and e.at < p_until"))
    found = findings(pipeline)
    assert failures(found) == ["splits", "boundary"]
    assert [(change, row["id"]) for change, row in rows_of(of(found, "splits"))] == [("-", 5), ("-", 9)]
    assert "at p_since" in of(found, "boundary")["detail"]
    assert "at >= p_since" in of(found, "boundary")["remedy"]


def test_a_routine_that_reads_up_to_now_is_found_at_the_boundary(pipeline: Pipeline) -> None:
    pipeline.conn.execute("update bronze.events set at = at - interval '30 days'")
    configure(pipeline, UPSERT.format("(p_since is null or e.at >= p_since) and e.at < now()"))
    assert failures(findings(pipeline)) == ["boundary"]


def test_a_first_run_that_reads_past_its_end_is_found_at_the_boundary(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format("p_since is null or (e.at >= p_since and e.at < p_until)"))
    boundary = of(findings(pipeline), "boundary")
    assert boundary["status"] == "fail"
    assert "[the beginning, " in boundary["detail"]


def test_a_first_run_that_reads_nothing_is_found(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format("e.at >= p_since and e.at < p_until"))
    assert failures(findings(pipeline)) == ["splits", "boundary"]
    boundary = of(findings(pipeline, since="2026-11-01 05:00+00"), "boundary")
    assert "where p_since is null" in boundary["detail"]
    assert "(p_since is null or at >= p_since)" in boundary["remedy"]


def test_a_routine_that_ignores_its_window_and_inserts_is_found_everywhere(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format("true"))
    assert failures(findings(pipeline)) == ["idempotent", "splits", "boundary", "empty_window"]


def test_sums_of_a_window_that_replace_the_sum_are_found_by_splitting_it(pipeline: Pipeline) -> None:
    configure(pipeline, TOTALS.format(INSIDE, "excluded.total"))
    found = findings(pipeline)
    assert failures(found) == ["splits"]
    assert rows_of(of(found, "splits"))[:2] == [
        ("-", {"key": "k0", "total": 4 + 8 + 12}), ("+", {"key": "k0", "total": 12}),
    ]  # fmt: skip
    assert "from all its rows" in of(found, "splits")["remedy"]


def test_sums_that_are_added_up_are_found_by_running_twice(pipeline: Pipeline) -> None:
    configure(pipeline, TOTALS.format(INSIDE, "t.total + excluded.total"))
    assert failures(findings(pipeline)) == ["idempotent"]


def test_a_difference_shows_twenty_rows_and_counts_all(pipeline: Pipeline) -> None:
    pipeline.sql(
        "insert into bronze.events select n, 'k', n, now() - n * interval '1 hour'"
        " from generate_series(101, 150) n"
    )
    configure(pipeline, COPY.format(INSIDE))
    doubled = of(findings(pipeline), "idempotent")
    assert len(doubled["difference"]) == 20
    assert doubled["detail"].endswith("rows silver.copies +62")


def test_an_error_is_reported_with_its_remedy_and_ends_the_test(pipeline: Pipeline) -> None:
    configure(pipeline, "insert into silver.nowhere select 1")
    (runs,) = findings(pipeline)
    assert (runs["check_name"], runs["status"]) == ("runs", "fail")
    assert 'relation "silver.nowhere" does not exist' in runs["detail"]
    assert runs["remedy"].startswith("create what is missing")


FORBIDDEN: Final = {
    "commits": ("commit", "invalid transaction termination"),
    "asserts": ("assert false, 'broken'", "broken"),
    "fails late": (
        "insert into silver.copies values (1, 'x', 1); raise sqlstate 'PT200' using message = 'late'",
        "late",
    ),
}


@pytest.mark.parametrize(("body", "said"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_a_routine_that_cannot_run_leaves_nothing(pipeline: Pipeline, body: str, said: str) -> None:
    configure(pipeline, body)
    (runs,) = findings(pipeline)
    assert runs["status"] == "fail"
    assert runs["remedy"]
    assert said in runs["detail"]


def test_a_check_that_does_not_hold_is_reported(pipeline: Pipeline) -> None:
    check = {"name": "few", "type": "row_count", "table": "silver.copies", "max": 3, "severity": "error"}
    configure(pipeline, COPY.format(INSIDE), checks=[check])
    (runs,) = findings(pipeline)
    assert "check few found 1 violation(s)" in runs["detail"]


def test_clock_and_random_values_are_a_warning_and_not_compared(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.stamped (id bigint primary key, loaded_at timestamptz, dice float8)")
    configure(pipeline, f"insert into silver.stamped select e.id, clock_timestamp(), random()"
              f" from bronze.events e where {INSIDE}"
              " on conflict (id) do update set loaded_at = excluded.loaded_at")  # fmt: skip
    found = findings(pipeline)
    assert failures(found) == []
    volatile = of(found, "deterministic")
    assert volatile["status"] == "warn"
    assert volatile["detail"].endswith("silver.stamped.dice, silver.stamped.loaded_at")
    assert volatile["remedy"].endswith("dice, loaded_at")
    for ignored in (["dice", "loaded_at"], ["silver.stamped.dice", "loaded_at"]):
        assert of(findings(pipeline, ignore_columns=ignored), "deterministic")["status"] == "ok"


def test_rows_chosen_by_chance_are_found_by_running_once_more(pipeline: Pipeline) -> None:
    pipeline.sql("create sequence silver.turns")
    configure(pipeline, UPSERT.format(f"{INSIDE} and e.id > nextval('silver.turns') %% 7".replace("%%", "%")))
    deterministic = of(findings(pipeline), "deterministic")
    assert deterministic["status"] == "fail"
    assert deterministic["difference"]


SERIAL: Final = {
    "identity": "generated by default as identity",
    "serial": "default nextval('silver.numbers')",
}


@pytest.mark.parametrize("declared", SERIAL.values(), ids=SERIAL.keys())
def test_keys_drawn_by_the_table_are_not_compared(pipeline: Pipeline, declared: str) -> None:
    pipeline.sql(
        f"create sequence silver.numbers;"
        f" create table silver.keyed (key_id bigint {declared}, id bigint unique)"
    )
    configure(pipeline, f"delete from silver.keyed k using bronze.events e where k.id = e.id and {INSIDE};"
              f" insert into silver.keyed (id) select e.id from bronze.events e where {INSIDE}")  # fmt: skip
    assert set(statuses(findings(pipeline)).values()) == {"ok"}


@pytest.mark.parametrize("returned", ["null::bigint", "-1"])
def test_a_number_of_rows_that_is_none_is_a_warning(pipeline: Pipeline, returned: str) -> None:
    configure(pipeline, f"{UPSERT.format(INSIDE)}; return {returned}")
    found = findings(pipeline)
    assert failures(found) == []
    assert of(found, "rows_reported")["status"] == "warn"
    assert "it wrote 12" in of(found, "rows_reported")["detail"]


# -- rows without a value --


def test_rows_without_a_value_are_counted(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    pipeline.sql("update bronze.events set at = null where id in (3, 4)")
    nulls = of(findings(pipeline), "nulls")
    assert (nulls["status"], nulls["detail"][:9]) == ("warn", "2 row(s) ")
    assert "alter table bronze.events alter column at set not null" in nulls["remedy"]


def test_a_column_that_is_never_null_is_fine(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    pipeline.sql("alter table bronze.events alter column at set not null")
    assert of(findings(pipeline), "nulls")["detail"] == "bronze.events.at is not null"


def test_a_routine_that_fails_on_a_row_without_a_value_is_found(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.dated (id bigint primary key, at timestamptz not null)")
    configure(pipeline, "insert into silver.dated select e.id, e.at from bronze.events e"
              f" where e.at is null or {INSIDE} on conflict (id) do nothing")  # fmt: skip
    found = findings(pipeline)
    assert failures(found) == ["nulls"]
    assert "violates not-null constraint" in of(found, "nulls")["detail"]


def test_a_row_without_a_value_that_only_one_kind_of_window_reads_is_found(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.numbered (id bigint, at timestamptz)")
    configure(pipeline, "delete from silver.numbered n using bronze.events e where n.id = e.id"
              " and " + INSIDE + ";"
              " insert into silver.numbered select e.id, e.at from bronze.events e where"
              " e.at is null and p_since is not null or " + INSIDE)  # fmt: skip
    nulls = of(findings(pipeline), "nulls")
    assert nulls["status"] == "fail"
    assert {row["at"] for _, row in rows_of(nulls)} >= {None}


def test_where_no_row_can_be_put_the_check_is_skipped(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    pipeline.conn.execute(
        "alter table bronze.events owner to postgres; revoke all on bronze.events from etl_owner;"
        " grant select on bronze.events to etl_owner"
    )
    nulls = of(findings(pipeline), "nulls")
    assert nulls["status"] == "skipped"
    assert "permission denied" in nulls["detail"]
    assert "set not null" in nulls["remedy"]


# -- windows --


def test_the_window_given_is_the_one_tested(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    found = findings(pipeline, since="2026-11-01 04:00+00", until="2026-11-01 08:00+00", pieces=4)
    assert "of 4 row(s) in its sources; wrote 4 row(s)" in of(found, "runs")["detail"]
    assert "in 4 pieces" in of(found, "splits")["detail"]


@pytest.mark.parametrize(
    "given",
    [
        {"since": "soon"},
        {"since": "2026-11-02 00:00+00", "until": "2026-11-01 00:00+00"},
    ],
)
def test_a_window_that_is_none_is_refused(pipeline: Pipeline, given: Row) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    with refused("PT422", "test.window"):
        findings(pipeline, **given)


def test_what_has_no_watermark_takes_no_window(pipeline: Pipeline) -> None:
    pipeline.add("load", UPSERT.format("true"))
    pipeline.apply()
    with refused("PT422", "test.window"):
        findings(pipeline, until="2026-11-01 00:00+00")


def test_the_newest_rows_of_a_large_source_are_the_window(pipeline: Pipeline) -> None:
    pipeline.sql("insert into bronze.events"
                 " select n, 'k', n, timestamptz '2026-11-02 00:00+00' + n * interval '1 second'"
                 " from generate_series(101, 10300) n")  # fmt: skip
    configure(pipeline, UPSERT.format(INSIDE))
    found = findings(pipeline)
    assert failures(found) == []
    assert "of 10000 row(s) in its sources" in of(found, "runs")["detail"]


def test_a_source_that_is_empty_proves_little(pipeline: Pipeline) -> None:
    pipeline.sql("delete from bronze.events")
    configure(pipeline, UPSERT.format(INSIDE))
    found = findings(pipeline)
    assert of(found, "runs")["status"] == "warn"
    assert statuses(found)["splits"] == statuses(found)["boundary"] == "skipped"


@pytest.mark.parametrize("end", ["", " -- the newest"])
def test_a_source_that_is_a_query_cannot_be_cut(pipeline: Pipeline, end: str) -> None:
    pipeline.add("load", UPSERT.format(INSIDE), arguments=WINDOW,
                 watermark=by() | {"source": [f"select max(e.at) from bronze.events e{end}"]})  # fmt: skip
    pipeline.apply()
    found = findings(pipeline)
    assert statuses(found) == {
        "runs": "ok", "deterministic": "ok", "idempotent": "ok", "splits": "skipped", "rows_reported": "ok",
        "empty_window": "ok",
    }  # fmt: skip
    assert "wrote 12 row(s) in silver.events" in of(found, "runs")["detail"]


def test_two_sources_are_tested_one_by_one(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.labels (key text, label text, at timestamptz not null);"
                 " insert into bronze.labels values ('k1', 'one', '2026-11-01 03:30+00'),"
                 "   ('k2', 'two', '2026-11-01 06:30+00');"
                 " create table silver.labelled (id bigint primary key, label text)")  # fmt: skip
    condition = "(p_since is null or {0}.at >= p_since) and {0}.at {1} p_until"
    pipeline.add(
        "load",
        "insert into silver.labelled select e.id, l.label"
        " from bronze.events e left join bronze.labels l using (key)"
        f" where {condition.format('e', '<')} or {condition.format('l', '<=')}"
        " on conflict (id) do update set label = excluded.label",
        arguments=WINDOW,
        watermark=by() | {"source": ["bronze.events.at", "bronze.labels.at"]},
    )
    pipeline.apply()
    found = findings(pipeline)
    boundary = [
        (row["status"], "bronze.labels" in row["detail"]) for row in found if row["check_name"] == "boundary"
    ]
    assert boundary == [("ok", False), ("fail", True)]
    assert [row["status"] for row in found if row["check_name"] == "nulls"] == ["ok", "ok"]


# -- full refresh, parameters, settings --

FULL: Final = "if p_mode = 'full' then {} end if; " + UPSERT.format(
    "(p_mode = 'full' or p_since is null or e.at >= p_since) and e.at < p_until"
)


def test_a_full_refresh_is_tested_where_it_is_allowed(pipeline: Pipeline) -> None:
    configure(
        pipeline, FULL.format("delete from silver.events;"), f"p_mode text, {WINDOW}", allow_full_refresh=True
    )
    assert of(findings(pipeline), "full")["status"] == "ok"
    logs = FULL.format("delete from silver.events; insert into silver.trace (step) values ('full');")
    pipeline.routine("load", logs, f"p_mode text, {WINDOW}")
    full = of(findings(pipeline), "full")
    assert full["status"] == "fail"
    assert rows_of(full) == [("+", {"step": "full"})]
    pipeline.change("load", allow_full_refresh=False)
    assert "full" not in statuses(findings(pipeline))


def test_a_source_too_large_for_a_full_refresh_is_left_out(pipeline: Pipeline) -> None:
    configure(
        pipeline, FULL.format("delete from silver.events;"), f"p_mode text, {WINDOW}", allow_full_refresh=True
    )
    found = findings(pipeline, since="2026-11-01 09:00+00", max_rows=10)
    assert of(found, "full")["status"] == "skipped"
    assert failures(found) == []


def test_parameters_and_settings_are_those_of_a_run(pipeline: Pipeline) -> None:
    declared = {"name": "country", "type": "string", "enum": ["DE", "US"], "required": True}
    pipeline.add("load", "insert into copies"
                 " select e.id, country, p_run_id from bronze.events e where " + INSIDE,
                 arguments=f"{WINDOW}, country text, p_run_id bigint", watermark=by(),
                 params=[declared])  # fmt: skip
    pipeline.apply(search_path=["silver"])
    with refused("PT422", "params.invalid"):
        findings(pipeline, params='{"country": "FR"}')
    doubled = of(findings(pipeline, params='{"country": "DE"}'), "idempotent")
    assert rows_of(doubled)[0] == ("+", {"id": 1, "key": "DE", "amount": -1})


# -- the scratch copy --


def test_more_rows_than_allowed_are_refused(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(INSIDE))
    with refused("PT422", "test.too_large") as refusal:
        findings(pipeline, max_rows=11)
    assert "window" in refusal.message
    pipeline.sql("insert into silver.copies select n, 'x', n from generate_series(1, 20) n")
    with refused("PT422", "test.too_large") as refusal:
        findings(pipeline, max_rows=15)
    assert refusal.message.startswith("silver.copies holds more than 15 rows")


def test_a_table_that_may_only_be_written_is_refused(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(INSIDE))
    pipeline.conn.execute(
        "alter table silver.copies owner to postgres; revoke all on silver.copies from etl_owner;"
        " grant insert on silver.copies to etl_owner"
    )
    with refused("PT403", "test.not_readable") as refusal:
        findings(pipeline)
    assert refusal.hint == "grant select on silver.copies to etl_owner"


def test_an_unknown_procedure_and_impossible_numbers_are_refused(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(INSIDE))
    with refused("PT404", "procedure.unknown"):
        findings(pipeline, "lood")
    impossible: list[Row] = [{"pieces": 1}, {"pieces": 101}, {"max_rows": 0}]
    for given in impossible:
        with refused("PT422", "request.invalid"):
            findings(pipeline, **given)


def test_tables_that_refer_to_the_target_are_emptied_with_it(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.notes (id bigint references silver.events)")
    configure(pipeline, UPSERT.format("(p_since is null or e.at > p_since) and e.at < p_until"))
    pipeline.start()
    pipeline.sql("insert into silver.notes values (3)")
    found = findings(pipeline)
    assert of(found, "runs")["detail"].endswith(
        "emptied for the checks that follow: silver.events, silver.notes"
    )
    assert failures(found) == ["splits", "boundary"]


def test_a_target_that_cannot_be_emptied_is_tested_as_it_is(pipeline: Pipeline) -> None:
    pipeline.sql("create function silver.keep() returns trigger language plpgsql as"
                 " $$ begin raise 'kept'; end $$; create trigger keep before delete on silver.events"
                 " for each row execute function silver.keep()")  # fmt: skip
    configure(pipeline, UPSERT.format(INSIDE))
    pipeline.start()
    found = findings(pipeline)
    assert "emptied" not in of(found, "runs")["detail"]
    assert failures(found) == []
    assert of(found, "boundary")["status"] == "skipped"
    assert "cannot be emptied" in of(found, "boundary")["detail"]


def test_a_table_whose_rows_are_only_changed_keeps_them(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.keys (key text primary key, seen bigint);"
                 " insert into silver.keys select 'k' || n from generate_series(0, 3) n")  # fmt: skip
    configure(pipeline, UPSERT.format(INSIDE) + "; update silver.keys k set seen = coalesce(k.seen, 0) + q.n"
              f" from (select e.key, count(*) as n from bronze.events e where {INSIDE} group by e.key) q"
              " where q.key = k.key")  # fmt: skip
    found = findings(pipeline)
    assert of(found, "runs")["detail"].endswith("emptied for the checks that follow: silver.events")
    assert failures(found) == ["idempotent"]
    assert rows_of(of(found, "idempotent"))[:2] == [
        ("-", {"key": "k0", "seen": 3}),
        ("+", {"key": "k0", "seen": 6}),
    ]


def test_partitions_are_compared_as_one_table(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.parts (id bigint, amount int) partition by range (id);"
                 " create table silver.parts_low partition of silver.parts for values from (0) to (6);"
                 " create table silver.parts_high partition of silver.parts"
                 "   for values from (6) to (99)")  # fmt: skip
    configure(pipeline, f"insert into silver.parts select e.id, e.amount from bronze.events e where {INSIDE}")
    doubled = of(findings(pipeline), "idempotent")
    assert doubled["detail"].endswith("rows silver.parts +12")


def test_truncate_temporary_tables_and_tables_made_on_the_way_are_no_trouble(pipeline: Pipeline) -> None:
    configure(pipeline, "create temp table stage on commit drop as"
              " select * from bronze.events e where " + INSIDE
              + "; create table if not exists silver.extra (id bigint primary key); truncate silver.copies;"
              " insert into silver.extra select s.id from stage s on conflict do nothing;"
              " insert into silver.copies select s.id, s.key, s.amount from stage s")  # fmt: skip
    found = findings(pipeline)
    assert failures(found) == ["splits", "empty_window"]
    assert of(found, "splits")["detail"].endswith("rows silver.copies -8")
    assert pipeline.value("select to_regclass('silver.extra') is null")
    assert pipeline.column("select relname from pg_class where relname = 'stage'") == []


def test_deferred_constraints_are_checked_after_each_call(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.parents (id bigint primary key);"
                 " create table silver.children (id bigint primary key, parent_id bigint"
                 "   references silver.parents deferrable initially deferred)")  # fmt: skip
    children = (
        f"insert into silver.children select e.id, e.id from bronze.events e where {INSIDE}"
        " on conflict do nothing"
    )
    parents = (
        f"insert into silver.parents select e.id from bronze.events e where {INSIDE} on conflict do nothing"
    )
    configure(pipeline, f"{children}; {parents}")
    found = findings(pipeline)
    assert failures(found) == []
    assert of(found, "runs")["detail"].endswith("follow: silver.children, silver.parents")
    pipeline.routine("load", children, WINDOW)
    (runs,) = findings(pipeline)
    assert "violates foreign key constraint" in runs["detail"]


def test_deferred_constraints_of_others_are_left_alone(pipeline: Pipeline) -> None:
    pipeline.conn.execute(
        "create schema others; create table others.parents (id bigint primary key);"
        " create table others.children (parent_id bigint"
        "   references others.parents deferrable initially deferred)"
    )
    configure(pipeline, UPSERT.format(INSIDE))
    assert failures(findings(pipeline)) == []


def test_a_routine_that_empties_its_source_is_tested(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE) + f"; delete from bronze.events e where {INSIDE}")
    found = findings(pipeline)
    assert failures(found) == []
    assert "emptied for the checks that follow: silver.events" in of(found, "runs")["detail"]


def test_a_routine_that_writes_nothing_has_nothing_to_compare(pipeline: Pipeline) -> None:
    configure(pipeline, "perform count(*) from bronze.events e where " + INSIDE)
    (runs,) = findings(pipeline)
    assert (runs["status"], "it wrote to no table" in runs["detail"]) == ("warn", True)


def test_a_temporary_table_of_the_caller_is_refused(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    admin = pipeline.login("etl_admin")
    admin.execute("create temp table stage (id int)")
    with refused("PT409", "session.temporary_objects"):
        findings(pipeline, conn=admin)
    admin.execute("discard temp")


def test_admins_may_test_and_operators_may_not(pipeline: Pipeline) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    assert failures(findings(pipeline, conn=pipeline.login("etl_admin"))) == []
    with refused("42501"):
        findings(pipeline, conn=pipeline.login("etl_operator"))


def test_a_test_in_the_middle_of_a_transaction_leaves_that_as_it_was(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(INSIDE))
    with pipeline.db.connect() as conn, conn.transaction():
        conn.execute("insert into silver.copies values (77, 'mine', 7)")
        conn.execute("set local lock_timeout = '7s'")
        conn.execute("select * from etl.test_procedure('load')")
        assert conn.execute("show lock_timeout").fetchone() == ("7s",)
    assert pipeline.column("select id from silver.copies") == [77]


def test_a_cancelled_test_leaves_nothing(pipeline: Pipeline) -> None:
    configure(pipeline, f"{COPY.format(INSIDE)}; {Gate.WAIT}")
    before = contents(pipeline)
    conn = pipeline.db.connect()
    with pipeline.gate() as gate:
        testing = Background(lambda: conn.execute("select * from etl.test_procedure('load')"))
        (pid,) = gate.wait_for_arrivals()
        pipeline.conn.execute("select pg_cancel_backend(%s)", [pid])
        with pytest.raises(psycopg.errors.QueryCanceled):
            testing.result()
    assert contents(pipeline) == before


def test_a_table_that_others_lock_is_not_waited_for_long(pipeline: Pipeline) -> None:
    configure(pipeline, "perform set_config('lock_timeout', '50ms', true); " + COPY.format(INSIDE))
    with pipeline.db.connect() as other, other.transaction():
        other.execute("lock table silver.copies in share mode")
        (runs,) = [
            row for (row,) in pipeline.conn.execute("select to_jsonb(t) from etl.test_procedure('load') t")
        ]
    assert "lock timeout" in runs["detail"]
    assert runs["remedy"].endswith("test again when no run is active")


def test_locks_are_waited_for_five_seconds_whatever_is_configured(pipeline: Pipeline) -> None:
    body = "insert into silver.trace (step) values (current_setting('lock_timeout'))"
    configure(pipeline, body, lock_timeout_ms=600_000)
    assert rows_of(of(findings(pipeline), "idempotent")) == [("+", {"step": "5s"})]


def test_rows_committed_meanwhile_are_a_caveat_that_repeatable_read_does_without(pipeline: Pipeline) -> None:
    configure(pipeline, COPY.format(INSIDE))
    caveat = of(findings(pipeline), "snapshot")
    assert (caveat["status"], "repeatable read" in caveat["remedy"]) == ("warn", True)
    with pipeline.db.connect() as conn, conn.transaction():
        conn.execute("set transaction isolation level repeatable read")
        assert "snapshot" not in statuses(findings(pipeline, conn=conn))


# -- b2s test --


def b2s(capsys: pytest.CaptureFixture[str], pipeline: Pipeline, *words: str) -> tuple[int, str, str]:
    code = main(["test", "--dsn", pipeline.db.dsn, *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_prints_a_line_per_check_and_the_rows_that_differ(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.sql("alter table silver.totals alter column total type numeric(24, 2)")
    pipeline.sql("update bronze.events set amount = 2000000000 + id")
    totals = TOTALS.format(INSIDE, "excluded.total")
    configure(pipeline, totals.replace("sum(e.amount)", "10000000 * sum(e.amount)"))
    code, out, _ = b2s(capsys, pipeline, "load")
    assert code == 1
    lines = out.splitlines()
    assert lines[0] == "load"
    assert "ok       idempotent: run twice is run once" in lines
    start = next(
        i for i, line in enumerate(lines) if line.startswith("fail     splits: in one piece (-) and")
    )
    assert lines[start + 1].startswith("         remedy: read ")
    assert lines[start + 2 : start + 5] == [
        "         silver.totals",
        '         - {"key": "k0", "total": 60000000240000000.00}',
        '         + {"key": "k0", "total": 20000000120000000.00}',
    ]  # fmt: skip
    assert lines[-1] == "1 procedure tested, failed: load; everything was rolled back"
    assert "snapshot" not in out


def test_the_command_tests_all_and_goes_on_after_a_refusal(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    pipeline.add("another", UPSERT.format("e.id < 3"))
    pipeline.apply()
    code, out, _ = b2s(capsys, pipeline, "--all", "--max-rows", "5", "--json")
    assert code == 1
    tested = json.loads(out)
    assert [(one["procedure"], one["status"]) for one in tested] == [("another", "ok"), ("load", "fail")]
    assert list(tested[0]["findings"][0]) == ["check_name", "status", "detail", "remedy", "difference"]
    assert "holds more than 5 rows" in tested[1]["findings"][0]["detail"]
    assert b2s(capsys, pipeline, "--all")[0] == 0


def test_the_command_passes_window_parameters_and_columns_on(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.sql("create table silver.stamped (id bigint, size int, at timestamptz, primary key (id, size))")
    pipeline.add("load", "insert into silver.stamped select e.id, p_size, clock_timestamp()"
                 f" from bronze.events e where {INSIDE}"
                 " on conflict (id, size) do update set at = excluded.at",
                 arguments=f"{WINDOW}, p_size int", watermark=by(),
                 params=[{"name": "size", "type": "integer", "required": True}])  # fmt: skip
    pipeline.apply()
    code, out, _ = b2s(
        capsys, pipeline, "load", "--param", "size=7", "--ignore", "at", "--pieces", "2",
        "--since", "2026-11-01 02:00+00", "--until", "2026-11-01 06:00+00",
    )  # fmt: skip
    assert (code, "warn" in out) == (0, False)
    assert "of 4 row(s)" in out
    assert "in 2 pieces" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "name the procedures to test, or --all"),
        (("load", "--all"), 2, "name the procedures to test, or --all"),
        (("load", "other", "--param", "a=1"), 2, "does not say of which procedure"),
        (("lood",), 3, "there is no procedure lood"),
        (("load", "--until", "soon"), 3, "until is not a bound of the timestamp strategy: soon"),
    ],
)
def test_the_command_explains_what_it_cannot_do(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    configure(pipeline, UPSERT.format(INSIDE))
    ended, _, err = b2s(capsys, pipeline, *words)
    assert ended == code
    assert said in err
    assert "hint: " in err


# -- docs/testing.md --


def blocks(language: str) -> list[str]:
    text = (PROJECT / "docs" / "testing.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_the_command_prints(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.sql(
        "create table bronze.payments (payment_id bigint primary key, customer text not null,"
        "   amount numeric(12, 2) not null, received_at timestamptz);"
        " insert into bronze.payments select n, (array['ada','grace','linus'])[1 + n % 3], n * 10,"
        "   timestamptz '2026-11-20 08:00+00' + n * interval '1 hour' from generate_series(1, 9) n;"
        " create table silver.balances (customer text primary key, paid numeric(12, 2) not null,"
        "   updated_at timestamptz not null default clock_timestamp())"
    )
    routine, condition = blocks("sql")
    wrong = re.search(r"   where .*?\n(?=   group by)", routine, flags=re.DOTALL)
    assert wrong
    pipeline.sql(routine)
    pipeline.add("silver.balances", routine="silver.load_balances",
                 watermark=by() | {"source": ["bronze.payments.received_at"]})  # fmt: skip
    pipeline.apply()
    repaired = routine.replace(wrong[0], condition).replace("create function", "create or replace function")
    for page in blocks("text"):
        command, _, expected = page.partition("\n")
        words = command.removeprefix("$ b2s ").split()
        main([*words, "--dsn", f"{pipeline.db.dsn} options='-c timezone=UTC'"])
        assert capsys.readouterr().out == expected
        pipeline.sql(repaired)
