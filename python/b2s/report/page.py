"""The page as a whole: skeleton, styles and script from files, sections from data."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template
from typing import Any

from b2s import __version__
from b2s.render import duration, moment
from b2s.report import graph, sections, timeline
from b2s.report.data import Report
from b2s.report.html import Html, join, tag
from b2s.report.trends import Trend, trend_of


def render(report: Report) -> str:
    """One HTML document. Its policy allows the styles and the one script that are in it, and nothing else."""
    script = _file("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = f"{report.pipeline}: {_subject(report)}"
    return Template(_file("page.html")).substitute(
        title=join([title]),
        digest=digest,
        style=_file("style.css"),
        script=script,
        header=_header(report),
        main=_main(report),
        footer=_footer(report),
    )


def _file(name: str) -> str:
    return (files("b2s.report") / name).read_text(encoding="utf-8")


def _subject(report: Report) -> str:
    if report.since is not None:
        return f"since {moment(report.since)}"
    return f"run {report.run['run_id']}" if report.run else "no run"


def _header(report: Report) -> Html:
    run = report.run
    told: list[object] = [tag("h1", report.pipeline, " ", tag("small", _subject(report)))]
    if report.description:
        told.append(tag("p", report.description))
    if run is not None:
        what = "its newest run" if report.since else "run"
        began = f"{what} {run['run_id']} began {moment(run['started_at'])}"
        took = f", took {duration(run['duration_ms'])}" if run["ended_at"] else ", goes on"
        verdict = sections.status("abandoned" if run["is_dead"] else run["status"])
        told.append(tag("p", verdict, f" {began}{took}, requested by {run['requested_by']}", _reason(run)))
    return join(told)


def _reason(run: Any) -> str:
    return f": {run['reason']}" if run["reason"] else ""


def _main(report: Report) -> Html:
    trends = {key: trend_of(outcomes) for key, outcomes in report.trends.items()}
    parts: list[tuple[str, str, Html | None]] = [
        ("failures", "What failed", sections.failures(report)),
        ("graph", "Dependencies", _graph(report)),
        ("timeline", "Timeline", _timeline(report)),
        ("procedures", "Procedures", sections.procedures(report, trends)),
        ("freshness", "Freshness and watermarks", sections.freshness(report)),
        ("views", "Materialized views", sections.refreshes(report)),
        ("logs", "What routines logged", sections.lines(report)),
        ("runs", "Runs", sections.runs(report)),
    ]
    shown = [(anchor, heading, content) for anchor, heading, content in parts if content is not None]
    links = [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in shown]
    return join([
        sections.tiles(report, _recent(report, trends)),
        sections.days(report),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        *(
            tag("section", tag("h2", heading), content, id=anchor)
            for anchor, heading, content in shown
        ),
    ])  # fmt: skip


def _recent(report: Report, trends: dict[int, Trend]) -> dict[int, Trend]:
    """Of those that took part: the last time of one that did not is another run's affair."""
    return {key: one for key, one in trends.items() if key in report.tallies}


def _graph(report: Report) -> Html | None:
    if not report.procedures:
        return None
    nodes = [
        graph.Node(
            one["procedure"],
            one["outcome"] or "none",
            tuple(one["needs"]),
            sections.anchor(one["procedure_id"]),
        )
        for one in report.procedures
    ]
    legend = [
        tag(
            "li", tag("a", sections.status(None if kind == "none" else kind), f" {count:,}", href=f"#{first}")
        )
        for kind, count, first in graph.outcomes(nodes)
    ]
    return join([
        tag("ul", *legend, class_="legend"),
        sections.window(graph.draw(nodes), "Dependencies"),
    ])  # fmt: skip


def _timeline(report: Report) -> Html | None:
    run = report.run
    if run is None or not run["started_at"]:
        return None
    bars = timeline.bars_of(run, report.at)
    if not bars:
        return None
    path = timeline.critical_path(bars)
    length = max(bar.end for bar in bars)
    which = tag("p", f"Run {run['run_id']}, the newest of the period.") if report.since else None
    return join([
        which,
        sections.critical(path, length),
        sections.window(timeline.draw(bars, path), "Timeline"),
    ])  # fmt: skip


def _footer(report: Report) -> Html:
    return tag("p", f"database {report.database}, {moment(report.at)}, b2s {__version__}")
