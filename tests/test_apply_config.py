"""Configuration in the database: every problem with its place, the plan, and how it is applied."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from b2s.config import ConfigError, load_config
from b2s.errors import detail_of
from b2s.sync import SyncPlan, apply_config, plan_config, sync_config
from tests.pipelines import Pipeline, Row, refused
from tests.servers import Database, wait_until

NOW_COLUMN = (
    "create table bronze.sales (id bigint, etl_xid xid8, ingested_at timestamptz, small smallint, note text)"
)
WINDOW = {
    "timestamp": ("p_since timestamptz, p_until timestamptz", "bronze.sales.ingested_at"),
    "id": ("p_since bigint, p_until bigint", "bronze.sales.id"),
    "xid": ("p_since pg_snapshot, p_until pg_snapshot", "bronze.sales.etl_xid"),
}

Problem = tuple[list[Any], str]


def watermark(strategy: str = "timestamp", state_key: str = "load", **changes: Any) -> Row:
    return {
        "strategy": strategy,
        "source": [WINDOW[strategy][1]],
        "state_key": state_key,
        "delay_ms": 0,
        **changes,
    }


def param(name: str, kind: str = "string", **more: Any) -> Row:
    return {"name": name, "type": kind, "required": False, **more}


def target(name: str, **changes: Any) -> Row:
    return {"name": name, "after": "run", "on": "success", "concurrently": "auto", **changes}


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as made:
        made.sql(NOW_COLUMN)
        yield made


def plan(pipeline: Pipeline, **settings: Any) -> Row:
    found: Row = pipeline.value("select etl.plan_config(%s)", Jsonb(pipeline.spec(**settings)))
    return found


def problems(pipeline: Pipeline) -> list[Problem]:
    """The places and messages of everything that is wrong; each must have a remedy."""
    with refused("PT422", "config.invalid") as refusal:
        plan(pipeline)
    assert all(problem["hint"] for problem in refusal.detail["errors"])
    return [(problem["loc"], problem["message"]) for problem in refusal.detail["errors"]]


def changes(document: Row) -> list[tuple[str, str, str]]:
    return [(change["action"], change["kind"], change["name"]) for change in document["changes"]]


# -- which routine a name means --


def test_a_routine_that_is_missing_is_named_with_those_its_schema_has(pipeline: Pipeline) -> None:
    pipeline.routine("load_sales")
    pipeline.add("sales", routine="silver.lode_sales")
    with refused("PT422", "config.invalid") as refusal:
        plan(pipeline)
    assert refusal.detail["errors"] == [
        {
            "loc": ["procedures", "sales", "routine"],
            "message": "routine silver.lode_sales does not exist",
            "hint": "create it before you run b2s sync-config, or correct the name; schema silver has "
            "load_sales",
        }
    ]


def test_a_routine_must_be_written_with_its_schema(pipeline: Pipeline) -> None:
    pipeline.add("sales", routine="load_sales")
    assert problems(pipeline) == [
        (["procedures", "sales", "routine"], "routine load_sales must be written schema.name")
    ]


def test_an_overloaded_routine_is_refused_until_its_signature_says_which_one(pipeline: Pipeline) -> None:
    pipeline.routine("load_sales")
    pipeline.routine("load_sales", arguments="country text default 'DE'")
    pipeline.add("sales", routine="silver.load_sales")
    assert problems(pipeline) == [
        (
            ["procedures", "sales", "routine"],
            "routine silver.load_sales is overloaded: silver.load_sales(), silver.load_sales(text)",
        )
    ]
    pipeline.procedures[0]["routine"] = "silver.load_sales(pg_catalog.text)"
    pipeline.apply()
    assert pipeline.column("select routine_signature from etl.procedures") == ["silver.load_sales(text)"]


@pytest.mark.parametrize(
    "routine",
    ["silver.load_sales(integer)", "silver.load_sales(nosuchtype)", "silver.load_sales(", "load_sales()"],
)
def test_a_signature_that_does_not_exist_is_refused(routine: str, pipeline: Pipeline) -> None:
    pipeline.routine("load_sales")
    pipeline.add("sales", routine=routine)
    assert problems(pipeline) == [(["procedures", "sales", "routine"], f"routine {routine} does not exist")]


def test_an_aggregate_is_no_routine_to_run(pipeline: Pipeline) -> None:
    pipeline.sql("create aggregate silver.total (int) (sfunc = int4pl, stype = int)")
    pipeline.add("sales", routine="silver.total")
    assert problems(pipeline) == [(["procedures", "sales", "routine"], "routine silver.total does not exist")]


def test_a_quoted_name_finds_its_routine_and_runs(pipeline: Pipeline) -> None:
    pipeline.routine('"Load; Sales"', "insert into silver.trace (step) values ('quoted')", '"in" text')
    pipeline.add("sales", routine='silver."Load; Sales"', params=[param("in", default="x")])
    pipeline.apply()
    assert pipeline.column("select call_sql from etl.procedures") == [
        """select silver."Load; Sales"("in" => ($5->>'in')::text) as rows"""
    ]
    assert pipeline.start().status == "succeeded"
    assert pipeline.trace() == ["quoted"]


# -- what a routine declares --


def test_an_argument_that_nothing_passes_is_refused(pipeline: Pipeline) -> None:
    pipeline.add("sales", arguments="country text, batch int default 1, p_mode text default null")
    assert problems(pipeline) == [
        (
            ["procedures", "sales", "routine"],
            "argument country of silver.sales(text,integer,text) is passed by nothing and has no default",
        )
    ]


def test_an_argument_without_a_name_cannot_be_passed(pipeline: Pipeline) -> None:
    pipeline.add("sales", arguments="text, p_mode text")
    with refused("PT422", "config.invalid") as refusal:
        plan(pipeline)
    (problem,) = refusal.detail["errors"]
    assert (
        problem["message"] == "argument #1 of silver.sales(text,text) is passed by nothing and has no default"
    )
    assert problem["hint"] == "name the argument: b2s passes arguments by name"


def test_an_argument_without_a_name_but_with_a_default_is_left_out(pipeline: Pipeline) -> None:
    pipeline.add("sales", arguments="text default 'x'")
    pipeline.apply()
    assert pipeline.start().status == "succeeded"


def test_a_param_that_the_routine_does_not_take_is_refused(pipeline: Pipeline) -> None:
    pipeline.add("sales", arguments="p_country text", params=[param("country"), param("cuntry")])
    assert problems(pipeline) == [
        (["procedures", "sales", "params", "cuntry"], "silver.sales(text) has no argument for param cuntry")
    ]


def test_args_that_name_no_argument_of_the_routine_are_refused(pipeline: Pipeline) -> None:
    pipeline.add("sales", args={"p_mode": "how", "rows": "n"})
    assert sorted(problems(pipeline)) == [
        (["procedures", "sales", "args", "p_mode"], "silver.sales() has no argument how"),
        (["procedures", "sales", "args", "rows"], "silver.sales() has no argument n"),
    ]


def test_rows_must_be_an_output(pipeline: Pipeline) -> None:
    pipeline.add("sales", arguments="n bigint default 0", args={"rows": "n"})
    assert problems(pipeline) == [
        (["procedures", "sales", "args", "rows"], "silver.sales(bigint) has no argument n")
    ]


def test_a_watermark_without_a_window_in_the_routine_is_refused(pipeline: Pipeline) -> None:
    pipeline.add("load", watermark=watermark())
    (problem,) = problems(pipeline)
    assert problem[0] == ["procedures", "load", "watermark"]
    assert "declares no window (p_since or p_until)" in problem[1]


@pytest.mark.parametrize("strategy", WINDOW)
@pytest.mark.parametrize(
    "kind", ["timestamptz", "timestamp", "bigint", "numeric", "integer", "date", "pg_snapshot", "text"]
)
def test_the_window_of_a_routine_must_have_the_type_of_the_strategy(
    strategy: str, kind: str, pipeline: Pipeline
) -> None:
    fitting = {
        "timestamp": {"timestamptz", "text"},
        "id": {"bigint", "numeric", "text"},
        "xid": {"pg_snapshot", "text"},
    }
    pipeline.add("load", arguments=f"p_until {kind}", watermark=watermark(strategy))
    if kind in fitting[strategy]:
        assert changes(plan(pipeline))
    else:
        (problem,) = problems(pipeline)
        assert problem[0] == ["procedures", "load", "routine"]
        assert f"the {strategy} strategy passes" in problem[1]


def test_a_renamed_window_argument_is_checked_as_well(pipeline: Pipeline) -> None:
    pipeline.add("load", arguments="from_ts date", watermark=watermark(), args={"p_since": "from_ts"})
    (problem,) = problems(pipeline)
    assert (
        problem[1] == "argument from_ts of silver.load(date) is of type date; the timestamp strategy passes "
        "timestamp with time zone"
    )


def test_a_routine_that_etl_owner_may_not_execute_is_refused_with_the_grants(pipeline: Pipeline) -> None:
    pipeline.conn.execute("create schema theirs")
    pipeline.conn.execute("create function theirs.load() returns bigint language sql as 'select 7::bigint'")
    pipeline.conn.execute("revoke execute on function theirs.load() from public")
    pipeline.add("sales", routine="theirs.load")
    with refused("PT422", "config.invalid") as refusal:
        plan(pipeline)
    (problem,) = refusal.detail["errors"]
    assert (problem["loc"], problem["message"]) == (
        ["procedures", "sales", "routine"],
        "role etl_owner, as which steps run, may not execute theirs.load()",
    )
    for grant in problem["hint"].split("; "):
        pipeline.conn.execute(grant.encode())
    pipeline.apply()
    assert pipeline.start().status == "succeeded"


# -- the call that comes of it --

CALLS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "create function silver.f() returns bigint language sql as 'select 7::bigint'": (
        "a bigint",
        {},
        7,
    ),
    "create function silver.f() returns int language sql as 'select 7'": ("an int", {}, 7),
    "create function silver.f() returns numeric language sql as 'select 7.0'": ("a numeric", {}, 7),
    "create function silver.f() returns void language sql as 'select'": ("nothing", {}, 0),
    "create function silver.f() returns text language sql as $$ select 'done' $$": ("a text", {}, 0),
    "create function silver.f() returns setof int language sql as 'select generate_series(1, 7)'": (
        "a set, whose rows are not what was written",
        {},
        0,
    ),
    "create function silver.f() returns table (a int, b int) language sql as 'values (1, 2), (3, 4)'": (
        "a table, whose rows are not what was written",
        {},
        0,
    ),
    "create function silver.f(out p_rows int) language sql as 'select 7'": ("one OUT", {}, 7),
    "create function silver.f(out p_rows int, out other text) language sql as $$ select 7, 'x' $$": (
        "two OUT",
        {},
        7,
    ),
    "create function silver.f(out a int, out b int) language sql as $$ select 7, 8 $$": (
        "rows named b",
        {"rows": "b"},
        8,
    ),
    "create function silver.f(out a int, out b int) language sql as $$ select 7, 8::int $$": (
        "two OUT of which none is named rows",
        {},
        0,
    ),
    "create function silver.f(inout p_rows bigint) language sql as 'select 7::bigint'": (
        "INOUT of a function",
        {},
        7,
    ),
    "create function silver.f(inout p_rows bigint default 3) language sql as 'select p_rows + 4'": (
        "INOUT with a default",
        {},
        7,
    ),
    "create function silver.f(inout n bigint) language sql as 'select 7::bigint'": (
        "INOUT renamed",
        {"rows": "n"},
        7,
    ),
    "create procedure silver.f(inout p_rows bigint) language plpgsql as 'begin p_rows := 7; end'": (
        "INOUT of a procedure",
        {},
        7,
    ),
    "create procedure silver.f(inout n bigint) language plpgsql as 'begin n := 7; end'": (
        "INOUT of a procedure renamed",
        {"rows": "n"},
        7,
    ),
    "create procedure silver.f(out n int) language plpgsql as 'begin n := 7; end'": (
        "OUT of a procedure renamed",
        {"rows": "n"},
        7,
    ),
    "create procedure silver.f(out n int) language plpgsql as 'begin  n := 7; end'": (
        "the only OUT of a procedure",
        {},
        7,
    ),
    "create procedure silver.f() language plpgsql as 'begin end'": ("a procedure without output", {}, 0),
}


@pytest.mark.parametrize(("create", "case"), CALLS.items(), ids=[label for label, _, _ in CALLS.values()])
def test_the_rows_of_every_kind_of_routine_are_reported(
    create: str, case: tuple[str, dict[str, Any], int | None], pipeline: Pipeline
) -> None:
    pipeline.sql(create)
    pipeline.add("load", routine="silver.f", args=case[1])
    pipeline.apply()
    run = pipeline.start()
    step = pipeline.step(run.run_id, "load")
    assert (step["status"], step["error_message"], step["rows_affected"]) == ("succeeded", None, case[2])


def test_every_contract_name_is_passed_typed_and_can_be_renamed(pipeline: Pipeline) -> None:
    body = (
        "insert into silver.trace (step) values (concat_ws('|', how, p_since is null, "
        "pg_typeof(to_ts), p_run_id))"
    )
    pipeline.add(
        "load",
        body,
        arguments="how varchar(20), p_since timestamptz, to_ts text, p_run_id int",
        args={"p_mode": "how", "p_until": "to_ts"},
        watermark=watermark(),
    )
    pipeline.apply()
    run = pipeline.start()
    assert (run.status, pipeline.trace()) == (
        "succeeded",
        [f"incremental|t|text|{run.run_id}"],
    )


def test_a_param_is_found_with_and_without_the_prefix_and_by_its_args(pipeline: Pipeline) -> None:
    body = "insert into silver.trace (step) values (concat_ws('|', country, p_batch, label))"
    params = [
        param("country", default="DE"),
        param("batch", "integer", default=3),
        param("name", default="n"),
    ]
    pipeline.add(
        "load", body, arguments="country text, p_batch int, label text", params=params, args={"name": "label"}
    )
    pipeline.apply()
    assert pipeline.start().status == "succeeded"
    assert pipeline.trace() == ["DE|3|n"]


def test_a_variadic_argument_takes_an_array(pipeline: Pipeline) -> None:
    body = "insert into silver.trace (step) values (array_to_string(ids, ','))"
    ids = {"name": "ids", "type": "array", "items": {"type": "integer"}, "required": True}
    pipeline.add("load", body, arguments="variadic ids int[]", params=[ids])
    pipeline.apply()
    run = pipeline.start(params={"load": {"ids": [1, 2]}})
    assert (pipeline.step(run.run_id, "load")["error_message"], pipeline.trace()) == (None, ["1,2"])


# -- watermarks, views, checks --


def test_the_source_of_a_watermark_must_be_a_column_of_the_right_type(pipeline: Pipeline) -> None:
    sources = {
        "bronze.nowhere.ingested_at": "table bronze.nowhere does not exist",
        "bronze.sales.nothing": "table bronze.sales has no column nothing",
        "bronze.sales.note": "bronze.sales.note is of type text, the timestamp strategy needs timestamp "
        "with time zone or timestamp without time zone",
        "bronze.sales.ctid": "table bronze.sales has no column ctid",
    }
    pipeline.add(
        "load",
        arguments=WINDOW["timestamp"][0],
        watermark=watermark(source=[*sources, "bronze.sales.ingested_at"]),
    )
    place = ["procedures", "load", "watermark", "source"]
    assert sorted(problems(pipeline)) == sorted((place, message) for message in sources.values())


@pytest.mark.parametrize(
    ("strategy", "column"), [("id", "small"), ("id", "id"), ("xid", "etl_xid"), ("timestamp", "ingested_at")]
)
def test_a_column_of_a_fitting_type_is_accepted(strategy: str, column: str, pipeline: Pipeline) -> None:
    pipeline.add(
        "load",
        arguments=WINDOW[strategy][0],
        watermark=watermark(strategy, source=[f"bronze.sales.{column}"]),
    )
    assert changes(pipeline.apply())


@pytest.mark.parametrize(("strategy", "column"), [("id", "ingested_at"), ("xid", "id"), ("timestamp", "id")])
def test_a_column_of_another_type_is_refused(strategy: str, column: str, pipeline: Pipeline) -> None:
    pipeline.add(
        "load",
        arguments=WINDOW[strategy][0],
        watermark=watermark(strategy, source=[f"bronze.sales.{column}"]),
    )
    (problem,) = problems(pipeline)
    assert f"the {strategy} strategy needs" in problem[1]


def test_a_source_that_etl_owner_may_not_read_is_refused_with_the_grants(pipeline: Pipeline) -> None:
    pipeline.conn.execute("create schema theirs")
    pipeline.conn.execute("create table theirs.t (at timestamptz)")
    pipeline.add("load", arguments=WINDOW["timestamp"][0], watermark=watermark(source=["theirs.t.at"]))
    with refused("PT422", "config.invalid") as refusal:
        plan(pipeline)
    (problem,) = refusal.detail["errors"]
    assert problem["message"] == "role etl_owner may not read theirs.t.at"
    for grant in problem["hint"].split("; "):
        pipeline.conn.execute(grant.encode())
    pipeline.apply()
    assert pipeline.start().status == "succeeded"


def test_what_is_refreshed_must_be_a_materialized_view_of_etl_owner(pipeline: Pipeline) -> None:
    pipeline.sql("create view silver.v as select 1 as n")
    pipeline.conn.execute("create materialized view silver.theirs as select 1 as n")
    names = ["silver.nowhere", "silver.v", "silver.trace", "silver.theirs", "trace"]
    pipeline.add("load", mv_refresh=[target(name) for name in names])
    place = ["procedures", "load", "mv_refresh"]
    assert sorted(problems(pipeline)) == sorted(
        [
            ([*place, "silver.nowhere"], "materialized view silver.nowhere does not exist"),
            ([*place, "silver.v"], "silver.v is not a materialized view"),
            ([*place, "silver.trace"], "silver.trace is not a materialized view"),
            ([*place, "silver.theirs"], "role etl_owner, as which refreshes run, does not own silver.theirs"),
            ([*place, "trace"], "materialized view trace does not exist"),
        ]
    )


def test_the_right_to_maintain_a_view_is_enough_where_the_server_has_it(pipeline: Pipeline) -> None:
    if pipeline.db.server.major < 17:
        pytest.skip("the privilege MAINTAIN came with Postgres 17")
    pipeline.conn.execute("create materialized view silver.theirs as select 1 as n")
    pipeline.conn.execute("grant maintain on silver.theirs to etl_owner")
    pipeline.add("load", mv_refresh=[target("silver.theirs")])
    pipeline.apply()
    assert pipeline.start().status == "succeeded"


def test_a_check_is_compiled_or_its_problem_is_named(pipeline: Pipeline) -> None:
    pipeline.sql("create function silver.needs(n int) returns boolean language sql as 'select true'")
    pipeline.sql("create function silver.words() returns text language sql as $$ select 'fine' $$")
    pipeline.sql("create procedure silver.proc() language sql as 'select'")
    pipeline.conn.execute("create table silver.secret (n int)")

    def table(name: str, kind: str = "not_null", columns: tuple[str, ...] = ("step",)) -> Row:
        return {
            "name": f"c_{name}_{kind}",
            "type": kind,
            "table": f"silver.{name}",
            "columns": list(columns),
            "severity": "error",
        }

    def routine(name: str) -> Row:
        return {"name": f"r_{name}", "type": "routine", "routine": f"silver.{name}", "severity": "warn"}

    checks = [
        table("nowhere"),
        table("trace", "unique", ("step", "x", "y")),
        table("secret", columns=("n",)),
        table("trace"),
    ]
    checks += [routine("gone"), routine("needs"), routine("words"), routine("proc")]
    pipeline.add("load", checks=checks)
    must = "must be a function without required arguments that returns boolean, integer or bigint"
    assert [(loc[3], message) for loc, message in problems(pipeline)] == [
        ("c_nowhere_not_null", "table silver.nowhere does not exist"),
        ("c_trace_unique", "table silver.trace has no column x, y"),
        ("c_secret_not_null", "role etl_owner may not read silver.secret"),
        ("r_gone", "routine silver.gone does not exist"),
        ("r_needs", f"silver.needs {must}"),
        ("r_words", f"silver.words {must}"),
        ("r_proc", f"silver.proc {must}"),
    ]


# -- relations --


def test_a_dependency_outside_the_pipeline_is_refused(pipeline: Pipeline) -> None:
    pipeline.add("sales", dependencies=["customers"])
    assert problems(pipeline) == [
        (["procedures", "sales", "dependencies"], "sales depends on customers, which is not in this pipeline")
    ]


def test_a_dimension_may_depend_on_a_fact_only_when_it_says_so(pipeline: Pipeline) -> None:
    pipeline.add("fact")
    pipeline.add("dim", type="dimension", dependencies=["fact"])
    assert problems(pipeline) == [
        (["procedures", "dim", "dependencies"], "dimension dim depends on fact fact")
    ]
    pipeline.change("dim", allow_fact_dependency=True)
    assert pipeline.column("select name from etl.procedures order by name") == ["dim", "fact"]


def test_a_procedure_is_defined_once(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.add("load", routine="silver.load")
    assert problems(pipeline) == [(["procedures", "load", "name"], "procedure load is defined 2 times")]


def add_two_with_one_state_key(pipeline: Pipeline, first: Row, second: Row) -> None:
    for name, settings in (("a", first), ("b", second)):
        pipeline.add(
            name, arguments=WINDOW["timestamp"][0], watermark=watermark(state_key="shared"), **settings
        )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"group": "g", "transaction_scope": "per_group"}, {}),
        ({"group": "g", "transaction_scope": "per_group"}, {"group": "h", "transaction_scope": "per_group"}),
        ({"group": "g"}, {"group": "g"}),
        ({"group": "g", "transaction_scope": "per_group"}, {"group": "g"}),
    ],
    ids=["no group", "one in a group", "two groups", "a group of separate transactions", "half a group"],
)
def test_a_state_key_cannot_be_shared_by_procedures_that_may_run_apart(
    first: Row, second: Row, pipeline: Pipeline
) -> None:
    add_two_with_one_state_key(pipeline, first, second)
    assert problems(pipeline) == [
        (
            ["procedures", "b", "watermark", "state_key"],
            "state_key shared is shared by a, b, which do not always run together",
        )
    ]


def test_a_state_key_may_be_shared_within_a_group_that_is_one_transaction(pipeline: Pipeline) -> None:
    group = {"group": "g", "transaction_scope": "per_group"}
    add_two_with_one_state_key(pipeline, group, group)
    pipeline.apply()
    run = pipeline.start()
    windows = {(step["window_since"], step["window_until"]) for step in pipeline.steps(run.run_id)}
    assert (run.status, len(windows)) == ("succeeded", 1)


def test_a_state_key_belongs_to_one_pipeline_until_it_is_given_up(pipeline: Pipeline, db: Database) -> None:
    pipeline.add("load", arguments=WINDOW["timestamp"][0], watermark=watermark())
    pipeline.add("other")
    pipeline.apply()
    with Pipeline(db, "second") as second:
        second.add("mine", routine="silver.load", watermark=watermark())
        assert problems(second) == [
            (
                ["procedures", "mine", "watermark", "state_key"],
                "state_key load belongs to procedure load of pipeline bronze_to_silver",
            )
        ]
        del pipeline.procedures[0]
        pipeline.apply()
        second.apply()
        assert second.start(pipeline="second").status == "succeeded"


def test_a_cycle_is_refused_at_sync_and_names_the_way_round(pipeline: Pipeline) -> None:
    for name, needs in (("a", "c"), ("b", "a"), ("c", "b"), ("d", "a")):
        pipeline.add(name, dependencies=[needs])
    with refused("PT400", "plan.cycle") as refusal:
        plan(pipeline)
    assert refusal.message == "dependencies form a cycle: a -> c -> b -> a"
    assert refusal.detail["cycle"] == ["a", "c", "b", "a"]


def test_a_circle_of_groups_is_refused_at_sync_with_the_way_out(pipeline: Pipeline) -> None:
    group = {"group": "g", "transaction_scope": "per_group"}
    pipeline.add("a", **group)
    pipeline.add("between", dependencies=["a"])
    pipeline.add("b", dependencies=["between"], **group)
    with refused("PT400", "plan.group_cycle") as refusal:
        pipeline.apply()
    assert refusal.detail["cycle"] == ["a + b", "between", "a + b"]
    assert "transaction_scope: per_procedure" in refusal.hint
    assert pipeline.value("select count(*) from etl.pipelines") == 0


def test_everything_that_is_wrong_is_found_at_once(pipeline: Pipeline) -> None:
    pipeline.add("gone", routine="silver.nowhere", dependencies=["nobody"])
    pipeline.add(
        "load",
        arguments="x int",
        watermark=watermark(source=["bronze.sales.note"]),
        mv_refresh=[target("silver.mv")],
        params=[param("p")],
    )
    with refused("PT422", "config.invalid") as refusal:
        plan(pipeline)
    assert refusal.message.startswith("the configuration has 7 problem(s); the first: ")
    assert sorted("/".join(problem["loc"][1:]) for problem in refusal.detail["errors"]) == [
        "gone/dependencies",
        "gone/routine",
        "load/mv_refresh/silver.mv",
        "load/params/p",
        "load/routine",
        "load/watermark",
        "load/watermark/source",
    ]


# -- applying --


def rich(pipeline: Pipeline) -> Row:
    """A configuration in which nothing has its default."""
    pipeline.sql("create materialized view silver.mv as select 1 as n")
    pipeline.sql("create materialized view silver.mv_b as select 1 as n")
    pipeline.sql("create function silver.holds() returns boolean language sql as 'select true'")
    group = {"group": "sales", "transaction_scope": "per_group", "isolation": "serializable"}
    pipeline.add(
        "customers",
        type="dimension",
        description="who",
        tags=["b", "a"],
        default_mode="full",
        allow_full_refresh=True,
        **group,
    )
    declared = [
        param("z", enum=["x", "y"], default="x", description="first"),
        param("a", "integer", minimum=1, maximum=2.5, required=True),
        {
            "name": "list",
            "type": "array",
            "items": {"type": "string", "pattern": "^a"},
            "minItems": 1,
            "required": False,
        },
    ]
    pipeline.add(
        "sales",
        arguments="z text, a int, list text[], p_since timestamptz, n int default 0",
        dependencies=["customers"],
        params=declared,
        watermark=watermark(source=["bronze.sales.ingested_at"], state_key="s", delay_ms=5000),
        timeout_ms=60000,
        lock_timeout_ms=500,
        retries={"attempts": 5, "backoff_ms": 10, "max_backoff_ms": 20},
        on_failure="stop",
        max_window="1 day",
        **group,
        mv_refresh=[
            target("silver.mv_b", after="group", on="always", concurrently="false"),
            target("silver.mv", concurrently="true"),
        ],
        checks=[
            {
                "name": "steps",
                "type": "not_null",
                "table": "silver.trace",
                "columns": ["step"],
                "severity": "error",
            },
            {
                "name": "few",
                "type": "row_count",
                "table": "silver.trace",
                "min": 0,
                "max": 10,
                "severity": "warn",
            },
            {"name": "holds", "type": "routine", "routine": "silver.holds", "severity": "warn"},
        ],
    )
    pipeline.add(
        "back",
        type="dimension",
        dependencies=["sales"],
        allow_fact_dependency=True,
        watermark=None,
        max_window=None,
    )
    return pipeline.spec(
        description="everything",
        max_concurrency=7,
        search_path=["silver", "bronze"],
        groups=[{"name": "idle", "description": None}, {"name": "sales", "description": "what was sold"}],
        schedules=[
            {
                "name": "nightly",
                "cron": "0 2 * * *",
                "timezone": "UTC",
                "mode": None,
                "procedures": ["sales"],
                "params": {},
                "catch_up": False,
            }
        ],
    )


def test_the_catalog_holds_the_configuration_that_was_applied(pipeline: Pipeline) -> None:
    spec = Jsonb(rich(pipeline))
    applied = pipeline.value("select etl.apply_config(%s)", spec)
    assert changes(applied) == [
        ("+", "pipeline", "bronze_to_silver"),
        ("+", "group", "idle"),
        ("+", "group", "sales"),
        ("+", "procedure", "back"),
        ("+", "procedure", "customers"),
        ("+", "procedure", "sales"),
        ("+", "schedule", "nightly"),
    ]
    held = pipeline.value("select etl._catalog_config('bronze_to_silver')")
    wanted = pipeline.value("select etl._normalise_config(%s)", spec)
    assert held == wanted
    assert held["procedures"]["sales"]["watermark"]["delay_ms"] == 5000


def test_applying_the_same_configuration_again_changes_nothing_and_makes_no_version(
    pipeline: Pipeline,
) -> None:
    spec = Jsonb(rich(pipeline))
    first = pipeline.value("select etl.apply_config(%s)", spec)
    again = pipeline.value("select etl.apply_config(%s)", spec)
    assert (first["version"], again["version"]) == (1, 1)
    assert (again["changes"], again["drift"], again["base_digest"]) == ([], [], first["digest"])
    assert pipeline.value("select count(*) from etl.config_versions") == 1


def test_the_order_in_which_a_file_lists_things_is_no_change(pipeline: Pipeline) -> None:
    spec = rich(pipeline)
    pipeline.value("select etl.apply_config(%s)", Jsonb(spec))
    spec["procedures"].reverse()
    spec["groups"].reverse()
    for procedure in spec["procedures"]:
        procedure["tags"].reverse()
        procedure["mv_refresh"].reverse()
    assert pipeline.value("select etl.plan_config(%s)", Jsonb(spec))["changes"] == []
    next(p for p in spec["procedures"] if p["name"] == "sales")["params"].reverse()
    assert changes(pipeline.value("select etl.plan_config(%s)", Jsonb(spec))) == [("~", "procedure", "sales")]


def test_a_plan_shows_what_is_added_changed_and_removed_and_writes_nothing(pipeline: Pipeline) -> None:
    for name in ("kept", "changed", "removed"):
        pipeline.add(name)
    pipeline.apply()
    pipeline.procedures = [p for p in pipeline.procedures if p["name"] != "removed"]
    pipeline.procedures[1] |= {"timeout_ms": 1000, "tags": ["new"]}
    pipeline.add("added", group="g")
    found = plan(pipeline, max_concurrency=3)
    assert changes(found) == [
        ("~", "pipeline", "bronze_to_silver"),
        ("+", "group", "g"),
        ("+", "procedure", "added"),
        ("~", "procedure", "changed"),
        ("-", "procedure", "removed"),
    ]
    assert found["changes"][0]["fields"] == {"max_concurrency": [2, 3]}
    assert found["changes"][3]["fields"] == {"timeout_ms": [None, 1000], "tags": [[], ["new"]]}
    assert pipeline.column("select name from etl.procedures order by name") == ["changed", "kept", "removed"]
    assert plan(pipeline, max_concurrency=3) == found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "dimension"),
        ("description", "new"),
        ("default_mode", "full"),
        ("allow_full_refresh", True),
        ("allow_fact_dependency", True),
        ("isolation", "serializable"),
        ("timeout_ms", 5),
        ("lock_timeout_ms", 5),
        ("on_failure", "stop"),
        ("group", "g"),
        ("tags", ["t"]),
        ("retries", {"attempts": 9, "backoff_ms": 1, "max_backoff_ms": 1}),
        ("dependencies", ["other"]),
        ("args", {"p_mode": "how"}),
        ("watermark", None),
        ("max_window", "2 days"),
        ("params", [{"name": "how", "type": "string", "required": False}]),
        ("mv_refresh", [{"name": "silver.mv", "after": "run", "on": "always", "concurrently": "auto"}]),
        (
            "checks",
            [{"name": "n", "type": "row_count", "table": "silver.trace", "max": 3, "severity": "warn"}],
        ),
    ],
)
def test_a_change_of_any_one_field_is_seen_and_stored(field: str, value: Any, pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select 1 as n")
    pipeline.add("other", type="dimension")
    pipeline.add("load", arguments="p_since timestamptz, how text default 'x'", watermark=watermark())
    pipeline.apply()
    pipeline.procedures[1][field] = value
    (change,) = [change for change in pipeline.apply()["changes"] if change["kind"] == "procedure"]
    assert (change["action"], change["name"], list(change["fields"])) == ("~", "load", [field])
    assert plan(pipeline)["changes"] == []


def test_a_removed_procedure_is_deactivated_and_comes_back_as_the_same(pipeline: Pipeline) -> None:
    pipeline.add("stays")
    pipeline.add("leaves", group="g", arguments="p_since timestamptz", watermark=watermark())
    pipeline.apply()
    run = pipeline.start()
    identity = pipeline.value("select procedure_id from etl.procedures where name = 'leaves'")
    gone = pipeline.procedures.pop()
    assert ("-", "procedure", "leaves") in changes(pipeline.apply())
    assert pipeline.rows("select is_active, state_key from etl.procedures where name = 'leaves'") == [
        {"is_active": False, "state_key": None}
    ]
    assert pipeline.value("select count(*) from etl.procedure_runs where procedure_id = %s", identity) == 1
    with refused("PT404", "procedure.unknown"):
        pipeline.start(procedures=["leaves"])
    with refused("PT404", "group.unknown"):
        pipeline.start(groups=["g"])
    pipeline.procedures.append(gone)
    pipeline.apply()
    assert (
        pipeline.value("select procedure_id from etl.procedures where name = 'leaves' and is_active")
        == identity
    )
    assert pipeline.watermark("load") == pipeline.step(run.run_id, "leaves")["window_until"]
    assert pipeline.start(groups=["g"]).status == "succeeded"


def test_a_catalog_edited_by_hand_is_reported_as_drift_and_put_right(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.add("new", type="dimension")
    pipeline.apply()
    pipeline.conn.execute("update etl.procedures set max_attempts = 9 where name = 'load'")
    pipeline.conn.execute(
        "insert into etl.dependencies select a.procedure_id, b.procedure_id from etl.procedures a, "
        "etl.procedures b where a.name < b.name"
    )
    found = plan(pipeline)
    (drift,) = found["drift"]
    assert (drift["action"], drift["name"]) == ("~", "load")
    assert drift["fields"]["retries"][1]["attempts"] == 9
    assert drift["fields"]["dependencies"] == [[], ["new"]]
    assert found["changes"][0]["fields"]["dependencies"] == [["new"], []]
    pipeline.apply()
    assert (plan(pipeline)["drift"], plan(pipeline)["changes"]) == ([], [])


def test_a_routine_that_changed_since_is_part_of_the_plan(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.apply()
    pipeline.sql("drop function silver.load()")
    pipeline.routine("load", arguments="p_run_id bigint")
    found = plan(pipeline)
    assert found["changes"] == [
        {
            "action": "~",
            "kind": "procedure",
            "name": "load",
            "fields": {
                "call": ["select silver.load() as rows", "select silver.load(p_run_id => $4::bigint) as rows"]
            },
        }
    ]
    assert pipeline.apply()["version"] == 2
    assert pipeline.start().status == "succeeded"
    assert plan(pipeline)["changes"] == []


def test_a_plan_made_against_another_state_is_refused(pipeline: Pipeline) -> None:
    pipeline.add("load")
    stale = plan(pipeline)
    pipeline.apply()
    pipeline.procedures[0]["timeout_ms"] = 1
    fresh = plan(pipeline)
    assert (stale["base_digest"], fresh["base_digest"]) == (None, stale["digest"])
    apply = "select etl.apply_config(%s, base_digest => %s)"
    for base in ("", "0" * 64):
        with refused("PT409", "config.stale") as refusal:
            pipeline.value(apply, Jsonb(pipeline.spec()), base)
        assert refusal.detail["digest"] == fresh["base_digest"]
    assert pipeline.value(apply, Jsonb(pipeline.spec()), fresh["base_digest"])["version"] == 2


def test_every_version_is_kept_whole_with_its_author_and_cannot_be_changed(pipeline: Pipeline) -> None:
    apply = "select etl.apply_config(%s, author => %s, git_revision => %s, source => %s)"
    pipeline.add("load")
    pipeline.value(apply, Jsonb(pipeline.spec()), "ann", "abc123", "transformations.yaml")
    pipeline.procedures[0]["timeout_ms"] = 1
    pipeline.value(apply, Jsonb(pipeline.spec()), None, None, None)
    versions = pipeline.rows(
        "select version, author, git_revision, source, applied_by, config, changes, digest from "
        "etl.config_versions order by version"
    )
    assert [(v["version"], v["author"], v["git_revision"], v["source"]) for v in versions] == [
        (1, "ann", "abc123", "transformations.yaml"),
        (2, "postgres", None, None),
    ]
    assert "timeout_ms" not in versions[0]["config"]["procedures"]["load"]
    assert versions[1]["config"]["procedures"]["load"]["timeout_ms"] == 1
    assert versions[1]["changes"][0]["fields"] == {"timeout_ms": [None, 1]}
    for statement in (
        "update etl.config_versions set author = 'bob'",
        "delete from etl.config_versions",
        "truncate etl.config_versions cascade",
    ):
        with refused("PT409", "history.immutable"):
            pipeline.conn.execute(statement)


def test_a_failure_in_the_middle_leaves_nothing(pipeline: Pipeline) -> None:
    pipeline.add("load")
    pipeline.add(
        "broken", retries={"attempts": 0, "backoff_ms": 1, "max_backoff_ms": 1}, tags=["t"], group="g"
    )
    with pytest.raises(psycopg.errors.CheckViolation, match="there_is_at_least_one_attempt"):
        pipeline.apply()
    for table in ("pipelines", "procedures", "groups", "tags", "config_versions"):
        assert pipeline.value(f"select count(*) from etl.{table}") == 0


def test_only_admins_apply_and_readers_may_plan(pipeline: Pipeline) -> None:
    pipeline.add("load")
    spec = Jsonb(pipeline.spec())
    for role in ("etl_reader", "etl_operator"):
        conn = pipeline.login(role)
        assert conn.execute("select etl.plan_config(%s)->'changes' <> '[]'", [spec]).fetchone() == (True,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("select etl.apply_config(%s)", [spec])
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("insert into etl.pipelines (name) values ('x')")
    admin = pipeline.login("etl_admin")
    admin.execute("select etl.apply_config(%s)", [spec])
    assert pipeline.column("select applied_by = author from etl.config_versions") == [True]
    assert pipeline.column("select author from etl.config_versions") == [admin.info.user]


def test_two_that_apply_at_once_pass_one_after_the_other(pipeline: Pipeline, db: Database) -> None:
    pipeline.add("load")
    first, second = db.connect(autocommit=False), db.connect()
    spec = Jsonb(pipeline.spec())
    first.execute("select etl.apply_config(%s, '')", [spec])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.execute, "select etl.apply_config(%s, '')", [spec])
        wait_until(
            pipeline.conn,
            "select exists (select from pg_locks where locktype = 'advisory' and not granted and pid = %s)",
            [second.info.backend_pid],
        )
        first.commit()
        with pytest.raises(psycopg.DatabaseError) as caught:
            waiting.result(timeout=30)
    assert (caught.value.sqlstate, detail_of(caught.value)["code"]) == ("PT409", "config.stale")
    assert pipeline.column("select version from etl.config_versions") == [1]


def test_two_pipelines_that_apply_at_once_cannot_both_get_one_state_key(
    pipeline: Pipeline, db: Database
) -> None:
    pipeline.add("load", arguments=WINDOW["timestamp"][0], watermark=watermark())
    with Pipeline(db, "second") as other:
        other.add("mine", routine="silver.load", watermark=watermark())
        first, second = db.connect(autocommit=False), db.connect()
        first.execute("select etl.apply_config(%s)", [Jsonb(pipeline.spec())])
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(second.execute, "select etl.apply_config(%s)", [Jsonb(other.spec())])
            wait_until(
                pipeline.conn,
                "select exists (select from pg_locks where not granted and pid = %s) or (select state = "
                "'idle' from pg_stat_activity where pid = %s)",
                [second.info.backend_pid] * 2,
            )
            first.commit()
            with pytest.raises(psycopg.DatabaseError) as caught:
                waiting.result(timeout=30)
    assert detail_of(caught.value)["code"] == "config.invalid"
    assert pipeline.column("select count(*) from etl.procedures where state_key = 'load'") == [1]


def test_two_thousand_procedures_apply_and_apply_again(pipeline: Pipeline) -> None:
    pipeline.routine("load")
    for n in range(2000):
        needs = [f"p{m}" for m in (n // 2, n - 100) if 0 <= m < n]
        pipeline.add(f"p{n}", routine="silver.load", dependencies=sorted(set(needs)), tags=[f"t{n % 10}"])
    assert len(pipeline.apply()["changes"]) == 2001
    assert pipeline.value("select count(*) from etl.procedures where is_active") == 2000
    assert pipeline.apply()["changes"] == []


# -- from the file --

YAML = """\
version: 1
procedures:
  - name: silver.dim_customers
    routine: silver.load_customers
    type: dimension

  - name: silver.fact_sales
    type: fact
    dependencies: [silver.dim_customers]
    params:
      country: {type: string}
    watermark:
      strategy: timestamp
      source: bronze.sales.note
    checks:
      - {name: every_sale_has_a_note, type: not_null, table: silver.nowhere, columns: [note]}
    mv_refresh:
      - silver.mv
