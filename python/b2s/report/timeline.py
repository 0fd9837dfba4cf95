"""A run on a time axis, and the chain of steps that determined when it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from b2s.render import duration
from b2s.report.html import Html, tag

_LABELS: Final = 270
_PLOT: Final = 860
_ROW: Final = 18
_BAR: Final = 12
_AXIS: Final = 22
_LONGEST_NAME: Final = 38
_CLOSE: Final = 0.05
_TICKS: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800,
    3600, 7200, 14400, 28800, 86400,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bar:
    """One attempt of a step, or a refresh; times in seconds since the run began."""

    name: str
    index: int | None
    outcome: str
    begin: float
    end: float
    attempt: int
    needs: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def bars_of(run: Mapping[str, Any], now: str) -> list[Bar]:
    """Everything that was started in a run, in order of time; what goes on ends now."""
    zero = _moment(run["started_at"])
    found = []
    for step in run["steps"] or []:
        if step["started_at"]:
            needs = tuple(one["procedure"] for one in step["dependencies"] if one["in_run"])
            found.append(_bar(step["procedure"], step["order_index"], step, zero, now, needs))
    found += [
        _bar(refresh["mv_name"], None, refresh, zero, now, ())
        for refresh in run["mv_refreshes"]
        if refresh["started_at"]
    ]
    return sorted(found, key=lambda bar: (bar.begin, bar.index or 0))


def _bar(
    name: str, index: int | None, one: Mapping[str, Any], zero: datetime, now: str, needs: tuple[str, ...]
) -> Bar:
    begin = (_moment(one["started_at"]) - zero).total_seconds()
    end = (_moment(one["ended_at"] or now) - zero).total_seconds()
    return Bar(name, index, one["status"], begin, max(begin, end), one.get("attempt", 1), needs)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def critical_path(bars: Sequence[Bar]) -> list[Bar]:
    """From the one that ended last back to the first: each began when the one before it had ended.

    Of several that ended at about that moment, the one that was needed counts.
    """
    if not bars:
        return []
    path = [max(bars, key=lambda bar: bar.end)]
    while True:
        current = path[-1]
        earlier = [bar for bar in bars if bar.end <= current.begin and bar is not current]
        if not earlier:
            return path[::-1]
        latest = max(bar.end for bar in earlier)
        slack = max(_CLOSE * current.begin, 0.002)
        close = [bar for bar in earlier if bar.end >= latest - slack]
        needed = [bar for bar in close if bar.name in current.needs or bar.name == current.name]
        path.append(max(needed or close, key=lambda bar: bar.end))


def draw(bars: Sequence[Bar], path: Sequence[Bar]) -> Html:
    """The bars as SVG, a row for each step; those on the critical path are outlined."""
    rows = {name: row for row, name in enumerate(dict.fromkeys((bar.name, bar.index) for bar in bars))}
    length = max(max((bar.end for bar in bars), default=0), 0.001)
    scale = _PLOT / length
    height = _AXIS + len(rows) * _ROW + 6
    critical = {id(bar) for bar in path}
    return tag(
        "svg",
        tag("title", "When each step ran; the critical path is outlined"),
        *_axis(length, scale, height),
        *(_label(name, row) for (name, _), row in rows.items()),
        *(_draw_bar(bar, rows[bar.name, bar.index], scale, id(bar) in critical) for bar in bars),
        viewBox=f"0 0 {_LABELS + _PLOT + 70} {height}",
        width=_LABELS + _PLOT + 70,
        height=height,
        role="group",
        class_="gantt",
    )


def _axis(length: float, scale: float, height: int) -> list[Html]:
    step = next((one for one in _TICKS if length / one <= 9), _TICKS[-1])
    parts = []
    for number in range(int(length / step) + 1):
        x = round(_LABELS + number * step * scale, 1)
        parts.append(tag("line", x1=x, y1=_AXIS - 4, x2=x, y2=height, class_="tick"))
        parts.append(tag("text", duration(1000 * number * step), x=x + 3, y=12, class_="axis"))
    return parts


def _label(name: str, row: int) -> Html:
    shown = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    y = _AXIS + row * _ROW + 13
    return tag("text", shown, tag("title", name), x=_LABELS - 8, y=y, text_anchor="end", class_="label")


def _draw_bar(bar: Bar, row: int, scale: float, is_critical: bool) -> Html:
    width = max(1.5, round(bar.seconds * scale, 1))
    x, y = round(_LABELS + bar.begin * scale, 1), _AXIS + row * _ROW + 3
    took = duration(1000 * bar.seconds)
    again = f", attempt {bar.attempt}" if bar.attempt > 1 else ""
    path = ", on the critical path" if is_critical else ""
    return tag(
        "g",
        tag("title", f"{bar.name}: {bar.outcome.replace('_', ' ')} in {took}{again}{path}"),
        tag("rect", x=x, y=y, width=width, height=_BAR, rx=2, class_="mark"),
        tag("text", took, x=x + width + 4, y=y + 10, class_="took") if bar.outcome != "retrying" else None,
        class_=f"bar s-{bar.outcome}{' critical' if is_critical else ''}",
    )
