"""etl.start_run: what it selects, in which order it runs it, what it passes, counts, refuses and shows."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.pipelines import Pipeline, messages_of, refused
from tests.servers import Database


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        yield pipeline


@pytest.fixture
def family(pipeline: Pipeline) -> Pipeline:
    """sales needs customers and products, products categories, returns sales; stock stands alone."""
    pipeline.add("sales", dependencies=["customers", "products"], tags=["daily"])
    pipeline.add("returns", dependencies=["sales"], tags=["weekly"])
    pipeline.add("stock", tags=["daily"])
    pipeline.add("products", type="dimension", dependencies=["categories"], group="master_data")
    pipeline.add("customers", type="dimension", group="master_data")
    pipeline.add("categories", type="dimension")
    pipeline.apply()
    return pipeline


EVERYTHING = ["categories", "customers", "products", "returns", "sales", "stock"]


# -- order and selection --


def test_a_run_executes_the_whole_pipeline_in_order_and_returns_its_id_and_status(family: Pipeline) -> None:
    run = family.start()

    assert run.status == "succeeded"
    assert run.run_id == family.value("select max(run_id) from etl.runs")
    order = family.trace()
    assert sorted(order) == EVERYTHING
    assert order.index("categories") < order.index("products") < order.index("sales") < order.index("returns")


def test_no_fact_starts_before_every_dimension_has_ended(pipeline: Pipeline) -> None:
    pipeline.add("a_fact")
    pipeline.add("z_dimension", type="dimension")
    pipeline.add("y_dimension", type="dimension", dependencies=["z_dimension"])
    pipeline.apply()
    pipeline.start()
    assert pipeline.trace() == ["z_dimension", "y_dimension", "a_fact"]


def test_a_failed_dimension_does_not_skip_facts_that_do_not_declare_it(pipeline: Pipeline) -> None:
    pipeline.add("broken", "perform 1 / 0", type="dimension")
    pipeline.add("free")
    pipeline.add("bound", dependencies=["broken"])
    pipeline.apply()
    run = pipeline.start()
    assert run.status == "failed"
    assert pipeline.outcomes(run.run_id) == {
        "broken": "failed",
        "free": "succeeded",
        "bound": "upstream_failed",
    }


def test_a_dimension_may_follow_a_fact_when_it_declares_that(pipeline: Pipeline) -> None:
    pipeline.add("fact")
    pipeline.add("rollup", type="dimension", dependencies=["fact"], allow_fact_dependency=True)
    pipeline.add("plain", type="dimension")
    pipeline.apply()
    pipeline.start()
    assert pipeline.trace() == ["plain", "fact", "rollup"]


@pytest.mark.parametrize(
    ("request_", "selected"),
    [
        ({"procedures": ["sales"]}, ["sales"]),
        ({"groups": ["master_data"]}, ["customers", "products"]),
        ({"tags": ["daily"]}, ["sales", "stock"]),
        (
            {"procedures": ["categories"], "groups": ["master_data"], "tags": ["weekly"]},
            ["categories", "customers", "products", "returns"],
        ),
        ({"procedures": ["products"], "with_upstream": True}, ["categories", "products"]),
        ({"procedures": ["products"], "with_downstream": True}, ["products", "returns", "sales"]),
        (
            {"procedures": ["sales"], "with_upstream": True, "with_downstream": True},
            ["categories", "customers", "products", "returns", "sales"],
        ),
    ],
    ids=str,
)
def test_a_request_selects_by_name_group_and_tag(
    family: Pipeline, request_: dict[str, Any], selected: list[str]
) -> None:
    run = family.start(**request_)
    assert sorted(family.trace()) == selected
    assert sorted(family.outcomes(run.run_id)) == selected
    assert family.run(run.run_id)["step_count"] == len(selected)


def test_dependencies_outside_the_selection_are_not_run_and_their_age_is_kept(family: Pipeline) -> None:
    family.start(procedures=["products"])
    run = family.start(procedures=["sales", "customers"])
    customers, products = family.step(run.run_id, "sales")["dependencies"]
    assert customers == {"procedure": "customers", "in_run": True}
    assert (products["procedure"], products["in_run"]) == ("products", False)
    assert datetime.fromisoformat(products["last_success_at"]) < datetime.now(UTC)
    notes = [row["notes"] for row in family.plan(procedures=["returns"])]
    assert notes[0].startswith("needs sales, which is not in this run and last succeeded at ")
    notes = [row["notes"] for row in family.plan(procedures=["products"])]
    assert notes == ["needs categories, which is not in this run and never succeeded"]


def test_order_is_kept_through_procedures_that_are_not_selected_without_requiring_them(
    pipeline: Pipeline,
) -> None:
    pipeline.add("a_last", dependencies=["b_between"])
    pipeline.add("b_between", dependencies=["c_first"])
    pipeline.add("c_first", "insert into silver.trace (step) values ('c_first'); perform 1 / 0")
    pipeline.apply()
    run = pipeline.start(procedures=["a_last", "c_first"])
    assert [s["procedure_name"] for s in pipeline.steps(run.run_id)] == ["c_first", "a_last"]
    assert pipeline.outcomes(run.run_id) == {"c_first": "failed", "a_last": "succeeded"}


def test_unknown_names_are_all_reported_at_once(family: Pipeline) -> None:
    with refused("PT404", "procedure.unknown") as refusal:
        family.start(procedures=["sales", "nope", "neither"], groups=["no_group"], tags=["no_tag"])
    assert refusal.messages == [
        "there is no procedure neither",
        "there is no procedure nope",
        "there is no group no_group",
        "there is no tag no_tag",
    ]
    assert family.value("select count(*) from etl.runs") == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"groups": ["nope"]}, "group.unknown"),
        ({"tags": ["nope"]}, "tag.unknown"),
        ({"pipeline": "nope"}, "pipeline.unknown"),
        ({"mv_refresh": ["mart.nope"]}, "mv_refresh.unknown"),
    ],
    ids=str,
)
def test_each_kind_of_unknown_name_has_its_code(
    family: Pipeline, request_: dict[str, Any], code: str
) -> None:
    with refused("PT404", code):
        family.start(**request_)


def test_an_empty_selection_is_refused(family: Pipeline) -> None:
    with refused("PT422", "selection.empty"):
        family.start(procedures=[])


def test_a_procedure_that_was_removed_from_the_configuration_is_unknown(family: Pipeline) -> None:
    family.procedures = [p for p in family.procedures if p["name"] != "stock"]
    family.apply()
    with refused("PT404", "procedure.unknown"):
        family.start(procedures=["stock"])
    assert "stock" not in family.outcomes(family.start().run_id)


def test_without_any_pipeline_the_error_says_how_to_configure_one(pipeline: Pipeline) -> None:
    with refused("PT404", "pipeline.unknown") as refusal:
        pipeline.start()
    assert "b2s sync-config" in refusal.hint


@pytest.mark.parametrize(
    "request_",
    [
        {"mode": "fully"},
        {"transaction_scope": "per_run"},
        {"max_concurrency": 0},
        {"max_concurrency": 65},
        {"mv_refresh": "yes"},
    ],
    ids=str,
)
def test_an_invalid_value_of_the_request_is_refused(family: Pipeline, request_: dict[str, Any]) -> None:
    with refused("PT422", "request.invalid") as refusal:
        family.start(**request_)
    (name, value) = next(iter(request_.items()))
    assert [problem["loc"] for problem in refusal.detail["errors"]] == [[name]]
    assert name == "mv_refresh" or str(value) in refusal.message


# -- the contract of a routine --


ADDS_TWO = "insert into silver.trace (step) values ('x'), ('y')"


@pytest.mark.parametrize(
    ("definition", "body", "rows"),
    [
        ("function silver.load() returns bigint language sql", "select 7::bigint", 7),
        ("function silver.load() returns bigint language sql", "select null::bigint", 0),
        ("function silver.load() returns int language sql", "select 7", 7),
        ("function silver.load() returns void language sql", ADDS_TWO, 2),
        ("function silver.load() returns text language sql", f"{ADDS_TWO} returning '9'", 2),
        ("function silver.load(out p_rows bigint, out note text) language sql", "select 7::bigint, ''", 7),
        ("function silver.load(out counted int) language sql", "select 7", 7),
        ("function silver.load() returns setof int language sql", f"{ADDS_TWO} returning 9", 2),
        ("function silver.load() returns table (rows int) language sql", f"{ADDS_TWO} returning 9", 2),
        ("procedure silver.load(inout p_rows int default 1) language plpgsql", "begin p_rows := 7; end", 7),
        ("procedure silver.load(inout rows int) language plpgsql", "begin rows := 7; end", 7),
        ("procedure silver.load(out p_rows bigint) language plpgsql", "begin p_rows := 7; end", 7),
        ("procedure silver.load(out note text) language sql", f"{ADDS_TWO} returning 'x'", 2),
        ("procedure silver.load() language sql", ADDS_TWO, 2),
    ],
)
def test_rows_come_from_what_the_routine_returns_else_from_the_server(
    pipeline: Pipeline, definition: str, body: str, rows: int
) -> None:
    pipeline.sql(f"create {definition} as $${body}$$")
    pipeline.add("load", routine="silver.load")
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.step(run.run_id, "load")["rows_affected"] == rows


def test_a_routine_receives_the_contract_arguments_it_declares(pipeline: Pipeline) -> None:
    pipeline.sql("create table silver.got (mode text, since timestamptz, until timestamptz, run_id bigint)")
    pipeline.sql("create table bronze.src (at timestamptz)")
    pipeline.add(
        "load",
        "insert into silver.got values (p_mode, p_since, p_until, p_run_id)",
        arguments="p_run_id bigint, p_until timestamptz, p_mode text, p_since timestamptz",
        watermark={"strategy": "timestamp", "source": ["bronze.src.at"], "state_key": "load", "delay_ms": 0},
    )
    pipeline.apply()
    first, second = pipeline.start(), pipeline.start()
    one, two = pipeline.rows("select * from silver.got order by run_id")
    assert (one["mode"], one["since"], one["run_id"]) == ("incremental", None, first.run_id)
    assert (two["mode"], two["since"], two["run_id"]) == ("incremental", one["until"], second.run_id)
    assert one["until"] < two["until"]


def test_args_name_the_arguments_of_a_routine_that_has_its_own_names(pipeline: Pipeline) -> None:
    pipeline.sql(
        "create function silver.legacy(run bigint, in_country text, out note text, out loaded int)"
        " language sql"
        " as 'select run || in_country, 11'"
    )
    pipeline.add(
        "legacy",
        routine="silver.legacy",
        params=[{"name": "country", "type": "string", "required": True}],
        args={"p_run_id": "run", "country": "in_country", "rows": "loaded"},
    )
    pipeline.apply()
    run = pipeline.start(params={"legacy": {"country": "DE"}})
    assert pipeline.step(run.run_id, "legacy")["rows_affected"] == 11


def test_an_overload_is_chosen_by_its_signature(pipeline: Pipeline) -> None:
    pipeline.sql("create function silver.load() returns int language sql as 'select 1'")
    pipeline.sql("create function silver.load(p_mode text) returns int language sql as 'select 2'")
    pipeline.add("load", routine="silver.load(text)")
    pipeline.apply()
    assert pipeline.step(pipeline.start().run_id, "load")["rows_affected"] == 2


# -- parameters --


PARAMS: list[dict[str, Any]] = [
    {"name": "country", "type": "string", "required": False, "enum": ["DE", "US"], "default": "DE"},
    {"name": "batch", "type": "integer", "required": True, "minimum": 1, "maximum": 100},
    {"name": "rate", "type": "number", "required": False, "minimum": 0},
    {"name": "flags", "type": "array", "required": False, "items": {"type": "string"}, "maxItems": 2},
    {"name": "days", "type": "array", "required": False, "items": {"type": "string", "format": "date"}},
    {"name": "since_day", "type": "string", "required": False, "format": "date"},
    {"name": "options", "type": "array", "required": False, "items": {"type": "string"}, "minItems": 2},
    {"name": "is_dry", "type": "boolean", "required": False},
]


@pytest.fixture
def parametrised(pipeline: Pipeline) -> Pipeline:
    pipeline.sql("create table silver.got (value jsonb)")
    pipeline.add(
        "load",
        "insert into silver.got select jsonb_build_object('country', country, 'batch', p_batch, 'rate', rate,"
        " 'flags', flags, 'days', days, 'since_day', since_day, 'options', options, 'is_dry', is_dry)",
        arguments="country text, p_batch int, rate numeric default 0.5,"
        " flags text[] default '{routine,default}',"
        " days date[] default null, since_day date default '2020-01-01', options jsonb default '{}',"
        " is_dry boolean default false",
        params=PARAMS,
    )
    pipeline.add("other")
    pipeline.apply()
    return pipeline


def test_defaults_come_from_the_declaration_then_from_the_routine(parametrised: Pipeline) -> None:
    run = parametrised.start(procedures=["load"], params={"load": {"batch": 5}})
    assert run.status == "succeeded"
    assert parametrised.value("select value from silver.got") == {
        "country": "DE", "batch": 5, "rate": 0.5, "flags": ["routine", "default"], "days": None,
        "since_day": "2020-01-01", "options": {}, "is_dry": False,
    }  # fmt: skip


def test_given_parameters_arrive_in_the_types_of_the_arguments(parametrised: Pipeline) -> None:
    given = {
        "country": "US", "batch": 7, "rate": 1.25, "flags": ["a,b", 'c"}'], "days": ["2024-02-29"],
        "since_day": "2024-12-31", "options": ["x", "y"], "is_dry": True,
    }  # fmt: skip
    run = parametrised.start(procedures=["load"], params={"load": given})
    assert run.status == "succeeded"
    assert parametrised.value("select value from silver.got") == given


def test_a_null_parameter_counts_as_not_given(parametrised: Pipeline) -> None:
    parametrised.start(procedures=["load"], params={"load": {"batch": 1, "country": None, "rate": None}})
    value = parametrised.value("select value from silver.got")
    assert (value["country"], value["rate"]) == ("DE", 0.5)
    with refused("PT422", "params.invalid"):
        parametrised.start(procedures=["load"], params={"load": {"batch": None}})


def test_all_invalid_parameters_are_reported_at_once(parametrised: Pipeline) -> None:
    with refused("PT422", "params.invalid") as refusal:
        parametrised.start(
            params={
                "load": {
                    "country": "FR", "batch": 101, "rate": -1,
                    "flags": ["a", "b", "c"], "days": ["2024-02-30"],
                    "since_day": "yesterday", "options": ["x"], "is_dry": "true", "colour": "red",
                },
                "other": {"n": 1},
            }
        )  # fmt: skip
    assert {tuple(problem["loc"][1:]) for problem in refusal.detail["errors"]} == {
        ("load", "country"), ("load", "batch"), ("load", "rate"), ("load", "flags"), ("load", "days"),
        ("load", "since_day"), ("load", "options"), ("load", "is_dry"), ("load", "colour"), ("other", "n"),
    }  # fmt: skip
    assert set(refusal.codes) == {"params.invalid"}
    assert 'param country of load must be one of ["DE", "US"], not "FR"' in refusal.messages
    assert "param n of other is unknown; it takes none" in refusal.messages
    assert parametrised.value("select count(*) from etl.runs") == 0


@pytest.mark.parametrize("value", ["7", 7.5, True, [7], {"n": 7}, 0, 101, 10**30], ids=repr)
def test_a_parameter_of_the_wrong_type_or_range_is_refused(parametrised: Pipeline, value: object) -> None:
    with refused("PT422", "params.invalid") as refusal:
        parametrised.start(procedures=["load"], params={"load": {"batch": value}})
    assert [problem["loc"] for problem in refusal.detail["errors"]] == [["params", "load", "batch"]]


def test_a_missing_required_parameter_is_refused(parametrised: Pipeline) -> None:
    with refused("PT422", "params.invalid") as refusal:
        parametrised.start()
    assert refusal.messages == ["param batch of load is required"]


def test_parameters_for_a_procedure_that_is_not_selected_are_refused(parametrised: Pipeline) -> None:
    with refused("PT422", "params.unused") as refusal:
        parametrised.start(procedures=["other"], params={"load": {"batch": 1}, "nobody": {}})
    assert len(refusal.messages) == 2


@pytest.mark.parametrize("given", [[1], "text", {"load": [1]}, {"load": None}], ids=str)
def test_params_that_are_no_objects_are_refused(parametrised: Pipeline, given: object) -> None:
    with pytest.raises(psycopg.Error) as caught:
        parametrised.conn.execute("call etl.start_run(procedures => '{load}', params => %s)", [Jsonb(given)])
    assert caught.value.sqlstate == "PT422"


def test_the_run_keeps_parameters_statement_and_dependencies_as_they_were(parametrised: Pipeline) -> None:
    run = parametrised.start(params={"load": {"batch": 3}})
    before = parametrised.step(run.run_id, "load")
    assert before["parameters"] == {"country": "DE", "batch": 3}
    assert parametrised.run(run.run_id)["parameters"] == {"load": {"country": "DE", "batch": 3}}
    assert parametrised.run(run.run_id)["request"] == {"params": {"load": {"batch": 3}}}
    parametrised.change(
        "load", params=[{**p, "default": "US"} if p["name"] == "country" else p for p in PARAMS]
    )
    assert parametrised.step(run.run_id, "load") == before


def test_the_statement_in_step_history_can_be_run_as_it_stands(parametrised: Pipeline) -> None:
    run = parametrised.start(procedures=["load"], params={"load": {"batch": 3, "flags": ["it's", "$1"]}})
    statement = parametrised.value("select statement from etl.step_history where run_id = %s", run.run_id)
    parametrised.sql(statement)
    assert parametrised.value("select count(*) from (select distinct value from silver.got) d") == 1
    assert parametrised.value("select count(*) from silver.got") == 2


# -- row counts per table --


def counts(inserted: int = 0, updated: int = 0, deleted: int = 0) -> dict[str, int]:
    return {"inserted": inserted, "updated": updated, "deleted": deleted}


@pytest.fixture
def tables(pipeline: Pipeline) -> Pipeline:
    pipeline.sql("create table silver.t (id int primary key, v int); create table silver.u (id int)")
    pipeline.sql("insert into silver.t select g, 0 from generate_series(1, 10) g")
    return pipeline


CHANGES = (
    "insert into silver.t select g, 0 from generate_series(11, 13) g;"
    " update silver.t set v = 1 where id <= 5;"
    " delete from silver.t where id > 11; insert into silver.u values (1); perform count(*) from silver.trace"
)


def test_rows_inserted_updated_and_deleted_are_counted_per_table(tables: Pipeline) -> None:
    tables.routine("load", CHANGES, returns="void")
    tables.add("load", routine="silver.load")
    tables.apply()
    step = tables.step(tables.start().run_id, "load")
    assert step["table_counts"] == {"silver.t": counts(3, 5, 2), "silver.u": counts(1)}
    assert step["rows_affected"] == 11


def test_two_runs_of_one_session_count_each_their_own(tables: Pipeline) -> None:
    tables.add("load", "insert into silver.u values (1), (2)")
    tables.apply()
    runs = [tables.start(), tables.start()]
    assert [tables.step(run.run_id, "load")["table_counts"] for run in runs] == [{"silver.u": counts(2)}] * 2


def test_the_steps_of_a_group_count_each_their_own(tables: Pipeline) -> None:
    for name in ("a", "b"):
        tables.add(name, f"insert into silver.u select 1 from generate_series(1, {1 if name == 'a' else 2})",
                   group="g", transaction_scope="per_group")  # fmt: skip
    tables.apply()
    run = tables.start()
    assert [s["table_counts"] for s in tables.steps(run.run_id)] == [
        {"silver.u": counts(1)},
        {"silver.u": counts(2)},
    ]


def test_what_a_failed_step_wrote_is_not_counted_for_the_next_one(tables: Pipeline) -> None:
    tables.add("a_broken", "insert into silver.u select generate_series(1, 100); perform 1 / 0")
    tables.add("b_good", "insert into silver.u values (1)")
    tables.apply()
    run = tables.start()
    assert tables.step(run.run_id, "a_broken")["table_counts"] is None
    assert tables.step(run.run_id, "b_good")["table_counts"] == {"silver.u": counts(1)}


def test_a_table_that_is_truncated_and_filled_counts_what_was_filled_in(tables: Pipeline) -> None:
    tables.add("a_first", "insert into silver.t select generate_series(101, 104), 0")
    tables.add("b_reload", "truncate silver.t; insert into silver.t select g, 0 from generate_series(1, 6) g")
    tables.apply()
    run = tables.start()
    assert tables.step(run.run_id, "b_reload")["table_counts"] == {"silver.t": counts(6)}


def test_a_step_that_truncates_what_its_group_has_filled_counts_its_own(tables: Pipeline) -> None:
    tables.add("a_before", "insert into silver.t select generate_series(201, 203), 0")
    for name, body in (
        ("b_fill", "insert into silver.t select generate_series(101, 110), 0"),
        ("c_reload", "truncate silver.t; insert into silver.t select g, 0 from generate_series(1, 6) g"),
    ):
        tables.add(name, body, group="g", transaction_scope="per_group")
    tables.apply()
    run = tables.start()
    assert tables.step(run.run_id, "b_fill")["table_counts"] == {"silver.t": counts(10)}
    assert tables.step(run.run_id, "c_reload")["table_counts"] == {"silver.t": counts(6)}


def test_temporary_tables_are_not_counted(tables: Pipeline) -> None:
    tables.add(
        "load",
        "create temp table scratch (id int) on commit drop; insert into scratch values (1), (2);"
        " insert into silver.u select id from scratch",
    )
    tables.apply()
    assert tables.step(tables.start().run_id, "load")["table_counts"] == {"silver.u": counts(2)}


def test_what_holds_the_long_values_of_a_table_is_not_counted_beside_it(tables: Pipeline) -> None:
    """Nor after a step that had a temporary table, when all locks are looked at."""
    tables.sql("create table silver.w (word text); alter table silver.w alter word set storage external")
    long = "insert into silver.w values (repeat('x', 10000))"
    tables.add("a", f"create temp table scratch (id int) on commit drop; {long}")
    tables.add("b", long, dependencies=["a"])
    tables.apply()
    steps = tables.steps(tables.start().run_id)
    assert [step["table_counts"] for step in steps] == [{"silver.w": counts(1)}] * 2


def test_rows_of_a_partitioned_table_are_counted_by_partition(tables: Pipeline) -> None:
    tables.sql(
        "create table silver.p (id int) partition by range (id);"
        " create table silver.p_low partition of silver.p for values from (0) to (10);"
        " create table silver.p_high partition of silver.p for values from (10) to (20)"
    )
    tables.add("load", "insert into silver.p select generate_series(8, 12)")
    tables.apply()
    step = tables.step(tables.start().run_id, "load")
    assert step["table_counts"] == {"silver.p_low": counts(2), "silver.p_high": counts(3)}
    assert step["rows_affected"] == 5


def test_a_step_that_changes_nothing_counts_nothing(tables: Pipeline) -> None:
    tables.routine(
        "load", "perform count(*) from silver.t; update silver.t set v = 1 where false", returns="void"
    )
    tables.add("load", routine="silver.load")
    tables.apply()
    step = tables.step(tables.start().run_id, "load")
    assert (step["table_counts"], step["rows_affected"]) == ({}, 0)


# -- windows --


def test_as_of_caps_the_window_and_never_moves_the_watermark_back(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.src (at timestamptz)")
    pipeline.add(
        "load",
        arguments="p_since timestamptz, p_until timestamptz",
        watermark={"strategy": "timestamp", "source": ["bronze.src.at"], "state_key": "key", "delay_ms": 0},
    )
    pipeline.apply()
    noon = datetime(2024, 6, 1, 12, tzinfo=UTC)
    capped = pipeline.start(as_of=noon)
    step = pipeline.step(capped.run_id, "load")
    assert step["window_since"] is None
    assert datetime.fromisoformat(step["window_until"]) == noon
    assert datetime.fromisoformat(pipeline.watermark("key") or "") == noon

    earlier = pipeline.start(as_of=noon - timedelta(days=1))
    step = pipeline.step(earlier.run_id, "load")
    assert earlier.status == "succeeded"
    assert step["window_since"] == step["window_until"] == pipeline.watermark("key")
    assert datetime.fromisoformat(pipeline.watermark("key") or "") == noon

    later = pipeline.start(as_of=datetime(2999, 1, 1, tzinfo=UTC))
    until = datetime.fromisoformat(pipeline.step(later.run_id, "load")["window_until"])
    assert until <= pipeline.run(later.run_id)["ended_at"]


def test_the_delay_of_a_watermark_holds_the_window_back(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.src (at timestamptz)")
    watermark = {
        "strategy": "timestamp",
        "source": ["bronze.src.at"],
        "state_key": "key",
        "delay_ms": 3_600_000,
    }
    pipeline.add("load", arguments="p_since timestamptz, p_until timestamptz", watermark=watermark)
    pipeline.apply()
    run = pipeline.start()
    until = datetime.fromisoformat(pipeline.step(run.run_id, "load")["window_until"])
    assert until <= pipeline.run(run.run_id)["ended_at"] - timedelta(hours=1)


# -- overrides --


def test_transaction_scope_can_be_overridden_for_one_run(pipeline: Pipeline) -> None:
    pipeline.add("a_good", group="g")
    pipeline.add("b_broken", "perform 1 / 0", group="g")
    pipeline.add("c_alone")
    pipeline.apply()
    run = pipeline.start(transaction_scope="per_group")
    assert pipeline.trace() == ["c_alone"]
    assert {s["procedure_name"]: s["tx_scope"] for s in pipeline.steps(run.run_id)} == {
        "a_good": "per_group", "b_broken": "per_group", "c_alone": "per_procedure",
    }  # fmt: skip
    assert pipeline.outcomes(run.run_id)["a_good"] == "rolled_back"

    for name in ("a_good", "b_broken"):
        next(p for p in pipeline.procedures if p["name"] == name)["transaction_scope"] = "per_group"
    pipeline.apply()
    run = pipeline.start(transaction_scope="per_procedure")
    assert pipeline.outcomes(run.run_id) == {
        "a_good": "succeeded",
        "b_broken": "failed",
        "c_alone": "succeeded",
    }


def test_refreshes_can_be_overridden_for_one_run(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv_a as select count(*) as n from silver.trace")
    pipeline.sql("create materialized view silver.mv_b as select count(*) as n from silver.trace")
    refresh = {"after": "run", "on": "success", "concurrently": "auto"}
    pipeline.add("load", mv_refresh=[{"name": f"silver.mv_{x}", **refresh} for x in "ab"])
    pipeline.add("other")
    pipeline.apply()

    def refreshed(**arguments: Any) -> list[str]:
        return pipeline.column(
            "select mv_name from etl.mv_refreshes where run_id = %s order by 1",
            pipeline.start(**arguments).run_id,
        )

    assert refreshed() == ["silver.mv_a", "silver.mv_b"]
    assert refreshed(mv_refresh=False) == []
    assert refreshed(mv_refresh=["silver.mv_b"]) == ["silver.mv_b"]
    assert refreshed(mv_refresh=True) == ["silver.mv_a", "silver.mv_b"]
    assert refreshed(procedures=["other"]) == []
    assert refreshed(procedures=["other"], mv_refresh=["silver.mv_a"]) == ["silver.mv_a"]


# -- where it can be called --


HINT = "autocommit"


def test_inside_a_transaction_block_it_says_what_to_do(family: Pipeline) -> None:
    family.conn.execute("begin")
    with refused("25001", "call.in_transaction") as refusal:
        family.start()
    family.conn.execute("rollback")
    assert HINT in refusal.hint
    assert family.start().status == "succeeded"


def test_without_autocommit_it_says_what_to_do(family: Pipeline) -> None:
    with refused("25001", "call.in_transaction") as refusal:
        family.start(family.db.connect(autocommit=False))
    assert "autocommit=True" in refusal.hint


@pytest.mark.parametrize(
    "statement",
    [
        "select silver.calls()",
        "do $$ begin execute 'call etl.start_run()'; end $$",
        "select 1; call etl.start_run()",
        "call etl.start_run(); select 1",
        "set b2s.progress = 'json'; call etl.start_run()",
    ],
)
def test_in_a_context_that_cannot_commit_it_says_what_to_do(family: Pipeline, statement: str) -> None:
    family.conn.execute(
        "create function silver.calls() returns void language plpgsql as"
        " $$ declare r bigint; s text; begin call etl.start_run(run_id => r, status => s); end $$"
    )
    with refused("25001", "call.in_transaction") as refusal:
        family.conn.execute(statement.encode())
    assert HINT in refusal.hint
    assert family.value("select count(*) from etl.runs") == 0


def test_a_do_block_may_call_it(family: Pipeline) -> None:
    family.conn.execute(
        "do $$ declare r bigint; s text; begin call etl.start_run(run_id => r, status => s);"
        " assert s = 'succeeded'; end $$"
    )
    assert sorted(family.trace()) == EVERYTHING


def test_a_procedure_may_call_it(family: Pipeline) -> None:
    family.conn.execute(
        "create procedure silver.nightly() language plpgsql as $$ declare r bigint; s text;"
        " begin call etl.start_run(tags => '{daily}', run_id => r, status => s); end $$"
    )
    family.conn.execute("call silver.nightly()")
    assert sorted(family.trace()) == ["sales", "stock"]


def test_a_psycopg_pipeline_may_hold_it_alone(family: Pipeline) -> None:
    with family.conn.pipeline():
        cursor = family.conn.execute("call etl.start_run()")
    row = cursor.fetchone()
    assert row is not None
    assert row[1] == "succeeded"


def test_the_session_is_left_as_it_was(family: Pipeline) -> None:
    family.conn.execute("set application_name = 'mine'")
    family.conn.execute("set search_path = bronze")
    family.conn.execute("set lock_timeout = '7s'")
    family.add(
        "leaky", "perform set_config('search_path', 'silver', true); execute 'set local lock_timeout = 1'"
    )
    family.apply()
    assert family.start().status == "succeeded"
    settings = [family.value(f"show {name}") for name in ("application_name", "search_path", "lock_timeout")]
    assert settings == ["mine", "bronze", "7s"]
    assert (
        family.value("select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()")
        == 0
    )


def test_the_application_name_shows_progress_while_a_run_is_active(pipeline: Pipeline) -> None:
    pipeline.add("load", "insert into silver.trace (step) values (current_setting('application_name'))")
    pipeline.apply()
    run = pipeline.start()
    assert pipeline.trace() == [f"b2s run {run.run_id} load"]


# -- dry runs --


def everything(pipeline: Pipeline) -> dict[str, Any]:
    """Every row of every table of the engine and of Silver, and the number of the next run."""
    tables = pipeline.column(
        "select format('%%I.%%I', schemaname, tablename) from pg_tables where schemaname in ('etl', 'silver')"
    )
    found: dict[str, Any] = {
        table: pipeline.column(f"select to_jsonb(t) from {table} t order by 1") for table in tables
    }
    found["sequences"] = pipeline.rows(
        "select schemaname, sequencename, last_value from pg_sequences where schemaname = 'etl' order by 1, 2"
    )
    return found


def with_a_view(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.src (at timestamptz)")
    pipeline.sql("create materialized view silver.mv as select count(*) as n from silver.trace")
    pipeline.add(
        "windowed",
        arguments="p_since timestamptz, p_until timestamptz",
        watermark={"strategy": "timestamp", "source": ["bronze.src.at"], "state_key": "w", "delay_ms": 0},
        mv_refresh=[{"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}],
    )
    pipeline.apply()


def test_a_dry_run_writes_nothing_and_shows_the_plan(family: Pipeline) -> None:
    with_a_view(family)
    family.start()
    before = everything(family)
    received = messages_of(family.conn)
    row = family.conn.execute("call etl.start_run(dry_run => true)").fetchone()
    assert row == (None, "planned")
    assert everything(family) == before
    text = "\n".join(message.text for message in received)
    assert [name for name in EVERYTHING if name not in text] == []
    assert "refresh silver.mv" in text
    assert "window [" in text


def test_a_dry_run_is_refused_like_a_run(family: Pipeline) -> None:
    with refused("PT404", "procedure.unknown"):
        family.start(dry_run=True, procedures=["nope"])
    with refused("PT403", "full_refresh.not_allowed"):
        family.start(dry_run=True, mode="full")


def test_plan_run_shows_what_start_run_does(family: Pipeline) -> None:
    with_a_view(family)
    plan = family.plan()
    run = family.start()
    planned = [(row["order_index"], row["name"], row["scope_index"]) for row in plan if row["kind"] == "step"]
    done = [(s["order_index"], s["procedure_name"], s["scope_index"]) for s in family.steps(run.run_id)]
    assert planned == done
    assert [row["name"] for row in plan if row["kind"] == "refresh"] == ["silver.mv"]
    sales = next(row for row in plan if row["name"] == "sales")
    assert sales["depends_on"] == ["customers", "products"]


def test_a_rehearsal_reports_true_counts_and_keeps_nothing(family: Pipeline) -> None:
    with_a_view(family)
    family.add(
        "reader",
        "create temp table n on commit drop as select step from silver.trace",
        dependencies=["stock"],
    )
    family.apply()
    family.start()
    before = everything(family)
    received = messages_of(family.conn)
    row = family.conn.execute(
        "call etl.start_run(procedures => '{stock, reader, sales, windowed}', dry_run => 'execute')"
    ).fetchone()
    assert row == (None, "planned")
    after = everything(family)
    del before["sequences"], after["sequences"]
    assert after == before
    texts = [message.text for message in received]
    reader = next(text for text in texts if "reader" in text and "rolled back" in text)
    committed = before["silver.trace"]
    sooner = [
        p for p in ("sales", "windowed", "stock") if f" {p} " in "\n".join(texts[: texts.index(reader)])
    ]
    assert f"{len(committed) + len(sooner)} rows" in reader
    assert any("refresh silver.mv succeeded" in text and "rolled back" in text for text in texts)


def test_a_rehearsal_shows_what_would_fail(pipeline: Pipeline) -> None:
    pipeline.add("broken", "perform 1 / 0")
    pipeline.add("needs_it", dependencies=["broken"])
    pipeline.apply()
    received = messages_of(pipeline.conn)
    pipeline.conn.execute("call etl.start_run(dry_run => 'execute')")
    text = "\n".join(message.text for message in received)
    assert "broken failed, rolled back: division by zero" in text
    assert "needs_it skipped, rolled back" in text
    assert pipeline.value("select count(*) from etl.runs") == 0
