"""The parts of a report that are tables and words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from b2s.render import duration, moment, plural
from b2s.report.data import Report
from b2s.report.html import Html, join, tag
from b2s.report.timeline import Bar
from b2s.report.trends import Trend, sparkline
from b2s.runview import bound, failed_causes, last_attempts, next_steps

Row = Mapping[str, Any]

_SLOWEST: Final = 12
_LONG: Final = 30
_BAD: Final = ("failed", "abandoned", "cancelled")


def status(name: str | None) -> Html:
    """A status as a word with a mark of its colour."""
    shown = name or "never ran"
    return tag("span", shown.replace("_", " "), class_=f"status s-{shown.replace(' ', '-')}")


def window(content: Html, name: str, *, is_tall: bool = True) -> Html:
    """Something large that is scrolled in a frame of its own, by keyboard too."""
    kind = "scroll tall" if is_tall else "scroll"
    return tag("div", content, class_=kind, tabindex=0, role="region", aria_label=name)


def table(
    titles: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str, numbers: Iterable[int] = ()
) -> Html:
    """A table that the script makes sortable. A cell may carry what it is sorted by: (shown, value)."""
    right = set(numbers)
    head = [
        tag("th", title, scope="col", class_="number" if index in right else None)
        for index, title in enumerate(titles)
    ]
    body = [
        tag("tr", *(_cell(cell, is_number=index in right) for index, cell in enumerate(row))) for row in rows
    ]
    content = tag(
        "table", tag("caption", caption, class_="unseen"), tag("thead", tag("tr", *head)), tag("tbody", *body)
    )
    return window(content, caption, is_tall=len(body) > _LONG)


def _cell(cell: object, *, is_number: bool) -> Html:
    shown, value = cell if isinstance(cell, tuple) else (cell, None)
    return tag("td", shown, class_="number" if is_number else None, data_value=value)


def tiles(report: Report, trends: Mapping[int, Trend]) -> Html:
    """The most important numbers."""
    counts: dict[str, int] = {}
    for day in report.days:
        counts[day["status"]] = counts.get(day["status"], 0) + day["count"]
    good = counts.get("succeeded", 0) + counts.get("completed_with_warnings", 0)
    late = sum(1 for one in report.procedures if one["is_late"])
    slow = sum(1 for one in trends.values() if one.is_slow)
    rows = sum(int(one["rows_affected"]) for one in report.tallies.values())
    failed = sum(one["failed"] for one in report.tallies.values())
    shown: list[tuple[str, object, bool]] = []
    if report.since is not None:
        shown.append(("runs", f"{report.run_count:,}", False))
        shown.append(("of them good", f"{good:,}", good < report.run_count))
    elif report.run:
        shown.append(("took", duration(report.run["duration_ms"]), False))
    shown += [
        ("steps failed", f"{failed:,}", failed > 0),
        ("rows", f"{rows:,}", False),
        ("slower than usual", slow, slow > 0),
        ("late", late, late > 0),
    ]
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value), class_="tile bad" if is_bad else "tile")
            for name, value, is_bad in shown
        ),
        class_="tiles",
    )


def days(report: Report) -> Html | None:
    """A bar for each day of the period, of what its runs came to."""
    if report.since is None or len({one["day"] for one in report.days}) < 2:
        return None
    by_day: dict[str, list[Row]] = {}
    for one in report.days:
        by_day.setdefault(one["day"], []).append(one)
    most = max(sum(one["count"] for one in found) for found in by_day.values())
    bars = []
    for day, found in by_day.items():
        parts = [
            tag("i", class_=f"s-{one['status']}", style=f"height:{100 * one['count'] / most:.1f}%")
            for one in found
        ]
        told = ", ".join(f"{one['count']:,} {one['status'].replace('_', ' ')}" for one in found)
        bars.append(tag("li", *parts, tag("span", f"{day}: {told}", class_="unseen"), title=f"{day}: {told}"))
    first, last = min(by_day), max(by_day)
    told = tag("p", f"Runs by day, {first} to {last}; at most {most:,} on one day")
    return join((tag("ol", *bars, class_="days", aria_label="Runs by day"), told))


def failures(report: Report) -> Html:
    """What failed, why, what it took along, and what to do."""
    if report.since is None and report.run is not None:
        shown = list(_failures_of(report.run))
    else:
        shown = [_failure_group(one) for one in report.failures]
    return tag("div", *shown) if shown else tag("p", "Nothing failed.", class_="calm")


def _failures_of(run: Row) -> Iterator[Html]:
    steps = last_attempts(run)
    for step in steps:
        if step["status"] not in _BAD or not (step["started_at"] or step["error_message"]):
            continue
        taken = [
            one["procedure"]
            for one in steps
            if one["skip_reason"] == "upstream_failed" and step["procedure"] in failed_causes(one, steps)
        ]
        kind = ", ".join(str(one) for one in (step["error_class"], step["error_code"]) if one)
        yield tag(
            "details",
            tag("summary", status(step["status"]), " ", tag("b", step["procedure"]), " ", tag("code", kind)),
            tag(
                "p", step["error_message"] or "its session is gone; nothing of it was kept", class_="message"
            ),
            _named("Hint", step["error_hint"]),
            _named("Detail", step["error_detail"]),
            *(_place(place) for place in step.get("places") or ()),
            _named("Context", step["error_context"]),
            _named("Attempts", step["attempt"] if step["attempt"] > 1 else None),
            _names("Skipped because of it", taken),
            open=True,
            class_="failure",
        )
    for refresh in run["mv_refreshes"]:
        if refresh["status"] == "failed":
            yield tag(
                "details",
                tag(
                    "summary",
                    status("failed"),
                    " refresh of ",
                    tag("b", refresh["mv_name"]),
                    " ",
                    tag("code", refresh["error_code"]),
                ),
                tag("p", refresh["error_message"], class_="message"),
                _named("Hint", refresh["error_hint"]),
                open=True,
                class_="failure",
            )
    following = next_steps(run)
    if following:
        yield tag("div", tag("h3", "Next"), tag("pre", "\n".join(following)))


def _failure_group(one: Row) -> Html:
    where = (
        f"run {one['last_run']}"
        if one["count"] == 1
        else f"{plural(one['count'], 'time')}, runs {one['first_run']} to {one['last_run']}"
    )
    return tag(
        "details",
        tag(
            "summary",
            status("failed"),
            " ",
            tag("b", one["procedure"]),
            " ",
            tag("code", one["error_code"]),
            f" {where}",
        ),
        tag("p", one["error_message"], class_="message"),
        _named("Hint", one["error_hint"]),
        tag("p", tag("code", f"b2s show {one['last_run']}")),
        open=True,
        class_="failure",
    )


def _named(name: str, text: object) -> Html | None:
    if text is None:
        return None
    return tag("div", tag("h4", name), tag("pre", text))


def _names(name: str, names: Sequence[str]) -> Html | None:
    """A list of names, folded where it is long."""
    if not names:
        return None
    listed = tag("pre", ", ".join(names))
    if len(names) <= _SLOWEST:
        return tag("div", tag("h4", name), listed)
    return tag("details", tag("summary", f"{name}: {plural(len(names), 'procedure')}"), listed)


def _place(place: Row) -> Html:
    lines = (
        tag("mark" if number == str(place["line"]) else "span", f"{number:>5} | {text}\n")
        for number, text in place["source"].items()
    )
    return tag("div", tag("h4", f"{place['routine']} line {place['line']}"), tag("pre", *lines))


def critical(path: Sequence[Bar], length: float) -> Html | None:
    """The chain that determined when the run ended; the longest of its members, when it is long."""
    if not path or length <= 0:
        return None
    shown = sorted(sorted(path, key=lambda bar: bar.seconds)[-_SLOWEST:], key=lambda bar: bar.begin)
    items = [
        tag(
            "li",
            tag("b", bar.name),
            f" {duration(1000 * bar.seconds)} ",
            tag("span", f"{bar.seconds / length:.0%}", class_="share"),
        )
        for bar in shown
    ]
    left = len(path) - len(shown)
    more = tag("p", f"and {plural(left, 'shorter step')} between them") if left else None
    busy = sum(bar.seconds for bar in path)
    told = f"{plural(len(path), 'step')}, {duration(1000 * busy)} of {duration(1000 * length)}"
    return tag("div", tag("h3", f"Critical path: {told}"), tag("ol", *items, class_="critical-path"), more)


def procedures(report: Report, trends: Mapping[int, Trend]) -> Html:
    """One row for each procedure: outcome, duration against the usual, rows, curves."""
    rows = []
    for one in report.procedures:
        trend = trends.get(one["procedure_id"], Trend())
        tally = report.tallies.get(one["procedure_id"], {})
        ratio = trend.ratio
        rows.append((
            tag("span", one["procedure"], id=anchor(one["procedure_id"]), title=one["description"]),
            one["type"],
            (status(one["outcome"] or ("not in it" if report.since is None else None)), one["outcome"]),
            (f"{tally['succeeded']:,}" if tally else None, tally.get("succeeded")),
            (tag("b", f"{tally['failed']:,}") if tally.get("failed") else None, tally.get("failed")),
            (tally.get("retried") or None, tally.get("retried")),
            (duration(trend.last_ms), trend.last_ms),
            (duration(trend.usual_ms), trend.usual_ms),
            (_ratio(trend), ratio),
            sparkline(trend.durations, "Durations", is_unusual=trend.is_slow),
            (_rows(trend), trend.last_rows),
            sparkline([float(count) for count in trend.rows], "Rows", is_unusual=trend.is_empty),
        ))  # fmt: skip
    titles = ("procedure", "type", "outcome", "succeeded", "failed", "retries", "last success took",
              "usually", "against usual", "durations", "rows", "rows over time")  # fmt: skip
    return table(titles, rows, caption="Procedures", numbers=(3, 4, 5, 6, 7, 8, 10))


def anchor(procedure_id: int) -> str:
    """Where the row of a procedure is."""
    return f"p-{procedure_id}"


def _ratio(trend: Trend) -> Html | None:
    if trend.ratio is None:
        return None
    shown = f"{trend.ratio:.1f} x"
    return tag("b", f"{shown}, slower", class_="unusual") if trend.is_slow else tag("span", shown)


def _rows(trend: Trend) -> object:
    if trend.last_rows is None:
        return None
    return tag("b", "0, none as never before", class_="unusual") if trend.is_empty else f"{trend.last_rows:,}"


def freshness(report: Report) -> Html:
    """Up to when each procedure is complete, and whether that is good enough."""
    rows = []
    for one in report.procedures:
        lag = _age(report.at, one["complete_at"])
        verdict = status("late") if one["is_late"] else status("fresh") if one["freshness_ms"] else None
        rows.append((
            one["procedure"],
            (verdict, 0 if one["is_late"] else 1 if one["freshness_ms"] else 2),
            (duration(one["freshness_ms"]), one["freshness_ms"]),
            (duration(lag), lag),
            moment(one["complete_at"]),
            moment(one["last_success_at"]),
            one["strategy"],
            bound(one["watermark"]),
            one["held_back_by"],
        ))  # fmt: skip
    titles = ("procedure", "verdict", "objective", "behind", "complete up to", "last success", "strategy",
              "watermark", "held back by")  # fmt: skip
    return table(titles, rows, caption="Freshness", numbers=(2, 3))


def _age(now: str, then: str | None) -> float | None:
    if then is None:
        return None
    return max(0.0, (datetime.fromisoformat(now) - datetime.fromisoformat(then)).total_seconds() * 1000)


def refreshes(report: Report) -> Html | None:
    """What became of the materialized views."""
    if not report.refreshes:
        return None
    rows = [
        (
            one["mv_name"],
            status(one["outcome"]),
            one["succeeded"],
            one["failed"] or None,
            one["other"] or None,
            (duration(one["median_ms"]), one["median_ms"]),
            one["remark"],
        )
        for one in report.refreshes
    ]
    titles = ("materialized view", "outcome", "refreshed", "failed", "skipped", "usually takes", "remark")
    return table(titles, rows, caption="Materialized views", numbers=(2, 3, 4, 5))


def runs(report: Report) -> Html | None:
    """The newest runs of the period."""
    if report.since is None:
        return None
    rows = [
        (
            one["run_id"],
            status("abandoned" if one["is_dead"] else one["status"]),
            one["mode"],
            moment(one["started_at"]),
            (duration(one["duration_ms"]), one["duration_ms"]),
            one["step_count"],
            one["requested_by"],
            one["reason"],
            one["error_message"],
        )
        for one in report.runs
    ]
    titles = ("run", "status", "mode", "started", "took", "steps", "requested by", "reason", "error")
    shown = table(titles, rows, caption="Runs", numbers=(0, 4, 5))
    left = report.run_count - len(rows)
    return join(
        (
            shown,
            tag("p", f"The newest {len(rows)}; {left:,} older ones are not listed.") if left > 0 else None,
        )
    )


def lines(report: Report) -> Html | None:
    """Warnings and errors that routines logged."""
    if not report.lines:
        return None
    rows = [
        (moment(one["logged_at"]), one["run_id"], one["procedure"], status(one["level"]), one["message"],
         "its step was rolled back" if one["is_rolled_back"] else None)
        for one in report.lines
    ]  # fmt: skip
    titles = ("at", "run", "procedure", "level", "message", "remark")
    return table(titles, rows, caption="What routines logged", numbers=(1,))
