"""How a procedure has been doing: its usual duration and rows, and whether the last time was unusual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from b2s.report.html import Html, tag

_WIDTH: Final = 120
_HEIGHT: Final = 24
_FEWEST: Final = 5
_FACTOR: Final = 1.5
_SPREADS: Final = 4.0
_NOTICEABLE_MS: Final = 100.0


@dataclass(frozen=True, slots=True)
class Trend:
    """The outcomes of one procedure, oldest first; durations in milliseconds."""

    durations: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()
    last_ms: float | None = None
    last_rows: int | None = None
    usual_ms: float | None = None
    usual_rows: float | None = None
    is_slow: bool = False
    is_empty: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times as long as usual the last success took."""
        if not self.usual_ms or self.last_ms is None:
            return None
        return self.last_ms / self.usual_ms


def trend_of(outcomes: Sequence[Mapping[str, Any]]) -> Trend:
    """The last success against the median of those before it, in the same mode.

    Slow is what takes half as long again as usual, is well outside of what it varies by, and can be noticed.
    """
    mode = outcomes[-1]["mode"] if outcomes else None
    successes = [one for one in outcomes if one["status"] == "succeeded" and one["mode"] == mode]
    if not successes:
        return Trend()
    durations = tuple(float(one["duration_ms"] or 0) for one in successes)
    rows = tuple(int(one["rows_affected"] or 0) for one in successes)
    before, rows_before = durations[:-1], rows[:-1]
    if len(before) < _FEWEST:
        return Trend(durations, rows, durations[-1], rows[-1])
    usual, usual_rows = median(before), median(rows_before)
    spread = median(abs(one - usual) for one in before)
    limit = max(usual * _FACTOR, usual + _SPREADS * spread, usual + _NOTICEABLE_MS)
    return Trend(
        durations, rows, durations[-1], rows[-1], usual, usual_rows,
        is_slow=durations[-1] > limit, is_empty=rows[-1] == 0 and min(rows_before) > 0,
    )  # fmt: skip


def sparkline(values: Sequence[float], what: str, *, is_unusual: bool) -> Html | None:
    """A small curve of values, the last one marked; nothing for fewer than two."""
    if len(values) < 2:
        return None
    top = max(values) or 1
    step = (_WIDTH - 6) / (len(values) - 1)
    points = [(round(3 + index * step, 1), round(_HEIGHT - 3 - (_HEIGHT - 6) * value / top, 1))
              for index, value in enumerate(values)]  # fmt: skip
    usual = round(_HEIGHT - 3 - (_HEIGHT - 6) * median(values) / top, 1)
    return tag(
        "svg",
        tag("title", f"{what} of the last {len(values)} successes; the line is the median"),
        tag("line", x1=0, y1=usual, x2=_WIDTH, y2=usual, class_="median"),
        tag("polyline", points=" ".join(f"{x},{y}" for x, y in points), class_="curve"),
        tag(
            "circle",
            cx=points[-1][0],
            cy=points[-1][1],
            r=2.5,
            class_="last unusual" if is_unusual else "last",
        ),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        width=_WIDTH,
        height=_HEIGHT,
        role="img",
        class_="spark",
    )
