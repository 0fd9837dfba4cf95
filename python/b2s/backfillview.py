"""A backfill as people read it: a line while it goes, then its procedures and the chunks that failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from b2s.db import Connection
from b2s.output import documents
from b2s.progress import Event, LiveDisplay, PlainDisplay
from b2s.render import Column, Style, duration, moment, plural, table
from b2s.runview import Document, failure_lines, last_attempts, window

_TOLD_EVERY: Final = 10.0
_MOST_FAILURES: Final = 5
_MOST_CHUNKS: Final = 20
_FRAMES: Final = "|/-\\"
_PROCEDURES: Final = """
select s.procedure, count(distinct s.order_index) as chunks,
       count(*) filter (where s.status = 'succeeded') as done,
       count(*) filter (where s.status = 'failed') as failed,
       sum(s.rows_affected) as rows, sum(s.duration_ms) filter (where s.started_at is not null) as took
  from etl.step_history s where s.run_id = %(run_id)s
 group by s.procedure order by min(s.order_index)"""


@dataclass(slots=True)
class Tally:
    """What the events of a backfill add up to."""

    total: int | None = None
    done: int = 0
    failed: int = 0
    rows: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, event: Event) -> None:
        self.done += event["event"] == "step_succeeded"
        self.failed += event["event"] == "step_failed"
        self.rows += event.get("rows_affected") or 0

    def text(self, now: float) -> str:
        """So far, how fast, and how long it will take at this pace."""
        of_all = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of_all} chunks", f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}"]
        elapsed = now - self.began
        if self.rows and elapsed > 0:
            parts.append(f"{self.rows / elapsed:,.0f} rows/s")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        ended = self.done + self.failed
        if self.total is not None and 0 < ended < self.total:
            parts.append(f"about {duration(1000 * elapsed * (self.total - ended) / ended)} left")
        return ", ".join(parts)


class PlainBackfillDisplay(PlainDisplay):
    """A line now and then, and one for each chunk that did not simply succeed."""

    def __init__(self, stream: TextIO, style: Style, total_of: Callable[[int], int | None]) -> None:
        super().__init__(stream, style)
        self._tally = Tally()
        self._total_of = total_of
        self._reported_at = self._tally.began

    def event(self, event: Event) -> None:
        if self._tally.total is None:
            self._tally.total = self._total_of(event["run_id"])
        self._tally.add(event)
        super().event(event)
        now = time.monotonic()
        if now - self._reported_at >= _TOLD_EVERY:
            self._reported_at = now
            self._print(self._tally.text(now))

    def _is_worth_a_line(self, event: Event) -> bool:
        return event["event"] != "step_succeeded" or bool(event.get("warning"))


class LiveBackfillDisplay(LiveDisplay):
    """One line that says how far it is, how fast, and how long it will take."""

    def __init__(self, stream: TextIO, style: Style, total_of: Callable[[int], int | None]) -> None:
        super().__init__(stream, style)
        self._tally = Tally()
        self._total_of = total_of

    def event(self, event: Event) -> None:
        if self._tally.total is None:
            self._tally.total = self._total_of(event["run_id"])
        self._tally.add(event)
        super().event(event)

    def _draw(self) -> None:
        now = time.monotonic()
        at = f": {self._current(now)}" if self._running else ""
        text = f"{_FRAMES[self._frame % len(_FRAMES)]} {self._tally.text(now)}{at}"
        self._write(f"\r\x1b[2K{self._style.paint(text[: (self._style.width or 80) - 1], 'cyan')}")


def procedures_table(connection: Connection, run_id: int, style: Style) -> list[str]:
    """What was done of each procedure of a backfill."""
    columns = (
        Column("procedure"), Column("chunks", is_number=True), Column("done", is_number=True),
        Column("failed", is_number=True), Column("rows", is_number=True), Column("took", is_number=True),
    )  # fmt: skip
    rows = [
        (
            one["procedure"],
            one["chunks"],
            one["done"],
            one["failed"] or None,
            one["rows"],
            duration(one["took"]),
        )
        for one in documents(connection, _PROCEDURES, {"run_id": run_id})
    ]
    return table(columns, rows, style)


def chunk_failures(run: Document, style: Style, *, is_full: bool = False) -> Iterator[str]:
    """The first chunks that failed, each with the window that it read, and how many more there are."""
    ended = [step for step in last_attempts(run) if step["status"] in ("failed", "cancelled")]
    shown = [
        {**step, "procedure": f"{step['procedure']} {window(step['window_since'], step['window_until'])}"}
        for step in ended[:_MOST_FAILURES]
    ]
    yield from failure_lines({**run, "steps": shown}, style, is_full=is_full)
    if len(ended) > len(shown):
        yield f"and {plural(len(ended) - len(shown), 'more chunk')} that failed"


def summary(run: Document, style: Style) -> str:
    """The outcome of a backfill in one line."""
    progress = run["backfill"]
    took = f" in {duration(run['duration_ms'])}" if run["duration_ms"] is not None else ""
    done = f"{progress['chunks_done']:,} of {plural(progress['chunks_total'], 'chunk')}"
    rate = f", {progress['rows_per_second']:,.0f} rows/s" if progress["rows_affected"] else ""
    head = f"backfill {run['run_id']} {style.status(run['status'])}{took}"
    return f"{head}: {done}, {plural(progress['rows_affected'], 'row')}{rate}"


def next_steps(run: Document) -> list[str]:
    """What to type next; nothing when every chunk was done."""
    run_id, progress = run["run_id"], run["backfill"]
    if run["status"] == "running" and not run["is_dead"]:
        return [
            f"b2s cancel {run_id}    finishes the chunk in flight, b2s backfill --resume {run_id} goes on"
        ]
    left = progress["chunks_total"] - progress["chunks_done"]
    if not left:
        return []
    repaired = " once the cause is repaired" if progress["chunks_failed"] else ""
    return [f"b2s backfill --resume {run_id}    does what is left, {plural(left, 'chunk')}{repaired}"]


def status_lines(backfills: Sequence[Mapping[str, Any]], style: Style) -> Iterator[str]:
    """The backfills that are running, a line each."""
    for one in backfills:
        names = ", ".join(one["procedures"])
        head = (
            f"pipeline {one['pipeline']}: backfill {one['run_id']} of {names} {style.status(one['status'])}"
        )
        if one["is_dead"]:
            yield f"{head}, but its session is gone; b2s backfill --resume {one['run_id']} goes on with it"
            continue
        done = f"{one['chunks_done']:,} of {plural(one['chunks_total'], 'chunk')}"
        failed = f", {one['chunks_failed']:,} failed" if one["chunks_failed"] else ""
        until = f", ends about {moment(one['eta'])}" if one["eta"] else ""
        rate = f", {one['rows_per_second']:,.0f} rows/s" if one["rows_affected"] else ""
        yield f"{head}: {done}{failed}{rate}{until}"


def plan_lines(chunks: Sequence[Mapping[str, Any]], style: Style) -> Iterator[str]:
    """The chunks of a plan; of many the first ones and the last."""
    if not chunks:
        yield "no chunk: the range holds no row"
        return
    shown = chunks if len(chunks) <= _MOST_CHUNKS + 1 else [*chunks[:_MOST_CHUNKS], chunks[-1]]
    columns = (Column("chunk", is_number=True), Column("procedure"), Column("window"))
    rows = [
        (one["order_index"], one["procedure"], window(one["window_since"], one["window_until"]))
        for one in shown
    ]
    lines = table(columns, rows, style)
    if len(shown) < len(chunks):
        lines.insert(-1, f"... {len(chunks) - len(shown):,} more")
    yield from lines
    yield plural(len(chunks), "chunk")
