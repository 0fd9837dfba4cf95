"""Full refreshes: who may start one, what it needs, how it is frozen, what is remembered of it."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psycopg
import pytest

from tests.pipelines import Pipeline, refused
from tests.servers import Database

GRANTED: dict[str, Any] = {"mode": "full", "confirm_full_refresh": True, "reason": "new tax rule"}


@pytest.fixture
def pipeline(db: Database) -> Iterator[Pipeline]:
    with Pipeline(db) as pipeline:
        pipeline.sql("create table bronze.src (at timestamptz)")
        pipeline.add(
            "load",
            "insert into silver.trace (step) values (p_mode || ' since ' || coalesce(p_since::text, 'ever'))",
            arguments="p_mode text, p_since timestamptz, p_until timestamptz",
            watermark={
                "strategy": "timestamp",
                "source": ["bronze.src.at"],
                "state_key": "load",
                "delay_ms": 0,
            },
            allow_full_refresh=True,
        )
        pipeline.apply()
        yield pipeline


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in GRANTED.items() if name not in names}


def test_a_full_refresh_reads_from_the_beginning_and_sets_the_watermark(pipeline: Pipeline) -> None:
    pipeline.start()
    before = pipeline.watermark("load")
    run = pipeline.start(**GRANTED)
    assert run.status == "succeeded"
    assert pipeline.trace() == ["incremental since ever", "full since ever"]
    step = pipeline.step(run.run_id, "load")
    assert (step["mode"], step["window_since"]) == ("full", None)
    after = pipeline.watermark("load")
    assert before is not None
    assert after == step["window_until"] > before
    causes = pipeline.rows(
        "select cause, old_watermark, new_watermark from etl.state_history order by 1 desc"
    )
    assert causes == [
        {"cause": "incremental", "old_watermark": None, "new_watermark": before},
        {"cause": "full", "old_watermark": before, "new_watermark": after},
    ]
    assert pipeline.step(pipeline.start().run_id, "load")["window_since"] == after


def test_reason_and_approver_are_kept_on_the_run(pipeline: Pipeline) -> None:
    row = pipeline.run(pipeline.start(**GRANTED, approved_by="ann").run_id)
    assert (row["mode"], row["reason"], row["approved_by"]) == ("full", "new tax rule", "ann")
    admin = pipeline.login("etl_admin")
    row = pipeline.run(pipeline.start(admin, **GRANTED).run_id)
    assert (row["approved_by"], row["requested_by"]) == (admin.info.user, admin.info.user)
    assert pipeline.run(pipeline.start().run_id)["approved_by"] is None


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (without("confirm_full_refresh"), "full_refresh.unconfirmed"),
        (without("reason"), "full_refresh.no_reason"),
        ({**GRANTED, "reason": "  "}, "full_refresh.no_reason"),
    ],
    ids=str,
)
def test_a_full_refresh_needs_a_confirmation_and_a_reason(
    pipeline: Pipeline, given: dict[str, Any], code: str
) -> None:
    with refused("PT403", code) as refusal:
        pipeline.start(**given)
    assert refusal.codes == [code]
    assert "repeat the call with" in refusal.hint
    assert pipeline.value("select count(*) from etl.runs") == 0


def test_a_full_refresh_needs_the_permission_of_each_selected_procedure(pipeline: Pipeline) -> None:
    pipeline.add("other")
    pipeline.apply()
    with refused("PT403", "full_refresh.not_allowed") as refusal:
        pipeline.start(**GRANTED)
    assert refusal.detail["errors"][0]["procedures"] == ["other"]
    assert pipeline.start(**GRANTED, procedures=["load"]).status == "succeeded"


def test_a_full_refresh_needs_an_admin(pipeline: Pipeline) -> None:
    operator = pipeline.login("etl_operator")
    with refused("PT403", "full_refresh.not_admin") as refusal:
        pipeline.start(operator, **GRANTED)
    assert operator.info.user in refusal.message
    assert pipeline.start(operator).status == "succeeded"
    assert pipeline.start(pipeline.login("etl_admin"), **GRANTED).status == "succeeded"


def test_set_role_lowers_what_a_session_may_do(pipeline: Pipeline) -> None:
    pipeline.conn.execute("set role etl_operator")
    with refused("PT403", "full_refresh.not_admin"):
        pipeline.start(**GRANTED)
    pipeline.conn.execute("set role etl_admin")
    assert pipeline.start(**GRANTED).status == "succeeded"


def test_all_refusals_are_reported_at_once(pipeline: Pipeline) -> None:
    pipeline.value("select etl.freeze_full_refresh(true, reason => 'month end')")
    pipeline.change("load", allow_full_refresh=False)
    with refused("PT403", "full_refresh.frozen") as refusal:
        pipeline.start(pipeline.login("etl_operator"), mode="full")
    assert refusal.codes == [
        "full_refresh.frozen", "full_refresh.not_allowed", "full_refresh.not_admin",
        "full_refresh.unconfirmed", "full_refresh.no_reason",
    ]  # fmt: skip
    assert all(problem["hint"] for problem in refusal.detail["errors"])


def test_a_freeze_stops_full_refreshes_until_it_is_lifted(pipeline: Pipeline) -> None:
    admin = pipeline.login("etl_admin")
    admin.execute("select etl.freeze_full_refresh(true, reason => 'month end')")
    with refused("PT403", "full_refresh.frozen") as refusal:
        pipeline.start(**GRANTED)
    assert "month end" in refusal.message
    assert str(admin.info.user) in refusal.message
    assert pipeline.start().status == "succeeded"
    admin.execute("select etl.freeze_full_refresh(false, reason => 'books are closed')")
    assert pipeline.start(**GRANTED).status == "succeeded"
    audit = pipeline.rows(
        "select is_frozen, reason, changed_by, changed_at from etl.full_refresh_freezes order by freeze_id"
    )
    assert [(row["is_frozen"], row["reason"], row["changed_by"]) for row in audit] == [
        (True, "month end", admin.info.user),
        (False, "books are closed", admin.info.user),
    ]
    assert isinstance(audit[0]["changed_at"], datetime)


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("reason", [None, " "], ids=["none", "blank"])
def test_a_freeze_needs_a_reason(pipeline: Pipeline, is_frozen: bool, reason: str | None) -> None:
    with refused("PT422", "freeze.no_reason"):
        pipeline.value("select etl.freeze_full_refresh(%s, %s)", is_frozen, reason)
    assert pipeline.value("select count(*) from etl.full_refresh_freezes") == 0


def test_only_an_admin_can_freeze(pipeline: Pipeline) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        pipeline.login("etl_operator").execute("select etl.freeze_full_refresh(true, reason => 'x')")


def test_a_procedure_that_is_always_full_needs_nothing_but_the_absence_of_a_freeze(
    pipeline: Pipeline,
) -> None:
    pipeline.change("load", default_mode="full", allow_full_refresh=False)
    operator = pipeline.login("etl_operator")
    run = pipeline.start(operator)
    assert pipeline.step(run.run_id, "load")["mode"] == "full"
    assert pipeline.run(run.run_id)["mode"] is None
    pipeline.value("select etl.freeze_full_refresh(true, reason => 'month end')")
    with refused("PT403", "full_refresh.frozen"):
        pipeline.start(operator)
    incremental = pipeline.start(operator, mode="incremental")
    assert pipeline.step(incremental.run_id, "load")["mode"] == "incremental"


def test_a_plan_is_refused_like_the_full_refresh_itself(pipeline: Pipeline) -> None:
    with refused("PT403", "full_refresh.unconfirmed"):
        pipeline.plan(mode="full")
    (step,) = pipeline.plan(**GRANTED)
    assert (step["step_mode"], step["window_since"]) == ("full", None)
