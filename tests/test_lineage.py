"""What the engine observes of the steps it runs, what the catalog adds, and the findings about both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.pipelines import Background, Pipeline, refused
from tests.servers import Database

Edges = dict[str, set[str]]

TABLES = """
create table bronze.orders (id bigint primary key, customer bigint, amount numeric);
insert into bronze.orders values (1, 1, 10), (2, 1, 20);
create table silver.customers (id bigint primary key);
insert into silver.customers values (1);
create table silver.orders (id bigint primary key, customer bigint references silver.customers, amount numeric);
create table silver.totals (customer bigint primary key, amount numeric);
"""
CUSTOMERS = "insert into silver.customers select distinct customer from bronze.orders on conflict do nothing"
ORDERS = "insert into silver.orders select * from bronze.orders on conflict (id) do update set amount = excluded.amount"
TOTALS = """insert into silver.totals select customer, sum(amount) from silver.orders group by 1
            on conflict (customer) do update set amount = excluded.amount"""


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    """Tables, and no procedure yet."""
    with Pipeline(db) as made:
        made.sql(TABLES)
        yield made


def edges(pipeline: Pipeline, source: str = "observed") -> dict[str, Edges]:
    """For each procedure what it does with each relation."""
    found: dict[str, Edges] = {}
    query = "select name, relation, access from etl.lineage where source = %s and is_current"
    for name, relation, access in pipeline.conn.execute(query, [source]):
        found.setdefault(name, {}).setdefault(relation, set()).add(access)
    return found


def findings(pipeline: Pipeline) -> list[tuple[Any, ...]]:
    """The findings, without their words."""
    query = "select finding, name, relation, sources from etl.lineage_findings order by 1, 2, 3"
    return pipeline.conn.execute(query).fetchall()


def shop(pipeline: Pipeline, **settings: Any) -> None:
    """Three procedures, each declared as it is."""
    pipeline.add("customers", CUSTOMERS, type="dimension", **settings)
    pipeline.add("orders", ORDERS, dependencies=["customers"], **settings)
    pipeline.add("totals", TOTALS, dependencies=["orders"], **settings)


# -- observed --


def test_a_step_shows_what_it_read_wrote_and_only_referred_to(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert edges(pipeline) == {
        "customers": {"bronze.orders": {"read"}, "silver.customers": {"write"}},
        "orders": {
            "bronze.orders": {"read"},
            "silver.customers": {"reference"},
            "silver.orders": {"write"},
        },
        "totals": {"silver.orders": {"read"}, "silver.totals": {"write"}},
    }


def test_the_edge_of_a_write_says_how_many_rows_and_every_edge_in_which_run(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply(observe_lineage="always")
    first, second = pipeline.start(), pipeline.start()
    row = pipeline.conn.execute(
        "select written_rows, first_run_id, last_run_id, first_seen_at < last_seen_at from etl.lineage"
        " where name = 'orders' and access = 'write'"
    ).fetchone()
    assert row == (2, first.run_id, second.run_id, True)
    assert (
        pipeline.value("select written_rows from etl.lineage where name = 'customers' and access = 'write'")
        == 0
    )


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_the_steps_of_a_group_share_their_locks_and_are_told_apart_all_the_same(
    pipeline: Pipeline, isolation: str
) -> None:
    shop(pipeline, group="shop", transaction_scope="per_group", isolation=isolation)
    pipeline.add(
        "again",
        "perform count(*) from silver.customers; update silver.totals set amount = 1 where customer = 1",
        dependencies=["totals"], group="shop", transaction_scope="per_group", isolation=isolation,
    )  # fmt: skip
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    found = edges(pipeline)
    assert found["orders"] == {
        "bronze.orders": {"read"}, "silver.customers": {"reference"}, "silver.orders": {"write"},
    }  # fmt: skip
    assert found["totals"] == {"silver.orders": {"read"}, "silver.totals": {"write"}}
    assert found["again"]["silver.customers"] == {"read"}
    assert "write" in found["again"]["silver.totals"]
    assert set(found["again"]) == {"silver.customers", "silver.totals"}


def test_a_step_of_a_group_that_only_looks_at_an_index_has_read_the_table(pipeline: Pipeline) -> None:
    pipeline.add("customers", CUSTOMERS, type="dimension", group="g", transaction_scope="per_group")
    pipeline.add(
        "reads",
        "perform from bronze.orders where id = 1; update silver.totals set amount = 0 where false",
        group="g", transaction_scope="per_group",
    )  # fmt: skip
    pipeline.apply()
    pipeline.start()
    assert edges(pipeline)["reads"] == {"bronze.orders": {"read"}, "silver.totals": {"write"}}


def test_dynamic_sql_triggers_and_helper_functions_hide_nothing(pipeline: Pipeline) -> None:
    pipeline.sql("""
        create table silver.log (at timestamptz default now());
        create function silver.note() returns trigger language plpgsql as $$ begin insert into silver.log default values; return null; end $$;
        create trigger note after insert on silver.totals execute function silver.note();
        create function silver.hidden() returns bigint language sql as 'select count(*) from silver.customers';
    """)
    pipeline.add("totals", "perform silver.hidden(); execute 'insert into silver.' || 'totals values (7, 7)'")
    pipeline.apply()
    pipeline.start()
    assert edges(pipeline) == {
        "totals": {"silver.customers": {"read"}, "silver.log": {"write"}, "silver.totals": {"write"}}
    }


def test_views_partitions_and_temporary_tables(pipeline: Pipeline) -> None:
    pipeline.sql("""
        create view silver.v as select * from bronze.orders;
        create table silver.parts (id bigint, amount numeric) partition by range (id);
        create table silver.parts_1 partition of silver.parts for values from (0) to (10);
    """)
    pipeline.add(
        "parts",
        "create temp table t on commit drop as select id, amount from silver.v;"
        " insert into silver.parts select * from t",
    )
    pipeline.apply()
    pipeline.start()
    assert edges(pipeline) == {
        "parts": {"silver.v": {"read"}, "bronze.orders": {"read"}, "silver.parts": {"write"}}
    }
    assert pipeline.value("select written_rows from etl.lineage where relation = 'silver.parts'") == 2
    assert edges(pipeline, "catalog") == {"parts": {"bronze.orders": {"read"}}}
    assert pipeline.value("select via from etl.lineage where source = 'catalog'") == "silver.v"


def test_names_that_need_quotes_are_written_with_them(pipeline: Pipeline) -> None:
    pipeline.sql('create table silver."Odd Name" (id int)')
    pipeline.add("odd", 'insert into silver."Odd Name" values (1)')
    pipeline.apply()
    pipeline.start()
    assert edges(pipeline) == {"odd": {'silver."Odd Name"': {"write"}}}
    assert pipeline.value("select written_rows from etl.lineage") == 1


def test_checks_and_other_procedures_of_the_run_are_not_part_of_it(pipeline: Pipeline) -> None:
    pipeline.add(
        "customers", CUSTOMERS, type="dimension",
        checks=[{"name": "some", "severity": "error", "type": "row_count", "table": "silver.totals", "min": 0, "max": None}],
    )  # fmt: skip
    pipeline.apply()
    pipeline.start()
    assert "silver.totals" not in edges(pipeline)["customers"]


def marked(pipeline: Pipeline, run_id: int) -> list[bool]:
    """Whether each step of a run was looked at."""
    query = "select coalesce(settings ? 'observe', false) from etl.procedure_runs where run_id = %s order by order_index"
    return [row[0] for row in pipeline.conn.execute(query, [run_id])]


def test_a_step_is_looked_at_once_per_mode_and_definition_and_day(pipeline: Pipeline) -> None:
    pipeline.add("orders", ORDERS, allow_full_refresh=True)
    pipeline.apply()
    assert marked(pipeline, pipeline.start().run_id) == [True]
    assert marked(pipeline, pipeline.start().run_id) == [False]
    full: dict[str, Any] = {"mode": "full", "confirm_full_refresh": True, "reason": "test"}
    assert marked(pipeline, pipeline.start(**full).run_id) == [True]
    assert marked(pipeline, pipeline.start(**full).run_id) == [False]
    pipeline.routine("orders", f"{ORDERS}; perform from silver.totals")
    assert marked(pipeline, pipeline.start().run_id) == [True]
    assert edges(pipeline)["orders"]["silver.totals"] == {"read"}
    pipeline.conn.execute("update etl.lineage_scans set scanned_at = scanned_at - interval '25 hours'")
    assert marked(pipeline, pipeline.start().run_id) == [True]


def test_what_an_older_routine_read_is_kept_and_not_current(pipeline: Pipeline) -> None:
    pipeline.add("orders", f"perform from silver.totals; {ORDERS}")
    pipeline.apply()
    pipeline.start()
    pipeline.routine("orders", ORDERS)
    pipeline.start()
    query = "select is_current from etl.lineage where relation = 'silver.totals'"
    assert pipeline.value(query) is False


def test_a_failed_step_is_looked_at_again(pipeline: Pipeline) -> None:
    pipeline.add("orders", f"{ORDERS}; perform 1 / (select count(*) from silver.totals)")
    pipeline.apply()
    assert pipeline.start().status == "failed"
    assert edges(pipeline) == {}
    pipeline.sql("insert into silver.totals values (1, 1)")
    assert marked(pipeline, pipeline.start().run_id) == [True]
    assert edges(pipeline)["orders"]["silver.totals"] == {"read"}


def test_never_looks_never_and_always_looks_always(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply(observe_lineage="never")
    assert marked(pipeline, pipeline.start().run_id) == [False, False, False]
    assert edges(pipeline) == {}
    pipeline.apply(observe_lineage="always")
    pipeline.start()
    assert marked(pipeline, pipeline.start().run_id) == [True, True, True]


def test_the_policy_is_a_part_of_the_configuration_and_its_default_is_no_change(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    plan = pipeline.value("select etl.plan_config(%s)", Jsonb(pipeline.spec(observe_lineage="daily")))
    assert plan["changes"] == []
    plan = pipeline.value("select etl.plan_config(%s)", Jsonb(pipeline.spec(observe_lineage="never")))
    assert [change["fields"] for change in plan["changes"]] == [{"observe_lineage": [None, "never"]}]


def test_a_dry_run_leaves_no_lineage(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    pipeline.conn.execute("call etl.start_run(dry_run => 'execute')")
    assert edges(pipeline) == {}


def test_several_sessions_observe_side_by_side(pipeline: Pipeline, db: Database) -> None:
    for number in range(12):
        pipeline.add(f"p{number}", "perform from silver.totals")
    pipeline.apply(observe_lineage="always")
    for _ in range(2):
        run_id = pipeline.value("select run_id from etl.submit_run()")
        sessions = [db.connect() for _ in range(2)]
        workers = [Background(lambda c=conn: c.execute("call etl.work()")) for conn in sessions]  # type: ignore[misc]
        for worker in workers:
            worker.result()
        assert pipeline.value("select status from etl.runs where run_id = %s", run_id) == "succeeded"
    assert len(edges(pipeline)) == 12


# -- catalog --


def test_the_catalog_knows_parsed_bodies_and_materialized_views(pipeline: Pipeline) -> None:
    pipeline.sql("""
        create function silver.helper() returns numeric language sql begin atomic select sum(amount) from silver.totals; end;
        create function silver.load() returns bigint language sql begin atomic
          insert into silver.customers select customer from bronze.orders where silver.helper() > 0 returning id; end;
        create materialized view silver.mv as select id, amount from silver.orders;
    """)
    pipeline.add("load", routine="silver.load",
                 mv_refresh=[{"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}])  # fmt: skip
    pipeline.apply()
    assert edges(pipeline, "catalog") == {
        "load": {"silver.customers": {"use"}, "bronze.orders": {"use"}, "silver.totals": {"use"}},
        "silver.mv": {"silver.orders": {"read"}},
    }
    row = pipeline.conn.execute("select kind, columns from etl.lineage where name = 'silver.mv'").fetchone()
    assert row == ("materialized view", ["amount", "id"])


# -- findings --


def test_a_pipeline_that_is_declared_as_it_is_has_no_finding(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    pipeline.start()
    assert findings(pipeline) == []


def test_reading_what_another_procedure_writes_without_saying_so(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.add("sneaks", "execute 'insert into silver.trace (step) select amount from silver.totals'")
    pipeline.apply()
    pipeline.start()
    assert findings(pipeline) == [("undeclared_read", "sneaks", "silver.totals", ["observed"])]
    row = pipeline.conn.execute("select detail, remedy from etl.lineage_findings").fetchone()
    assert row == (
        "sneaks reads silver.totals, which totals writes, and does not depend on it",
        "add to sneaks: dependencies: [totals]",
    )
    pipeline.change("sneaks", dependencies=["totals"])
    assert findings(pipeline) == []


def test_an_indirect_dependency_is_declared(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.add("last", "perform from silver.customers, silver.totals", dependencies=["totals"])
    pipeline.apply()
    pipeline.start()
    assert findings(pipeline) == []


def test_reading_through_a_view_is_reading(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create view silver.v as select * from silver.totals; create view silver.w as select * from silver.v"
    )
    shop(pipeline)
    pipeline.add("sneaks", "perform from silver.w")
    pipeline.apply()
    pipeline.start()
    assert findings(pipeline) == [("undeclared_read", "sneaks", "silver.totals", ["catalog", "observed"])]
    assert "through silver.v" in pipeline.value("select detail from etl.lineage_findings")


def test_a_dimension_that_reads_a_fact(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.add("regions", "perform from silver.totals", type="dimension")
    pipeline.apply()
    pipeline.start()
    assert [found[:3] for found in findings(pipeline)] == [
        ("fact_in_dimension", "regions", "silver.totals"),
        ("undeclared_read", "regions", "silver.totals"),
    ]
    pipeline.change("regions", dependencies=["totals"], allow_fact_dependency=True)
    pipeline.start()
    assert findings(pipeline) == []


def test_two_procedures_that_write_one_table_also_in_two_pipelines(pipeline: Pipeline, db: Database) -> None:
    shop(pipeline)
    pipeline.apply()
    pipeline.start()
    with Pipeline(db, "other") as other:
        other.add("totals_too", "insert into silver.totals values (9, 9) on conflict do nothing")
        other.apply()
        other.start(pipeline="other")
        assert [found[:3] for found in findings(pipeline)] == [
            ("two_writers", "totals", "silver.totals"),
            ("two_writers", "totals_too", "silver.totals"),
        ]


def test_a_dependency_that_nothing_is_used_of(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.add("idle", "perform from bronze.orders", dependencies=["totals"])
    pipeline.apply()
    pipeline.start()
    assert findings(pipeline) == [("unused_dependency", "idle", None, ["observed"])]


def test_an_order_for_a_foreign_key_is_used(pipeline: Pipeline) -> None:
    pipeline.add("customers", CUSTOMERS)
    pipeline.add("orders", ORDERS, dependencies=["customers"])
    pipeline.apply()
    pipeline.start()
    assert findings(pipeline) == []


def test_doctor_warns_of_what_was_seen(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    query = "select status, detail from etl.diagnose() where check_name = 'lineage'"
    sound = [("ok", "nothing was seen to be read or written that is not declared")]
    assert pipeline.conn.execute(query).fetchall() == sound
    pipeline.start()
    assert pipeline.conn.execute(query).fetchall() == sound
    pipeline.change("totals", dependencies=[])
    assert pipeline.conn.execute(query).fetchall() == [
        ("warn", "totals reads silver.orders, which orders writes, and does not depend on it")
    ]


def test_a_reader_sees_lineage_and_cannot_change_it(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    pipeline.start()
    conn = pipeline.login("etl_reader")
    assert conn.execute("select count(*) from etl.lineage where is_current").fetchone() == (7,)
    assert conn.execute("select * from etl.lineage_findings").fetchall() == []
    with refused("42501"):
        conn.execute("select etl.store_lineage('{}')")


# -- static, as the database keeps it --


def test_what_the_sql_says_replaces_what_it_said(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    store = "select etl.store_lineage(%s)"

    def said(*relations: tuple[str, str]) -> Any:
        return Jsonb({
            "totals": {"is_complete": True, "relations": [{"relation": r, "access": a, "columns": ["x"]} for r, a in relations]}
        })  # fmt: skip

    assert pipeline.value(store, said(("silver.orders", "read"), ("silver.totals", "write"))) == 2
    first = pipeline.value("select min(first_seen_at) from etl.lineage where relation = 'silver.totals'")
    assert pipeline.value(store, said(("silver.customers", "read"), ("silver.totals", "write"))) == 2
    assert edges(pipeline, "static") == {"totals": {"silver.customers": {"read"}, "silver.totals": {"write"}}}
    assert (
        pipeline.value("select min(first_seen_at) from etl.lineage where relation = 'silver.totals'") == first
    )
    assert pipeline.value("select columns from etl.lineage where relation = 'silver.totals'") == ["x"]


# -- the cursor of what was sent --


def cursor(pipeline: Pipeline) -> tuple[Any, ...] | None:
    query = "select floor_run_id, emitted_run_ids from etl.lineage_cursors where name = 'x'"
    return pipeline.conn.execute(query).fetchone()


def test_a_cursor_moves_over_runs_that_are_old_ended_and_sent(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    runs = [pipeline.start().run_id for _ in range(3)]
    move = "select etl.move_lineage_cursor('x', %s)"
    pipeline.conn.execute(move, [[runs[0], runs[2]]])
    assert cursor(pipeline) == (0, [runs[0], runs[2]]), "they are younger than an hour"
    with pipeline.db.connect() as conn:
        conn.execute("set session_replication_role = replica")
        conn.execute("update etl.runs set submitted_at = submitted_at - interval '2 hours'")
    pipeline.conn.execute(move, [[]])
    assert cursor(pipeline) == (runs[0], [runs[2]]), "the second was not sent"
    pipeline.conn.execute(move, [[runs[1]]])
    assert cursor(pipeline) == (runs[2], [])


def test_a_cursor_does_not_pass_a_run_that_has_not_ended(pipeline: Pipeline) -> None:
    shop(pipeline)
    pipeline.apply()
    queued = pipeline.value("select run_id from etl.submit_run()")
    with pipeline.db.connect() as conn:
        conn.execute("set session_replication_role = replica")
        conn.execute("update etl.runs set submitted_at = submitted_at - interval '2 hours'")
    pipeline.conn.execute("select etl.move_lineage_cursor('x', %s)", [[queued]])
    assert cursor(pipeline) == (0, [queued])
