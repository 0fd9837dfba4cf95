"""The plan of a request: order, transactions, windows and notes, and that a run then does just that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.pipelines import Pipeline, Row, refused
from tests.servers import Database

WINDOW = {
    "timestamp": ("p_since timestamptz, p_until timestamptz", "bronze.sales.ingested_at"),
    "id": ("p_since bigint, p_until bigint", "bronze.sales.id"),
    "xid": ("p_since pg_snapshot, p_until pg_snapshot", "bronze.sales.etl_xid"),
}
GROUP = {"group": "g", "transaction_scope": "per_group"}


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as made:
        yield made


def order(pipeline: Pipeline, /, **arguments: Any) -> list[str]:
    """The names of what a request runs, in order; steps and refreshes alike."""
    return [row["name"] for row in pipeline.plan(**arguments)]


def scopes(pipeline: Pipeline, /, **arguments: Any) -> list[list[str]]:
    """The same, one list for each transaction."""
    found: dict[int, list[str]] = {}
    for row in pipeline.plan(**arguments):
        found.setdefault(row["scope_index"], []).append(row["name"])
    return list(found.values())


def add(pipeline: Pipeline, name: str, *needs: str, kind: str = "fact", **settings: Any) -> None:
    if not pipeline.procedures:
        pipeline.routine("load")
    pipeline.add(name, routine="silver.load", type=kind, dependencies=list(needs), **settings)


# -- order --


def test_what_is_needed_comes_first_whatever_its_name(pipeline: Pipeline) -> None:
    add(pipeline, "a", "b", "c")
    add(pipeline, "b", "d")
    add(pipeline, "c", "d")
    add(pipeline, "d")
    pipeline.apply()
    assert order(pipeline) == ["d", "b", "c", "a"]


def test_dimensions_come_before_facts_although_none_depends_on_them(pipeline: Pipeline) -> None:
    add(pipeline, "a_fact")
    add(pipeline, "b_fact", "a_fact")
    add(pipeline, "y_dim", "z_dim", kind="dimension")
    add(pipeline, "z_dim", kind="dimension")
    pipeline.apply()
    assert order(pipeline) == ["z_dim", "y_dim", "a_fact", "b_fact"]


def test_a_dimension_that_depends_on_a_fact_comes_after_it_and_its_dependents_too(pipeline: Pipeline) -> None:
    add(pipeline, "a_fact")
    add(pipeline, "b_late", "a_fact", kind="dimension", allow_fact_dependency=True)
    add(pipeline, "c_later", "b_late", kind="dimension")
    add(pipeline, "d_dim", kind="dimension")
    pipeline.apply()
    assert order(pipeline) == ["d_dim", "a_fact", "b_late", "c_later"]
    assert pipeline.start().status == "succeeded"


def test_the_order_is_the_same_each_time_and_by_name_where_nothing_else_decides(pipeline: Pipeline) -> None:
    for name in ("m", "c", "x", "a"):
        add(pipeline, name)
    pipeline.apply()
    assert order(pipeline) == order(pipeline) == ["a", "c", "m", "x"]


def test_members_of_a_group_that_is_one_transaction_stand_together(pipeline: Pipeline) -> None:
    add(pipeline, "a", **GROUP)
    add(pipeline, "b")
    add(pipeline, "c", "a", **GROUP)
    add(pipeline, "d", "b")
    pipeline.apply()
    assert scopes(pipeline) == [["a", "c"], ["b"], ["d"]]


def test_a_group_of_separate_transactions_does_not_stand_together(pipeline: Pipeline) -> None:
    add(pipeline, "a", group="g")
    add(pipeline, "b", "a")
    add(pipeline, "c", "b", group="g")
    pipeline.apply()
    assert scopes(pipeline) == [["a"], ["b"], ["c"]]
    assert [row["tx_scope"] for row in pipeline.plan()] == ["per_procedure"] * 3


def test_a_group_of_dimensions_and_facts_waits_for_the_dimensions_and_is_not_waited_for_by_them(
    pipeline: Pipeline,
) -> None:
    add(pipeline, "a_dim", kind="dimension", **GROUP)
    add(pipeline, "b_fact", "a_dim", **GROUP)
    add(pipeline, "y_dim", kind="dimension")
    add(pipeline, "z_fact")
    pipeline.apply()
    assert scopes(pipeline) == [["y_dim"], ["a_dim", "b_fact"], ["z_fact"]]


def test_a_request_can_dissolve_groups_and_form_them(pipeline: Pipeline) -> None:
    add(pipeline, "a", **GROUP)
    add(pipeline, "b", **GROUP)
    add(pipeline, "c", group="h")
    add(pipeline, "d", group="h")
    add(pipeline, "e")
    pipeline.apply()
    assert scopes(pipeline) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert scopes(pipeline, transaction_scope="per_procedure") == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert scopes(pipeline, transaction_scope="per_group") == [["a", "b"], ["c", "d"], ["e"]]


def test_a_request_that_forms_groups_may_make_a_circle_that_the_configuration_has_not(
    pipeline: Pipeline,
) -> None:
    add(pipeline, "a", group="g")
    add(pipeline, "b", "a")
    add(pipeline, "c", "b", group="g")
    pipeline.apply()
    for verb in ("plan", "run"):
        with refused("PT400", "plan.group_cycle") as refusal:
            if verb == "plan":
                pipeline.plan(transaction_scope="per_group")
            else:
                pipeline.start(transaction_scope="per_group")
        assert refusal.detail["cycle"] == ["a + c", "b", "a + c"]
    assert scopes(pipeline, transaction_scope="per_group", procedures=["a", "c"]) == [["a", "c"]]


def test_a_circle_that_got_into_the_catalog_by_hand_is_named_and_not_run(pipeline: Pipeline) -> None:
    add(pipeline, "before")
    add(pipeline, "a", "before")
    add(pipeline, "b", "a")
    add(pipeline, "after", "b")
    pipeline.apply()
    pipeline.conn.execute(
        "insert into etl.dependencies select a.procedure_id, b.procedure_id from etl.procedures a, "
        "etl.procedures b where (a.name, b.name) = ('a', 'b')"
    )
    with refused("PT400", "plan.cycle") as refusal:
        pipeline.start()
    assert refusal.detail["cycle"] in (["a", "b", "a"], ["b", "a", "b"])
    assert order(pipeline, procedures=["before", "after"]) == ["before", "after"]


# -- selections --


def test_the_order_holds_through_procedures_that_are_not_selected(pipeline: Pipeline) -> None:
    add(pipeline, "z")
    add(pipeline, "m", "z")
    add(pipeline, "b", "m")
    add(pipeline, "a")
    pipeline.apply()
    assert order(pipeline, procedures=["b", "z", "a"]) == ["a", "z", "b"]


def test_an_order_through_an_unselected_procedure_is_no_requirement(pipeline: Pipeline) -> None:
    pipeline.add("z", "raise 'no'")
    pipeline.add("m", dependencies=["z"])
    pipeline.add("b", dependencies=["m"])
    pipeline.apply()
    run = pipeline.start(procedures=["b", "z"])
    assert pipeline.outcomes(run.run_id) == {"z": "failed", "b": "succeeded"}


def test_a_selection_is_the_union_of_names_groups_and_tags(pipeline: Pipeline) -> None:
    add(pipeline, "a", tags=["t", "u"])
    add(pipeline, "b", "a", group="g")
    add(pipeline, "c", "b")
    add(pipeline, "d", "c", tags=["t"])
    add(pipeline, "e", "d")
    pipeline.apply()
    assert order(pipeline, procedures=["c"], groups=["g"], tags=["u"]) == ["a", "b", "c"]
    assert order(pipeline, tags=["t"]) == ["a", "d"]
    assert order(pipeline, procedures=["c"], with_upstream=True) == ["a", "b", "c"]
    assert order(pipeline, procedures=["c"], with_downstream=True) == ["c", "d", "e"]
    assert order(pipeline, procedures=["c"], with_upstream=True, with_downstream=True) == [
        "a",
        "b",
        "c",
        "d",
        "e",
    ]


def test_dependencies_that_are_not_part_of_the_run_are_noted_with_their_age(pipeline: Pipeline) -> None:
    add(pipeline, "a")
    add(pipeline, "b", kind="dimension")
    add(pipeline, "c", "a", "b")
    pipeline.apply()
    assert pipeline.plan()[-1]["notes"] is None
    pipeline.start(procedures=["a"])
    succeeded = pipeline.value("select to_jsonb(ended_at) #>> '{}' from etl.procedure_runs")
    (row,) = pipeline.plan(procedures=["c"])
    assert row["depends_on"] == ["a", "b"]
    assert (
        row["notes"]
        == f"needs a, which is not in this run and last succeeded at {succeeded}; needs b, which is not in "
        f"this run and never succeeded"
    )


# -- the property --


def random_pipeline(rng: random.Random, pipeline: Pipeline, size: int) -> None:
    """Replaces the procedures by a random graph without cycles; names say nothing about the order."""
    pipeline.procedures.clear()
    names = [f"p{n}" for n in range(size)]
    rng.shuffle(names)
    kinds: dict[str, str] = {}
    per_group = {group: rng.random() < 0.6 for group in "gh"}
    for position, name in enumerate(names):
        kinds[name] = rng.choice(["dimension", "fact"])
        group = rng.choice("gh") if rng.random() < 0.4 else None
        needs = rng.sample(names[:position], min(position, rng.choice([0, 1, 1, 2, 4])))
        if kinds[name] == "dimension" and rng.random() < 0.8:
            needs = [other for other in needs if kinds[other] == "dimension"]
        add(
            pipeline,
            name,
            *needs,
            kind=kinds[name],
            allow_fact_dependency=True,
            group=group,
            transaction_scope="per_group" if group and per_group[group] else "per_procedure",
        )
    rng.shuffle(pipeline.procedures)


def reach(pipeline: Pipeline) -> dict[str, set[str]]:
    """What each procedure needs, directly and through others."""
    direct = {p["name"]: set(p["dependencies"]) for p in pipeline.procedures}
    closed: dict[str, set[str]] = {}

    def close(name: str) -> set[str]:
        if name not in closed:
            closed[name] = direct[name].union(*map(close, direct[name]))
        return closed[name]

    for name in direct:
        close(name)
    return closed


def contracts_without_a_circle(scope_of: dict[str, str], above: dict[str, set[str]]) -> bool:
    """Whether the scopes can be put in order: repeatedly take away one that waits for no other."""
    waits: dict[str, set[str]] = {scope: set() for scope in scope_of.values()}
    for name, needs in above.items():
        if name in scope_of:
            waits[scope_of[name]] |= {scope_of[need] for need in needs if need in scope_of} - {scope_of[name]}
    while waits:
        ready = [scope for scope, needs in waits.items() if not needs & waits.keys()]
        if not ready:
            return False
        for scope in ready:
            del waits[scope]
    return True


def check_rows(
    rows: list[Row], definitions: dict[str, Row], above: dict[str, set[str]], scope_of: dict[str, str]
) -> None:
    position = {row["name"]: n for n, row in enumerate(rows)}
    assert [row["order_index"] for row in rows] == list(range(1, len(rows) + 1))
    assert position.keys() == scope_of.keys()
    assert [(a, b) for a in position for b in above[a] & position.keys() if position[b] > position[a]] == []
    index_of = {name: next(row["scope_index"] for row in rows if row["name"] == name) for name in position}
    assert len(set(index_of.values())) == len(set(scope_of.values()))
    assert all(
        (index_of[a] == index_of[b]) == (scope_of[a] == scope_of[b]) for a in position for b in position
    )
    assert [row["scope_index"] for row in rows] == sorted(row["scope_index"] for row in rows)

    def touches_fact(name: str) -> bool:
        return bool(definitions[name]["type"] == "fact")

    # A scope is early when neither it nor anything before it contains a fact: early ones come first.
    members: dict[str, set[str]] = {}
    for name, scope in scope_of.items():
        members.setdefault(scope, set()).add(name)
    late: set[str] = {scope for scope, names in members.items() if any(map(touches_fact, names))}
    while True:
        more = {
            scope
            for scope, names in members.items()
            if any(scope_of.get(need) in late for name in names for need in above[name])
        } - late
        if not more:
            break
        late |= more
    lateness = [scope_of[row["name"]] in late for row in rows]
    assert lateness == sorted(lateness)


def check_scopes(pipeline: Pipeline, request: Row) -> None:
    """The counters of a stored run are the numbers of edges to each scope; every edge leads onward."""
    with pipeline.conn.transaction(force_rollback=True):
        run_id = pipeline.value("select run_id from etl._begin_run(%s)", Jsonb(request))
        stored = pipeline.rows("select * from etl.run_scopes where run_id = %s order by scope_index", run_id)
    assert [scope["scope_index"] for scope in stored] == list(range(1, len(stored) + 1))
    incoming = dict.fromkeys(range(1, len(stored) + 1), 0)
    for scope in stored:
        for edge in scope["required_by"] + scope["precedes"]:
            assert edge > scope["scope_index"]
            incoming[edge] += 1
        assert not set(scope["required_by"]) & set(scope["precedes"])
    assert incoming == {scope["scope_index"]: scope["remaining_dependencies"] for scope in stored}
    barriers = [scope["scope_index"] for scope in stored if scope["kind"] == "barrier"]
    steps = [scope["scope_index"] for scope in stored if scope["kind"] == "steps"]
    for barrier in barriers:
        following = stored[barrier - 1]["precedes"]
        assert following
        assert all(
            any(b in stored[s - 1]["precedes"] for b in barriers if b > s) for s in steps if s < barrier
        )
        assert all(
            any(s in stored[b - 1]["precedes"] for b in barriers if b < s) for s in steps if s > barrier
        )


def test_every_plan_of_random_pipelines_is_topological_with_dimensions_first_and_groups_together(
    pipeline: Pipeline,
) -> None:
    rng = random.Random(7)
    planned = circles = 0
    for _ in range(40):
        random_pipeline(rng, pipeline, rng.randint(2, 18))
        definitions = {p["name"]: p for p in pipeline.procedures}
        above = reach(pipeline)

        def scope_of(
            names: set[str], override: str | None, definitions: dict[str, Row] = definitions
        ) -> dict[str, str]:
            return {
                name: p["group"]
                if p["group"] and (override or p["transaction_scope"]) == "per_group"
                else name
                for name, p in definitions.items()
                if name in names
            }

        if not contracts_without_a_circle(scope_of(set(definitions), None), above):
            circles += 1
            with refused("PT400", "plan.group_cycle"):
                pipeline.apply()
            continue
        pipeline.apply()
        for override in (None, "per_group", "per_procedure"):
            chosen = set(rng.sample(sorted(definitions), rng.randint(1, len(definitions))))
            wanted = scope_of(chosen, override)
            request: Row = {"procedures": sorted(chosen)} | (
                {"transaction_scope": override} if override else {}
            )
            if not contracts_without_a_circle(wanted, above):
                circles += 1
                with refused("PT400", "plan.group_cycle"):
                    pipeline.plan(**request)
                continue
            planned += 1
            check_rows(pipeline.plan(**request), definitions, above, wanted)
            check_scopes(pipeline, request)
    assert planned > 60
    assert circles > 5


def test_a_thousand_procedures_are_planned_in_order(pipeline: Pipeline) -> None:
    rng = random.Random(1)
    names = [f"p{n:04}" for n in range(1000)]
    rng.shuffle(names)
    for position, name in enumerate(names):
        add(
            pipeline,
            name,
            *sorted(rng.sample(names[:position], min(position, 3))),
            kind="dimension" if position < 500 else "fact",
        )
    pipeline.apply()
    place: dict[str, int] = {row["name"]: row["order_index"] for row in pipeline.plan()}
    assert sorted(place.values()) == list(range(1, 1001))
    assert all(place[need] < place[p["name"]] for p in pipeline.procedures for need in p["dependencies"])
    assert max(place[p["name"]] for p in pipeline.procedures if p["type"] == "dimension") == 500
    check_scopes(pipeline, {})


# -- what else a plan shows --


def test_a_run_does_what_the_plan_said(pipeline: Pipeline) -> None:
    pipeline.sql("create materialized view silver.mv as select 1 as n")
    refresh = {"name": "silver.mv", "after": "run", "on": "success", "concurrently": "auto"}
    country = {"name": "country", "type": "string", "required": False, "default": "DE"}
    pipeline.add("dim", type="dimension", default_mode="full", allow_full_refresh=True)
    pipeline.add(
        "a",
        arguments="country text, p_mode text, p_since timestamptz",
        params=[country],
        isolation="repeatable read",
        **GROUP,
    )
    pipeline.add("b", dependencies=["a", "dim"], mv_refresh=[refresh], isolation="repeatable read", **GROUP)
    pipeline.add("c", dependencies=["b"])
    pipeline.apply()
    request: Row = {"params": {"a": {"country": "US"}}}
    planned = pipeline.plan(**request)
    run = pipeline.start(**request)
    done = pipeline.rows("select * from etl.step_history where run_id = %s order by order_index", run.run_id)
    same = {
        "order_index": "order_index",
        "name": "procedure",
        "procedure_type": "type",
        "group_name": "group_name",
        "step_mode": "mode",
        "tx_scope": "tx_scope",
        "isolation": "isolation",
        "parameters": "parameters",
    }
    steps = [row for row in planned if row["kind"] == "step"]
    assert [{key: row[key] for key in same} for row in steps] == [
        {key: row[there] for key, there in same.items()} for row in done
    ]
    assert [row["statement"] for row in steps] == [
        row["statement"].replace(f"{run.run_id}::", "null::") for row in done
    ]
    assert [row["scope_index"] for row in steps] == [row["scope_index"] for row in pipeline.steps(run.run_id)]
    assert [(row["scope_index"], row["name"]) for row in planned if row["kind"] == "refresh"] == [
        (row["scope_index"], row["mv_name"]) for row in pipeline.rows("select * from etl.mv_refreshes")
    ]
    assert pipeline.trace() == [row["name"] for row in steps]


def test_a_step_shows_the_statement_with_its_values_written_in(pipeline: Pipeline) -> None:
    label = {"name": "label", "type": "string", "required": True}
    pipeline.add(
        "load",
        "insert into silver.trace (step) values (label || p_mode)",
        arguments="label text, p_mode text",
        params=[label],
    )
    pipeline.apply()
    (row,) = pipeline.plan(params={"load": {"label": "it's $1 %"}})
    pipeline.conn.cursor().execute(row["statement"].encode())
    assert pipeline.trace() == ["it's $1 %incremental"]


@pytest.mark.parametrize("strategy", WINDOW)
def test_a_plan_shows_the_window_that_a_step_would_get_now(strategy: str, pipeline: Pipeline) -> None:
    pipeline.sql(
        "create table bronze.sales (id bigint, etl_xid xid8 default pg_current_xact_id(), ingested_at "
        "timestamptz default now())"
    )
    pipeline.sql("insert into bronze.sales (id) values (41)")
    arguments, source = WINDOW[strategy]
    watermark = {"strategy": strategy, "source": [source], "state_key": "load", "delay_ms": 0}
    pipeline.add("load", arguments=arguments, watermark=watermark, allow_full_refresh=True)
    pipeline.apply()
    (first,) = pipeline.plan()
    assert first["window_since"] is None
    assert first["window_until"] is not None
    if strategy == "id":
        assert first["window_until"] == "42"
    pipeline.start()
    pipeline.sql("insert into bronze.sales (id) values (50)")
    (second,) = pipeline.plan()
    assert second["window_since"] == pipeline.watermark("load")
    assert second["window_until"] != second["window_since"]
    assert f"'{second['window_until']}'" in second["statement"]
    (whole,) = pipeline.plan(mode="full", confirm_full_refresh=True, reason="a test")
    assert (whole["window_since"], whole["step_mode"]) == (None, "full")
    assert pipeline.value("select count(*) from etl.state_history") == 1


def test_an_as_of_caps_the_window_and_one_before_the_watermark_leaves_it_empty(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.sales (ingested_at timestamptz)")
    watermark = {
        "strategy": "timestamp",
        "source": ["bronze.sales.ingested_at"],
        "state_key": "load",
        "delay_ms": 0,
    }
    pipeline.add("load", arguments=WINDOW["timestamp"][0], watermark=watermark)
    pipeline.apply()
    early, late = datetime(2024, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1)
    assert datetime.fromisoformat(pipeline.plan(as_of=early)[0]["window_until"]) == early
    assert datetime.fromisoformat(pipeline.plan(as_of=late)[0]["window_until"]) < late
    pipeline.start()
    (row,) = pipeline.plan(as_of=early)
    assert row["window_since"] == row["window_until"] == pipeline.watermark("load")


def test_a_plan_needs_no_more_than_a_reader_and_writes_nothing(pipeline: Pipeline) -> None:
    pipeline.add(
        "load",
        arguments="p_since timestamptz",
        watermark={"strategy": "timestamp", "source": ["silver.t.at"], "state_key": "k", "delay_ms": 0},
    )
    pipeline.sql("create table silver.t (at timestamptz)")
    pipeline.apply()
    reader = pipeline.login("etl_reader")
    with reader.transaction():
        reader.execute("set transaction read only")
        assert reader.execute("select name from etl.plan_run()").fetchall() == [("load",)]
        assert reader.execute("select pg_current_xact_id_if_assigned()").fetchone() == (None,)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        pipeline.login().execute("select * from etl.plan_run()")


def test_a_plan_is_refused_for_the_reasons_for_which_a_run_is(pipeline: Pipeline) -> None:
    add(pipeline, "load")
    pipeline.apply()
    requests: list[tuple[str, str, Row]] = [
        ("PT404", "procedure.unknown", {"procedures": ["nobody"]}),
        ("PT404", "group.unknown", {"groups": ["nobody"]}),
        ("PT404", "tag.unknown", {"tags": ["nobody"]}),
        ("PT404", "mv_refresh.unknown", {"mv_refresh": ["mart.nothing"]}),
        ("PT404", "pipeline.unknown", {"pipeline": "nobody"}),
        ("PT422", "selection.empty", {"procedures": []}),
        ("PT422", "request.invalid", {"mode": "fast"}),
        ("PT422", "request.invalid", {"transaction_scope": "per_run"}),
        ("PT422", "request.invalid", {"max_concurrency": 65}),
        ("PT422", "params.unused", {"params": {"nobody": {}}}),
        ("PT403", "full_refresh.not_allowed", {"mode": "full"}),
    ]
    for sqlstate, code, request in requests:
        with refused(sqlstate, code):
            pipeline.plan(**request)
        with refused(sqlstate, code):
            pipeline.start(**request)
    assert pipeline.value("select count(*) from etl.runs") == 0


def test_all_that_is_wrong_with_a_request_is_found_at_once(pipeline: Pipeline) -> None:
    add(pipeline, "load")
    pipeline.apply()
    with refused("PT404", "procedure.unknown") as refusal:
        pipeline.plan(procedures=["x", "y", "load"], groups=["g"], tags=["t"], params={"load": {"p": 1}})
    assert refusal.codes == [
        "procedure.unknown",
        "procedure.unknown",
        "group.unknown",
        "tag.unknown",
        "params.invalid",
    ]


def test_a_request_names_its_pipeline_only_where_there_are_several(pipeline: Pipeline, db: Database) -> None:
    with refused("PT404", "pipeline.unknown") as none:
        pipeline.plan()
    assert none.hint == "apply a configuration: b2s sync-config"
    with Pipeline(db, "second") as second:
        add(second, "mine")
        second.apply()
        assert order(second) == ["mine"]
        add(pipeline, "load")
        pipeline.apply()
        assert (order(second, pipeline="second"), order(pipeline)) == (["mine"], ["load"])
        with refused("PT404", "pipeline.unknown") as refusal:
            pipeline.plan(pipeline="third")
        assert refusal.detail["pipelines"] == ["bronze_to_silver", "second"]
        with refused("PT404", "procedure.unknown"):
            pipeline.plan(procedures=["mine"])


def test_procedures_that_share_a_watermark_are_not_run_apart(pipeline: Pipeline) -> None:
    """One alone would move the watermark over rows that the other has not read."""
    pipeline.sql("create table bronze.sales (ingested_at timestamptz)")
    watermark = {
        "strategy": "timestamp",
        "source": ["bronze.sales.ingested_at"],
        "state_key": "shared",
        "delay_ms": 0,
    }
    for name in ("a", "b"):
        pipeline.add(name, arguments=WINDOW["timestamp"][0], watermark=watermark, **GROUP)
    pipeline.add("c")
    pipeline.apply()
    apart: list[Row] = [
        {"procedures": ["a"]},
        {"procedures": ["b", "c"]},
        {"transaction_scope": "per_procedure"},
    ]
    for request in apart:
        with refused("PT422", "selection.splits_watermark") as refusal:
            pipeline.start(**request)
        assert refusal.messages == ["a, b share the watermark shared and run together, in one transaction"]
    assert pipeline.start(procedures=["c"]).status == "succeeded"
    run = pipeline.start(groups=["g"], transaction_scope="per_group")
    assert (run.status, pipeline.outcomes(run.run_id)) == ("succeeded", {"a": "succeeded", "b": "succeeded"})
    assert pipeline.start(transaction_scope="per_group").status == "succeeded"
