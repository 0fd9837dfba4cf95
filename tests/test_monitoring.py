"""docker/monitoring: every expression parses, names what the exporter has, and can be true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from b2s.metricfamilies import Snapshot, families
from tests.promql import TARGET, Labels, Unsound, labels_of, selectors

PROJECT: Final = Path(__file__).resolve().parents[1]
MONITORING: Final = PROJECT / "docker" / "monitoring"
RUNBOOK: Final = PROJECT / "docs" / "runbook.md"
AT: Final = datetime(2026, 11, 29, tzinfo=UTC)
SEVERITIES: Final = {"critical", "warning", "info"}
ASKED_FOR: Final = {
    "TransformationFailed",
    "TransformationStale",
    "TransformationStepStuck",
    "TransformationRunStuck",
    "TransformationHorizonHeldBack",
    "TransformationClockDead",
    "TransformationFullRefresh",
    "TransformationErrorRateHigh",
}


def document(name: str) -> Any:
    text = (MONITORING / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else yaml.safe_load(text)


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in document(name)["groups"] for rule in group["rules"]]


def exported() -> dict[str, Labels]:
    """Every series of the exporter with its labels: a snapshot in which everything has occurred."""
    counted = {
        "observed_count": 1,
        "seconds_sum": 1.0,
        "rows_sum": 1,
        "buckets": [1] + [0] * 11,
        "created_at": AT,
        "last_observed_at": AT,
        "last_run_id": 1,
        "last_seconds": 1.0,
    }
    outcomes = [
        {"family": family, "subject": "x", "mode": "incremental", "status": status, **counted}
        for family in ("step", "refresh", "run")
        for status in ("succeeded", "failed")
    ]
    server = {
        "version": "1",
        "migrations": [],
        "is_full_refresh_frozen": False,
        "horizon": AT,
        "clock_at": AT,
        "schedule_count": 1,
    }
    procedure = {
        "pipeline": "p",
        "procedure": "x",
        "has_watermark": True,
        "last_success_at": AT,
        "complete_at": AT,
        "freshness_seconds": 1,
        "running_since": AT,
    }
    pipeline = {
        "pipeline": "p",
        "active_runs": 1,
        "active_backfills": 1,
        "active_since": AT,
        "dead_runs": 1,
        "queued_runs": 1,
        "queued_since": AT,
        "waiting_sessions": 1,
        "lock_wait_seconds": 1,
        "config_version": 1,
        "config_applied_at": AT,
        "is_drifted": False,
    }
    snapshot = Snapshot(
        outcomes=outcomes,
        procedures=[procedure],
        pipelines=[pipeline],
        running=[procedure],
        server=[server],
        drift=[pipeline],
        bounds=[float(n) for n in range(11)],
        errors_total={"timeout": 1},
    )
    return {
        sample.name: frozenset(sample.labels) | TARGET
        for family in families(snapshot, is_openmetrics=False)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def known() -> dict[str, Labels]:
    """What is exported and what is recorded from it, in the order of the rules."""
    found = exported()
    for rule in rules("rules.yaml"):
        labels = labels_of(rule["expr"], found)
        assert labels is not None
        found[rule["record"]] = labels
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in document("dashboards/b2s.json")["panels"] if panel["type"] != "row"]


def plain(query: str) -> str:
    """An expression of a dashboard with its variables filled in."""
    return query.replace("$__rate_interval", "5m").replace("$database", ".*").replace("$procedure", ".*")


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules("rules.yaml"):
        yield rule["record"], rule["expr"]
    for rule in rules("alerts.yaml"):
        yield rule["alert"], rule["expr"]
    dashboard = document("dashboards/b2s.json")
    for panel in panels():
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", plain(target["expr"])
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], plain(annotation["expr"])


EXPRESSIONS: Final = dict(expressions())


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_names_what_there_is_and_its_sides_can_match(
    name: str, known: dict[str, Labels]
) -> None:
    labels_of(EXPRESSIONS[name], known)


def test_every_metric_of_the_exporter_is_looked_at_by_somebody(known: dict[str, Labels]) -> None:
    used = {one.name for query in EXPRESSIONS.values() for one in selectors(query)}
    used = {re.sub("_(bucket|count|sum)$", "", name) for name in used}
    served = {re.sub("_(bucket|count|sum)$", "", name) for name in exported()}
    assert served - used == {
        "b2s_exporter_info",
        "b2s_schema_info",
        "transformation_config_applied_timestamp_seconds",
    }
    recorded = {rule["record"] for rule in rules("rules.yaml")}
    assert recorded <= used


@pytest.mark.parametrize(
    "query",
    [
        "transformation_no_such_metric",
        "transformation_active_runs{pipeline='x'}",
        "sum(transformation_active_runs)",
        "transformation_queued_runs > transformation_freshness_objective_seconds",
        "transformation_queued_runs unless b2s_up",
        "max without (pipeline) (transformation_active_runs)",
        "histogram_quantile(0.5, rate(transformation_duration_seconds_count[5m]))",
    ],
)
def test_what_could_never_be_true_is_found_out(query: str, known: dict[str, Labels]) -> None:
    with pytest.raises(Unsound):
        labels_of(query, known)


@pytest.mark.parametrize("alert", rules("alerts.yaml"), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any], known: dict[str, Labels]) -> None:
    assert re.fullmatch("(B2s|Transformation|MaterializedView)([A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"]["severity"] in SEVERITIES
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert notes["summary"].endswith(".")
    anchor = re.fullmatch(r"docs/runbook\.md#([a-z0-9-]+)", notes["runbook_url"])
    assert anchor is not None
    if RUNBOOK.exists():
        headings = re.findall("^#+ (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor.group(1) in anchors
    labels = labels_of(alert["expr"], known) or frozenset()
    used = set(re.findall(r"\$labels\.(\w+)", notes["summary"] + notes["description"]))
    assert used <= labels, "a label that the series has not would be shown as nothing"


def test_everything_that_was_asked_for_raises_an_alert() -> None:
    names = [rule["alert"] for rule in rules("alerts.yaml")]
    assert len(names) == len(set(names))
    assert set(names) >= ASKED_FOR


def test_the_dashboard_can_be_pointed_at_any_data_source_and_no_panel_hides_another() -> None:
    dashboard = document("dashboards/b2s.json")
    assert dashboard["uid"] == "b2s"
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == [
        "datasource",
        "database",
        "procedure",
    ]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    for panel in panels():
        assert panel["description"].endswith("."), panel["title"]
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_what_is_provisioned_is_where_it_is_looked_for() -> None:
    (source,) = document("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = document("grafana/provisioning/dashboards/b2s.yaml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    prometheus = document("prometheus.yml")
    assert [Path(name).name for name in prometheus["rule_files"]] == ["rules.yaml", "alerts.yaml"]
    jobs = {job["job_name"]: job["static_configs"][0] for job in prometheus["scrape_configs"]}
    assert jobs["b2s"]["labels"] == {"database": "shop"}
