"""Requests come from any client: whatever one holds, it is accepted, or refused with a stable code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from tests.pipelines import Pipeline, call
from tests.servers import Connection, Server

EXAMPLES: Final = int(os.environ.get("B2S_FUZZ_EXAMPLES", "200"))
"""For each test; B2S_FUZZ_EXAMPLES=20000 for a longer look."""

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="B2S_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# What neither the protocol nor JSON in Postgres can carry never reaches a routine.
texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30)
names = st.one_of(
    texts, st.sampled_from(["load", "other", "late", "g", "", '"', "a.b", "select 1", "load; --"])
)
numbers = st.one_of(
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -1, 1, 64, 65, 2**31, 2**63, 1e308, 1e-308]),
)
documents = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, names),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=8,
)
params = st.one_of(
    documents,
    st.dictionaries(
        names,
        st.one_of(
            documents,
            st.dictionaries(st.sampled_from(["n", "d", "at", "id", "tags", "x"]), documents, max_size=5),
        ),
        max_size=3,
    ),
)
fields: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.one_of(names, st.sampled_from(["incremental", "full"])),
    "procedures": st.lists(st.one_of(names, st.none()), max_size=4),
    "groups": st.lists(names, max_size=3),
    "tags": st.lists(st.one_of(names, st.none()), max_size=3),
    "with_upstream": st.booleans(),
    "with_downstream": st.booleans(),
    "params": params,
    "transaction_scope": st.one_of(names, st.sampled_from(["per_procedure", "per_group"])),
    "mv_refresh": documents,
    "idempotency_key": st.one_of(texts, st.text("k", min_size=200, max_size=9000)),
    "confirm_full_refresh": st.booleans(),
    "approved_by": names,
    "reason": texts,
    "max_concurrency": st.integers(min_value=-(2**31), max_value=2**31 - 1),
    "pipeline": st.one_of(names, st.just("bronze_to_silver")),
    "as_of": st.one_of(st.datetimes().map(str), st.sampled_from(["infinity", "-infinity", "epoch", "now"])),
}
typed = st.fixed_dictionaries({}, optional=fields)
untyped = st.one_of(
    documents,
    st.dictionaries(
        st.one_of(st.sampled_from([*fields, "dry_run", "run_id", "kind", "resume"]), names),
        documents,
        max_size=6,
    ),
    st.fixed_dictionaries(
        {}, optional={name: st.one_of(documents, values) for name, values in fields.items()}
    ),
)


@pytest.fixture(scope="module")
def pipeline(server: Server, template: str) -> Iterator[Pipeline]:
    database = server.create_database(template=template)
    with Pipeline(database) as pipeline:
        pipeline.add(
            "load",
            arguments="p_mode text, n bigint, d date, at timestamptz, id uuid, tags text[]",
            params=[
                {"name": "n", "type": "integer", "minimum": 0, "default": 1},
                {"name": "d", "type": "string", "format": "date"},
                {"name": "at", "type": "string", "format": "date-time"},
                {"name": "id", "type": "string", "format": "uuid"},
                {"name": "tags", "type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}},
            ],
            group="g",
            tags=["late"],
            allow_full_refresh=True,
        )
        pipeline.add("other", dependencies=["load"], group="g", transaction_scope="per_group")
        pipeline.apply(approvals="two_person")
        yield pipeline
    database.drop()


def verdict(conn: Connection, query: Any, values: list[Any]) -> str | None:
    """None when it was accepted, else the code of the refusal; nothing of it stays."""
    diagnostic = None
    try:
        with conn.transaction(force_rollback=True):
            conn.execute(query, values)
    except psycopg.Error as error:
        diagnostic = error.diag
    if diagnostic is None:
        return None
    found = f"{diagnostic.sqlstate} {diagnostic.message_primary} {diagnostic.context}"
    assert re.fullmatch("PT4[0-9][0-9]", diagnostic.sqlstate or ""), found
    code = json.loads(diagnostic.message_detail or "{}").get("code")
    assert code, found
    return str(code)


@fuzz
@given(arguments=typed)
def test_typed_arguments_are_accepted_or_refused_with_a_code(
    pipeline: Pipeline, arguments: dict[str, Any]
) -> None:
    given_ = {**arguments, **({"params": Jsonb(arguments["params"])} if "params" in arguments else {})}
    for verb in ("etl.submit_run", "etl.plan_run"):
        known = {k: v for k, v in given_.items() if verb == "etl.submit_run" or k != "idempotency_key"}
        verdict(pipeline.conn, *call(verb, known, "select * from"))


@fuzz
@given(document=untyped)
@pytest.mark.parametrize("helper", ["_submit", "_show_plan", "_begin_run", "_rehearse", "_begin_backfill"])
def test_a_document_of_any_form_is_accepted_or_refused_with_a_code(
    pipeline: Pipeline, helper: str, document: Any
) -> None:
    verdict(pipeline.conn, f"select * from etl.{helper}(%s)".encode(), [Jsonb(document)])


@fuzz
@given(
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "pipeline": names,
            "status": st.lists(st.one_of(names, st.just("queued"), st.none()), max_size=3),
            "kind": st.one_of(names, st.just("run")),
            "procedure": names,
            "requested_by": names,
            "before": st.integers(min_value=-(2**63), max_value=2**63 - 1),
            "page_size": st.one_of(st.none(), st.integers(min_value=-(2**31), max_value=2**31 - 1)),
            "since": st.sampled_from(["infinity", "-infinity", "epoch"]),
        },
    )
)
def test_a_page_of_runs_is_given_or_refused_with_a_code(
    pipeline: Pipeline, arguments: dict[str, Any]
) -> None:
    verdict(pipeline.conn, *call("etl.list_runs", arguments, "select"))


def test_what_the_fuzz_would_find_is_found(pipeline: Pipeline) -> None:
    """An error that is none of b2s's own is a failure of these tests."""
    with pytest.raises(AssertionError):
        verdict(pipeline.conn, "select 1 / 0", [])
    assert verdict(pipeline.conn, "select * from etl.submit_run()", []) is None
    assert verdict(pipeline.conn, "select * from etl.submit_run(mode => 'x')", []) == "request.invalid"
