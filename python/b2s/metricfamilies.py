"""What the database counts, as Prometheus wants it: one function from rows to families of samples.

Times are exported as the moment at which something happened, never as an age: `time() - x` is right
whenever it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    Sample,
)
from prometheus_client.utils import floatToGoString

from b2s import __version__

Row = Mapping[str, Any]
Rows = Sequence[Row]

_OF_PIPELINES: Final = (
    ("transformation_active_since_timestamp_seconds", "active_since",
     "When the oldest run or backfill that goes on began."),
    ("transformation_dead_runs", "dead_runs", "Runs whose sessions are gone, not yet recorded as abandoned."),
    ("transformation_queued_runs", "queued_runs", "Runs that wait for a worker."),
    ("transformation_queued_since_timestamp_seconds", "queued_since", "Since when the oldest of them waits."),
    ("transformation_lock_waiting_sessions", "waiting_sessions",
     "Sessions that execute steps and wait for a lock."),
    ("transformation_lock_wait_seconds", "lock_wait_seconds", "For how long the longest of them has waited."),
    ("transformation_config_version", "config_version", "Version of the configuration that is in force."),
    ("transformation_config_applied_timestamp_seconds", "config_applied_at", "When it was applied."),
)  # fmt: skip
NO_DURATION: Final = ("skipped", "retrying")
"""Statuses that are counted and not timed."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything of one scrape, read at one moment. `error`: why nothing could be read, as one word."""

    seconds: float = 0.0
    error: str | None = None
    outcomes: Rows = ()
    procedures: Rows = ()
    pipelines: Rows = ()
    running: Rows = ()
    server: Rows = ()
    drift: Rows = ()
    bounds: Sequence[float] = ()
    is_current: bool = False
    errors_total: Mapping[str, int] = field(default_factory=dict)


def families(snapshot: Snapshot, *, is_openmetrics: bool) -> Iterator[Metric]:
    """Every family of a scrape. Exemplars and creation times exist in OpenMetrics only."""
    yield from _self(snapshot)
    if snapshot.error is not None:
        return
    form = _Form(snapshot.bounds, is_openmetrics)
    outcomes = sorted(snapshot.outcomes, key=lambda row: (row["subject"], row["mode"], row["status"]))
    steps, refreshes, runs = (
        [row for row in outcomes if row["family"] == family] for family in ("step", "refresh", "run")
    )
    yield form.histogram(
        "transformation_duration_seconds",
        "How long steps took that ended with a status; attempts that were tried again are left out.",
        {"procedure": "subject", "mode": "mode", "status": "status"},
        steps,
    )
    yield form.counter(
        "transformation_rows_affected",
        "Rows of committed steps.",
        {"procedure": "subject", "mode": "mode"},
        [{**row, "value": row["rows_sum"]} for row in steps if row["status"] == "succeeded"],
    )
    for name, status, help_text in (
        ("transformation_failures", "failed", "Steps that failed, after their last attempt."),
        ("transformation_retries", "retrying", "Attempts that failed and were tried again."),
        ("transformation_skipped", "skipped", "Steps that were not started."),
    ):
        yield form.counter(name, help_text, {"procedure": "subject"}, _by_subject(steps, status))
    yield form.histogram(
        "mv_refresh_duration_seconds",
        "How long refreshes of materialized views took that ended with a status.",
        {"mv_name": "subject", "status": "status"},
        refreshes,
    )
    yield form.counter(
        "transformation_runs",
        "Runs and backfills (kind) that ended with a status.",
        {"pipeline": "subject", "kind": "mode", "status": "status"},
        [{**row, "value": row["observed_count"]} for row in runs],
    )
    yield form.histogram(
        "transformation_run_duration_seconds",
        "How long runs and backfills (kind) took that ended with a status.",
        {"pipeline": "subject", "kind": "mode", "status": "status"},
        runs,
    )
    yield from _procedures(snapshot)
    yield from _pipelines(snapshot)
    yield from _server(snapshot)


def _self(snapshot: Snapshot) -> Iterator[Metric]:
    yield _gauge("b2s_up", "Whether the database could be read by this scrape.", snapshot.error is None)
    yield _gauge("b2s_scrape_duration_seconds", "How long reading the database took.", snapshot.seconds)
    errors = CounterMetricFamily(
        "b2s_scrape_errors",
        "Scrapes by this exporter that could not read the database.",
        labels=["reason"],
    )
    for reason, count in sorted(snapshot.errors_total.items()):
        errors.add_metric([reason], count)
    yield errors
    yield InfoMetricFamily("b2s_exporter", "This exporter.", {"version": __version__})


def _procedures(snapshot: Snapshot) -> Iterator[Metric]:
    labels = ("pipeline", "procedure")
    rows = snapshot.procedures
    yield _gauges(
        "transformation_last_success_timestamp_seconds",
        "When a procedure last succeeded in a run, or found nothing new to read.",
        labels,
        rows,
        "last_success_at",
    )
    yield _gauges(
        "transformation_watermark_timestamp_seconds",
        "Up to when all that was committed has been read.",
        labels,
        [row for row in rows if row["has_watermark"]],
        "complete_at",
    )
    yield _gauges(
        "transformation_freshness_objective_seconds",
        "For how long at most what was committed may be missing in the target.",
        labels,
        rows,
        "freshness_seconds",
    )
    yield _gauges(
        "transformation_running_since_timestamp_seconds",
        "When the step that is executed now began.",
        labels,
        snapshot.running,
        "running_since",
    )


