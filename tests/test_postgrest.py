"""The verbs as PostgREST calls them: its login, its settings, one transaction a request, functions only.

PostgREST itself does not run here; what it does to a session is written down in its documentation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.apis import front_end
from tests.pipelines import Pipeline, refused
from tests.servers import Connection, Database

BODY = {"procedures": ["load"], "params": {"load": {"size": 2}}, "idempotency_key": "k1", "mv_refresh": False}
SUBMIT = """
with pgrst_payload as (select %s::json as json_data), pgrst_args as (
  select * from json_to_record((select json_data from pgrst_payload))
    as _(procedures text[], params jsonb, idempotency_key text, mv_refresh jsonb))
select coalesce(json_agg(t), '[]') from (
  select s.* from pgrst_args a, lateral etl.submit_run(procedures => a.procedures, params => a.params,
    idempotency_key => a.idempotency_key, mv_refresh => a.mv_refresh) s) t"""
"""A call with the fields of a JSON body, as PostgREST makes it."""


class PostgRest:
    """A session of PostgREST's pool."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn

    def rpc(
        self,
        query: str,
        values: list[Any] | None = None,
        *,
        role: str = "etl_operator",
        sub: str | None = "ann",
        reads: bool = False,
    ) -> tuple[Any, str]:
        """One request; what it answers, and the status that the function has set."""
        claims = {"role": role, "aud": "b2s", "exp": 2000000000, **({"sub": sub} if sub else {})}
        with self.conn.transaction():
            if reads:
                self.conn.execute("set transaction read only")
            self.conn.execute(
                "select set_config('search_path', '\"etl\"', true), set_config('role', %s, true),"
                " set_config('request.jwt.claims', %s, true), set_config('request.method', %s, true),"
                " set_config('request.path', '/rpc/x', true), set_config('request.headers', '{}', true),"
                " set_config('request.cookies', '{}', true)",
                [role, json.dumps(claims), "GET" if reads else "POST"],
            )
            row = self.conn.execute(query.encode(), values).fetchone()
            status = self.conn.execute("select current_setting('response.status', true)").fetchone()
        assert row is not None
        assert status is not None
        return row[0], status[0] or ""


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        size = {"name": "size", "type": "integer", "minimum": 1, "default": 1}
        pipeline.add("load", arguments="size bigint", params=[size], allow_full_refresh=True)
        pipeline.apply()
        yield pipeline


@pytest.fixture
def rest(pipeline: Pipeline) -> Iterator[PostgRest]:
    with front_end(pipeline) as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("set application_name = 'PostgREST 12.2'")
        yield PostgRest(conn)


def test_a_request_is_queued_with_202_and_known_with_200(rest: PostgRest, pipeline: Pipeline) -> None:
    (found,), status = rest.rpc(SUBMIT, [json.dumps(BODY)])
    assert (found, status) == ({"run_id": found["run_id"], "status": "queued", "is_new": True}, "202")
    (again,), status = rest.rpc(SUBMIT, [json.dumps(BODY)])
    assert (again["run_id"], again["is_new"], status) == (found["run_id"], False, "200")
    run = pipeline.run(found["run_id"])
    assert (run["requested_by"], run["requested_role"], run["application_name"]) == (
        "ann",
        "etl_operator",
        "PostgREST 12.2",
    )
    assert run["parameters"] == {"load": {"size": 2}}
    assert pipeline.value("call etl.work()") == 1


def test_what_is_read_is_read_in_a_read_only_transaction(rest: PostgRest, pipeline: Pipeline) -> None:
    ids = [rest.rpc("select run_id from etl.submit_run()", sub=f"s{n}")[0] for n in range(3)]
    pipeline.value("call etl.work()")
    document, _ = rest.rpc("select etl.get_run(%s)", [ids[0]], role="etl_reader", reads=True)
    assert (document["requested_by"], document["status"]) == ("s0", "succeeded")
    page, _ = rest.rpc("select etl.list_runs(page_size => 2)", role="etl_reader", reads=True)
    assert [run["run_id"] for run in page["runs"]] == ids[:0:-1]
    rest_of_it = f"select etl.list_runs(before => {page['next_before']})"
    page, _ = rest.rpc(rest_of_it, role="etl_reader", reads=True)
    assert ([run["run_id"] for run in page["runs"]], page["next_before"]) == ([ids[0]], None)
    names, _ = rest.rpc("select array_agg(name) from etl.list_procedures()", role="etl_reader", reads=True)
    assert names == ["load"]
    readers = "('get_run', 'list_runs', 'list_procedures')"
    volatile = f"select proname from pg_proc where proname in {readers} and provolatile = 'v'"
    assert pipeline.column(volatile) == []


def test_refusals_have_the_sqlstate_that_becomes_the_status(rest: PostgRest) -> None:
    run_id, _ = rest.rpc("select run_id from etl.submit_run()")
    for sqlstate, code, query, how in (
        ("PT403", "run.not_yours", f"select etl.cancel_run({run_id})", {"sub": "bob"}),
        ("PT404", "run.unknown", "select etl.get_run(4711)", {}),
        ("PT409", "idempotency_key.reused", SUBMIT, {}),
        ("PT422", "request.invalid", "select run_id from etl.submit_run(mode => 'x')", {}),
        ("42501", None, "select run_id from etl.submit_run()", {"role": "etl_reader"}),
        ("42501", None, "select run_id from etl.submit_run()", {"role": "etl_frontend"}),
        ("42501", "run.not_owned", f"select etl._claim({run_id}, null, false)", {}),
    ):
        values = None
        if query is SUBMIT:
            rest.rpc(SUBMIT, [json.dumps(BODY)])
            values = [json.dumps({**BODY, "procedures": None})]
        with refused(sqlstate, code):
            rest.rpc(query, values, **how)  # type: ignore[arg-type]
    found, _ = rest.rpc(f"select etl.cancel_run({run_id}, reason => 'mistake')")
    assert found == "it was queued, and is not run"


def test_what_commits_cannot_be_reached_through_a_request(rest: PostgRest) -> None:
    for query in ("call etl.start_run()", "call etl.work()", "call etl.resume_run(1)", "call etl.backfill()"):
        with refused("25001", "call.in_transaction"):
            rest.rpc(query, role="etl_admin")


def test_a_session_keeps_nothing_of_a_request(rest: PostgRest) -> None:
    """The next request of a pool comes from somebody else."""
    rest.rpc("select run_id from etl.submit_run()", sub="ann", role="etl_admin")
    with rest.conn.cursor(row_factory=dict_row) as cursor:
        left = cursor.execute(
            "select current_setting('role') as role, current_setting('request.jwt.claims', true) as claims"
        ).fetchone()
    assert left is not None
    assert (left["role"], left["claims"] or "") == ("none", "")
    with refused("42501"):
        rest.conn.execute("select etl.list_procedures()")
