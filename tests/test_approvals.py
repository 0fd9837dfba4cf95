"""Four eyes: a full refresh that another admin has to approve, and who counts as another one."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pipelines import Pipeline, call, refused
from tests.servers import Connection, Database

FULL: dict[str, Any] = {"mode": "full", "confirm_full_refresh": True, "reason": "new tax rule"}


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.add("load", allow_full_refresh=True)
        pipeline.apply(approvals="two_person")
        yield pipeline


def submit(conn: Connection, **arguments: Any) -> int:
    row = conn.execute(*call("etl.submit_run", {**FULL, **arguments}, "select run_id from")).fetchone()
    assert row is not None
    return int(row[0])


def approve(conn: Connection, run_id: int, **arguments: Any) -> str:
    row = conn.execute(*call("etl.approve_run", {"run_id": run_id, **arguments}, "select")).fetchone()
    assert row is not None
    return str(row[0])


def work(pipeline: Pipeline, run_id: int | None = None) -> int:
    return int(pipeline.value("call etl.work(run_id => %s)", run_id))


def front_end(pipeline: Pipeline, *roles: str) -> Connection:
    """A session of a front end: it logs in with no rights, and says who asks in each transaction."""
    conn = pipeline.login()
    pipeline.conn.execute(f"alter role {conn.info.user} noinherit".encode())
    pipeline.conn.execute(f"grant {', '.join(('etl_frontend', *roles))} to {conn.info.user}".encode())
    return conn


class As:
    """A request in the name of somebody, made as PostgREST and `b2s api` make it."""

    def __init__(self, conn: Connection, role: str, claims: str) -> None:
        self.conn, self.role, self.claims = conn, role, claims
        self.transaction = conn.transaction()

    def __enter__(self) -> Connection:
        self.transaction.__enter__()
        self.conn.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            [self.role, self.claims],
        )
        return self.conn

    def __exit__(self, *error: Any) -> None:
        self.transaction.__exit__(*error)


def ann(conn: Connection, role: str = "etl_admin") -> As:
    return As(conn, role, '{"sub": "ann", "role": "etl_admin"}')


def bob(conn: Connection, role: str = "etl_admin") -> As:
    return As(conn, role, '{"sub": "bob", "role": "etl_admin"}')


def test_a_full_refresh_is_not_started_by_one_person(pipeline: Pipeline) -> None:
    with refused("PT403", "approval.required") as refusal:
        pipeline.start(pipeline.login("etl_admin"), **FULL)
    assert "etl.submit_run" in refusal.hint
    assert "etl.approve_run" in refusal.hint
    with refused("PT403", "approval.required"):
        pipeline.start(pipeline.login("etl_admin"), **FULL, approved_by="somebody")
    assert pipeline.value("select count(*) from etl.runs") == 0
    assert pipeline.start(pipeline.login("etl_operator")).status == "succeeded"


def test_a_queued_full_refresh_waits_for_another_admin_and_is_passed_by_meanwhile(pipeline: Pipeline) -> None:
    asking, approving = pipeline.login("etl_admin"), pipeline.login("etl_admin")
    run_id = submit(asking)
    incremental = submit(asking, mode="incremental")
    assert pipeline.run(run_id)["approved_by"] is None
    assert work(pipeline) == 1
    assert [pipeline.run(one)["status"] for one in (run_id, incremental)] == ["queued", "succeeded"]
    waits = "select run_id from etl.run_history where awaits_approval"
    assert pipeline.column(waits) == [run_id]
    with refused("PT403", "approval.required") as refusal:
        work(pipeline, run_id)
    assert refusal.hint == f"let another admin run: select etl.approve_run({run_id})"
    assert (
        approve(approving, run_id, reason="looked at it") == f"run {run_id} is approved; a worker takes it up"
    )
    assert pipeline.column(waits) == []
    assert work(pipeline) == 1
    run = pipeline.run(run_id)
    assert (run["status"], run["requested_by"], run["approved_by"]) == (
        "succeeded",
        asking.info.user,
        approving.info.user,
    )
    (approval,) = pipeline.rows("select * from etl.approvals")
    assert approval["reason"] == "looked at it"
    assert approval["fingerprint"] == run["fingerprint"]
    assert approval["session_user_name"] == approving.info.user
    with refused("PT409", "approval.too_late"):
        approve(approving, run_id)


def test_whoever_asks_cannot_approve_not_even_in_another_role(pipeline: Pipeline) -> None:
    asking = pipeline.login("etl_admin")
    run_id = submit(asking)
    with refused("PT403", "approval.own_request"):
        approve(asking, run_id)
    asking.execute("set role etl_admin")
    with refused("PT403", "approval.own_request"):
        approve(asking, run_id)
    asking.execute('set request.jwt.claims = \'{"sub": "bob"}\'')
    with refused("PT403", "approval.own_request"):
        approve(asking, run_id)
    assert pipeline.run(run_id)["approved_by"] is None


def test_only_an_admin_approves(pipeline: Pipeline) -> None:
    run_id = submit(pipeline.login("etl_admin"))
    with refused("42501"):
        approve(pipeline.login("etl_operator"), run_id)


def test_an_approver_who_is_named_is_the_one_who_has_to_approve(pipeline: Pipeline) -> None:
    asking, named, other = (pipeline.login("etl_admin") for _ in range(3))
    with refused("PT403", "approval.own_request"):
        submit(asking, approved_by=asking.info.user)
    run_id = submit(asking, approved_by=named.info.user)
    with refused("PT403", "approval.other_approver"):
        approve(other, run_id)
    approve(named, run_id)
    assert work(pipeline) == 1


def test_an_approver_who_is_no_admin_any_more_does_not_count(pipeline: Pipeline) -> None:
    asking, approving = pipeline.login("etl_admin"), pipeline.login("etl_admin")
    run_id = submit(asking)
    approve(approving, run_id)
    pipeline.conn.execute(f"revoke etl_admin from {approving.info.user}".encode())
    assert work(pipeline) == 0
    assert pipeline.run(run_id)["error_code"] == "approval.required"


def test_what_needs_no_approval_gets_none(pipeline: Pipeline) -> None:
    admin = pipeline.login("etl_admin")
    run_id = submit(pipeline.login("etl_admin"), mode="incremental")
    with refused("PT409", "approval.not_needed"):
        approve(admin, run_id)
    with refused("PT404", "run.unknown"):
        approve(admin, 4711)
    pipeline.apply(approvals="none")
    assert pipeline.start(admin, **FULL).status == "succeeded"


def test_a_resumed_full_refresh_needs_the_approval_of_somebody_else_than_who_resumes(
    pipeline: Pipeline,
) -> None:
    pipeline.add("broken", "raise exception 'no'", dependencies=["load"], allow_full_refresh=True)
    pipeline.apply(approvals="two_person")
    asking, approving, third = (pipeline.login("etl_admin") for _ in range(3))
    run_id = submit(asking)
    approve(approving, run_id)
    assert work(pipeline) == 1
    assert pipeline.run(run_id)["status"] == "failed"
    pipeline.routine("broken")

    def resume(conn: Connection) -> Any:
        row = conn.execute(*call("etl.resume_run", {"run_id": run_id})).fetchone()
        assert row is not None
        return row

    with refused("PT403", "approval.required") as refusal:
        resume(approving)
    assert refusal.hint == f"let another admin run: select etl.approve_run({run_id})"
    assert approve(third, run_id) == f"run {run_id} may be resumed"
    new_run_id, status = resume(approving)
    assert status == "succeeded"
    assert pipeline.run(new_run_id)["approved_by"] == third.info.user


def test_behind_a_front_end_persons_are_told_apart_by_their_subject(pipeline: Pipeline) -> None:
    web = front_end(pipeline, "etl_admin")
    with ann(web):
        run_id = submit(web)
    run = pipeline.run(run_id)
    assert (run["requested_by"], run["subject"], run["requested_role"], run["session_user_name"]) == (
        "ann",
        "ann",
        "etl_admin",
        web.info.user,
    )
    with refused("PT403", "approval.own_request"), ann(web):
        approve(web, run_id)
    with refused("PT403", "approval.anonymous"), As(web, "etl_admin", '{"role": "etl_admin"}'):
        approve(web, run_id)
    with refused("PT403", "approval.anonymous"), As(web, "etl_admin", ""):
        submit(web)
    with bob(web):
        approve(web, run_id)
    assert work(pipeline) == 1
    assert pipeline.run(run_id)["approved_by"] == "bob"


# -- who asks --


def test_claims_count_only_from_a_login_that_was_granted_etl_frontend_itself(pipeline: Pipeline) -> None:
    claims = 'set request.jwt.claims = \'{"sub": "ann"}\''
    stranger = pipeline.login("etl_operator")
    stranger.execute(claims)
    run = pipeline.run(submit(stranger, mode="incremental"))
    assert (run["requested_by"], run["subject"]) == (stranger.info.user, None)
    superuser = pipeline.db.connect()
    superuser.execute(claims)
    assert pipeline.run(submit(superuser, mode="incremental"))["requested_by"] == superuser.info.user
    between = pipeline.login("etl_frontend")
    nested = pipeline.login(between.info.user, "etl_operator")
    nested.execute(claims)
    assert pipeline.run(submit(nested, mode="incremental"))["requested_by"] == nested.info.user
    pipeline.conn.execute(f"revoke {between.info.user} from {nested.info.user}".encode())


@pytest.mark.parametrize("claims", ["{", "no json", '{"sub": '])
def test_claims_that_are_no_json_are_refused(pipeline: Pipeline, claims: str) -> None:
    web = front_end(pipeline, "etl_operator")
    with refused("PT400", "claims.invalid"), As(web, "etl_operator", claims):
        submit(web, mode="incremental")


@pytest.mark.parametrize("claims", ["", "[]", "1", "{}", '{"sub": null}', '{"sub": "  "}'])
def test_a_front_end_that_does_not_say_who_asks_is_recorded_by_its_role(
    pipeline: Pipeline, claims: str
) -> None:
    web = front_end(pipeline, "etl_operator")
    with As(web, "etl_operator", claims):
        run_id = submit(web, mode="incremental")
    run = pipeline.run(run_id)
    assert (run["requested_by"], run["subject"]) == ("etl_operator", None)


def test_the_rights_are_those_of_the_role_and_not_of_the_name_of_the_subject(pipeline: Pipeline) -> None:
    web = front_end(pipeline, "etl_operator")
    with refused("PT403", "full_refresh.not_admin"), As(web, "etl_operator", '{"sub": "postgres"}'):
        submit(web)
    with refused("42501"), As(web, "etl_operator", '{"sub": "ann"}'):
        web.execute("select etl.freeze_full_refresh(true, 'x')")
    with refused("42501"):
        web.execute("select etl.list_procedures()")


def test_subjects_cancel_their_own_runs_only(pipeline: Pipeline) -> None:
    web = front_end(pipeline, "etl_operator")
    with ann(web, "etl_operator"):
        run_id = submit(web, mode="incremental")
    cancel = "select etl.cancel_run(%s)"
    with refused("PT403", "run.not_yours"), bob(web, "etl_operator"):
        web.execute(cancel, [run_id])
    with ann(web, "etl_operator"):
        web.execute(cancel, [run_id])
    run = pipeline.run(run_id)
    assert (run["status"], run["cancel_requested_by"]) == ("cancelled", "ann")


def test_a_request_of_a_subject_is_executed_with_the_role_it_was_made_in(pipeline: Pipeline) -> None:
    pipeline.apply(approvals="none")
    web = front_end(pipeline, "etl_admin")
    with ann(web):
        run_id = submit(web)
    assert work(pipeline) == 1
    assert pipeline.run(run_id)["status"] == "succeeded"


# -- what is kept of every change --


def test_every_change_is_kept_with_who_made_it_from_where_and_cannot_be_changed(pipeline: Pipeline) -> None:
    pipeline.sql("create table bronze.src (id bigint)")
    pipeline.add(
        "windowed",
        arguments="p_since bigint, p_until bigint",
        watermark={"strategy": "id", "source": ["bronze.src.id"], "state_key": "w", "delay_ms": 0},
    )
    web = front_end(pipeline, "etl_admin")
    web.execute("set application_name = 'the portal'")
    with ann(web):
        web.execute("select etl.apply_config(%s)", [json.dumps(pipeline.spec(approvals="two_person"))])
        web.execute("select etl.freeze_full_refresh(true, 'month end')")
        web.execute("select etl.freeze_full_refresh(false, 'over')")
        web.execute("select etl.set_watermark('w', null, 'again')")
        run_id = submit(web, procedures=["load"])
    with bob(web):
        approve(web, run_id)
        web.execute("select etl.cancel_run(%s)", [run_id])
    made = (web.info.user, "the portal")
    for table, who in {
        "config_versions": "requested_by",
        "full_refresh_freezes": "changed_by",
        "state_history": "changed_by",
        "runs": "requested_by",
        "approvals": "approved_by",
    }.items():
        login = "applied_by" if table == "config_versions" else "session_user_name"
        query = f"select {who}, {login}, application_name from etl.{table} order by 1, {login} desc"
        found = [tuple(row.values()) for row in pipeline.rows(query)]
        assert ("bob" if table == "approvals" else "ann", *made) in found, table
        for role in ("etl_engine", "none"):
            pipeline.conn.execute(f"set role {role}".encode())
            for change in (
                f"update etl.{table} set {who} = 'x'",
                f"delete from etl.{table}",
                f"truncate etl.{table} cascade",
            ):
                with refused("PT409", "history.immutable"):
                    pipeline.conn.execute(change.encode())