def _pipelines(snapshot: Snapshot) -> Iterator[Metric]:
    rows = snapshot.pipelines
    for name, column, help_text in (
        ("transformation_active_runs", "active_runs", "Runs that go on."),
        ("transformation_active_backfills", "active_backfills", "Backfills that go on."),
    ):
        yield _gauge(name, help_text, sum(row[column] for row in rows))
    for name, column, help_text in _OF_PIPELINES:
        yield _gauges(name, help_text, ("pipeline",), rows, column)
    yield _gauges(
        "transformation_config_drift",
        "Whether the catalog was changed by other means since; looked at every five minutes.",
        ("pipeline",),
        snapshot.drift,
        "is_drifted",
    )


def _server(snapshot: Snapshot) -> Iterator[Metric]:
    (server,) = snapshot.server
    yield _gauges(
        "transformation_horizon_timestamp_seconds",
        "Nothing can still be committed in this database with a time before this.",
        (),
        snapshot.server,
        "horizon",
    )
    yield _gauges(
        "transformation_clock_timestamp_seconds",
        "When a clock last asked what is due.",
        (),
        snapshot.server,
        "clock_at",
    )
    yield _gauge(
        "transformation_schedules", "Schedules that a clock is to start runs by.", server["schedule_count"]
    )
    yield _gauge(
        "transformation_full_refresh_frozen",
        "Whether full refreshes are frozen.",
        server["is_full_refresh_frozen"],
    )
    yield InfoMetricFamily(
        "b2s_schema", "The release of b2s in the database.", {"version": server["version"]}
    )
    yield _gauge("b2s_schema_current", "Whether it is the release of this exporter.", snapshot.is_current)


def _by_subject(steps: Rows, status: str) -> Rows:
    """Each procedure with how often it ended so, in all modes; zero when it never did."""
    counts: dict[str, dict[str, Any]] = {}
    for row in steps:
        total = counts.setdefault(row["subject"], {"subject": row["subject"], "value": 0})
        if row["status"] == status:
            total["value"] += row["observed_count"]
            if (row["last_run_id"] or 0) > total.get("last_run_id", 0):
                total |= {name: row[name] for name in ("last_run_id", "last_observed_at")}
    return list(counts.values())


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, float(value))


def _gauges(name: str, help_text: str, labels: Sequence[str], rows: Rows, column: str) -> Metric:
    """A gauge with a sample for each row that has a value."""
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for row in rows:
        if row[column] is not None:
            family.add_metric([row[label] for label in labels], _number(row[column]))
    return family


def _number(value: Any) -> float:
    return value.timestamp() if isinstance(value, datetime) else float(value)


@dataclass(frozen=True, slots=True)
class _Form:
    """Counters and histograms in the negotiated form."""

    bounds: Sequence[float]
    is_openmetrics: bool

    def counter(self, name: str, help_text: str, labels: Mapping[str, str], rows: Rows) -> Metric:
        """A counter: labels from columns, the column `value`, and the run that was counted last."""
        family = CounterMetricFamily(name, help_text, labels=list(labels))
        for row in rows:
            family.add_metric(
                [row[column] for column in labels.values()],
                row["value"],
                created=self._created(row),
                exemplar=self._exemplar(row, 1.0) if row["value"] else None,
            )
        return family

    def histogram(self, name: str, help_text: str, labels: Mapping[str, str], rows: Rows) -> Metric:
        """A histogram: labels from columns, bounds and buckets as they are stored."""
        family = HistogramMetricFamily(name, help_text, labels=list(labels), unit="seconds")
        bounds = [*map(floatToGoString, self.bounds), "+Inf"]
        for row in rows:
            if row["status"] in NO_DURATION:
                continue
            values = [row[column] for column in labels.values()]
            newest = self._exemplar(row, row["last_seconds"])
            holder = None if newest is None else sum(bound < newest.value for bound in self.bounds)
            family.add_metric(
                values,
                [
                    (bound, count, newest) if index == holder and newest else (bound, count)
                    for index, (bound, count) in enumerate(
                        zip(bounds, accumulate(row["buckets"]), strict=True)
                    )
                ],
                row["seconds_sum"],
            )
            created = self._created(row)
            if created is not None:
                family.samples.append(
                    Sample(f"{name}_created", dict(zip(labels, values, strict=True)), created)
                )
        return family

    def _created(self, row: Row) -> float | None:
        created_at: datetime | None = row.get("created_at") if self.is_openmetrics else None
        return None if created_at is None else created_at.timestamp()

    def _exemplar(self, row: Row, value: float | None) -> Exemplar | None:
        """The run to look at: the newest, with its slowest observation."""
        if not self.is_openmetrics or value is None or row.get("last_run_id") is None:
            return None
        return Exemplar({"run_id": str(row["last_run_id"])}, value, row["last_observed_at"].timestamp())