"""


def test_problems_of_the_database_are_shown_in_the_file(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.routine("fact_sales", arguments="p_since date")
    file = tmp_path / "transformations.yaml"
    file.write_text(YAML, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        plan_config(pipeline.conn, load_config(file))
    assert [(p.line, p.column, p.message.partition(":")[0]) for p in caught.value.problems] == [
        (4, 14, "routine silver.load_customers does not exist"),
        (
            7,
            5,
            "argument p_since of silver.fact_sales(date) is of type date; the timestamp strategy passes "
            "timestamp with time zone",
        ),
        (11, 16, "silver.fact_sales(date) has no argument for param country"),
        (
            14,
            15,
            "bronze.sales.note is of type text, the timestamp strategy needs timestamp with time zone or "
            "timestamp without time zone",
        ),
        (16, 9, "table silver.nowhere does not exist"),
        (18, 9, "materialized view silver.mv does not exist"),
    ]
    assert all(problem.hint for problem in caught.value.problems)
    report = str(caught.value)
    assert f"{file}:4:14: error: routine silver.load_customers does not exist" in report
    assert "    routine: silver.load_customers" in report


def git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Ann", "-c", "user.email=ann@example.com", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", "-C", str(repository), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_version_knows_the_file_and_the_commit_it_came_from(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.routine("load")
    file = tmp_path / "transformations.yaml"
    file.write_text("version: 1\nprocedures:\n  - {name: silver.load, type: fact}\n", encoding="utf-8")
    sync_config(pipeline.conn, file)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "pipeline")
    file.write_text(
        "version: 1\nprocedures:\n  - {name: silver.load, type: fact, timeout: 5min}\n", encoding="utf-8"
    )
    sync_config(pipeline.conn, file)
    git(tmp_path, "commit", "-am", "timeout")
    file.touch()
    loaded = load_config(file)
    file_again = plan_config(pipeline.conn, loaded)
    assert (file_again.changes, file_again.drift, file_again.version) == ((), (), 2)
    file.write_text(
        "version: 1\nprocedures:\n  - {name: silver.load, type: fact, timeout: 6min}\n", encoding="utf-8"
    )
    git(tmp_path, "commit", "-am", "more")
    sync_config(pipeline.conn, file)
    head, before = git(tmp_path, "rev-parse", "HEAD"), git(tmp_path, "rev-parse", "HEAD~2")
    versions = pipeline.rows("select git_revision, source, author from etl.config_versions order by version")
    assert [version["git_revision"] for version in versions] == [None, f"{before}-dirty", head]
    assert {version["source"] for version in versions} == {str(file)}
    assert all(version["author"] for version in versions)


def test_the_plan_that_was_shown_is_the_plan_that_is_applied_or_nothing_is(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    pipeline.routine("load")
    file = tmp_path / "transformations.yaml"
    file.write_text("version: 1\nprocedures:\n  - {name: silver.load, type: fact}\n", encoding="utf-8")
    loaded = load_config(file)
    shown = plan_config(pipeline.conn, loaded)
    assert [(c.action, c.kind, c.name) for c in shown.changes] == [
        ("+", "pipeline", "bronze_to_silver"),
        ("+", "procedure", "silver.load"),
    ]
    done = apply_config(pipeline.conn, loaded, shown)
    assert done == SyncPlan(shown.pipeline, None, shown.digest, 1, shown.changes, ())
    with refused("PT409", "config.stale"):
        apply_config(pipeline.conn, loaded, shown)
