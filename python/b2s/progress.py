"""What is shown while a run goes on: lines, a live line at the foot of a terminal, JSON, or structured logs.

Events are the objects that the engine sends: `event` (step_started, step_succeeded, ...), `run_id`, and what
belongs to it. All of it goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol, TextIO

from b2s.render import Style, duration, plural, visible
from b2s.runview import bound

Event = Mapping[str, Any]

_STILL_RUNNING: Final = 30.0
_FRAME: Final = 0.12
_FRAMES: Final = "|/-\\"
_FIELDS: Final = (
    "run_id", "order_index", "procedure", "mv_name", "mode", "tx_scope", "attempt", "duration_ms",
    "rows_affected", "error_code", "error_message", "warning", "message", "data", "is_rolled_back",
)  # fmt: skip
LEVELS: Final = ("debug", "info", "warning", "error")
"""The levels of log lines, from what hardly matters to what does most."""
_LEVELS: Final = (
    ("failed", "error"),
    ("cancelled", "warning"),
    ("retrying", "warning"),
    ("abandoned", "error"),
)


class Display(Protocol):
    """Shows a run. `interval`: seconds without news after which `tick` wants to be called, None: never."""

    interval: float | None

    def event(self, event: Event) -> None:
        """Something happened in the run."""

    def notice(self, severity: str, message: str, hint: str | None) -> None:
        """The server, or a routine, said something."""

    def say(self, text: str) -> None:
        """b2s itself has something to tell."""

    def tick(self) -> None:
        """Time went by."""

    def close(self) -> None:
        """The run is over."""


def display_for(*, is_json: bool, log_format: str | None, stream: TextIO | None = None) -> Display:
    """The display that fits the options and the terminal."""
    stream = stream or sys.stderr
    if log_format is not None:
        return LogDisplay(log_format, stream)
    if is_json:
        return JsonDisplay(stream)
    style = Style.of(stream)
    is_live = style.width is not None and os.environ.get("TERM", "dumb") != "dumb"
    return LiveDisplay(stream, style) if is_live else PlainDisplay(stream, style)


class PlainDisplay:
    """A line for each outcome, and one now and then for a step that takes long."""

    def __init__(self, stream: TextIO, style: Style) -> None:
        self.interval: float | None = 1.0
        self._stream = stream
        self._style = style
        self._running: dict[int, tuple[str, float]] = {}
        self._told_at = time.monotonic()
        self._attention = _STILL_RUNNING

    def event(self, event: Event) -> None:
        kind = str(event["event"])
        self._told_at = time.monotonic()
        self._attention = _STILL_RUNNING
        if kind == "log":
            self._print(event_line(event, self._style))
            return
        if kind == "step_started":
            self._running[event["order_index"]] = (event["procedure"], self._told_at)
            return
        self._running.pop(event.get("order_index", 0), None)
        if not kind.startswith("run_") and self._is_worth_a_line(event):
            self._print(event_line(event, self._style))

    def notice(self, severity: str, message: str, hint: str | None) -> None:
        colour = "yellow" if severity == "WARNING" else "dim"
        self._print(f"{self._style.paint(severity.lower() + ':', colour)} {visible(message)}")
        if hint:
            self._print(f"{self._style.paint('hint:', 'cyan')} {visible(hint)}")

    def say(self, text: str) -> None:
        self._print(text)

    def tick(self) -> None:
        now = time.monotonic()
        if self._running and now - self._told_at >= self._attention:
            self._told_at = now
            self._attention = min(2 * self._attention, 600)
            self._print(f"still running: {self._current(now)}")

    def close(self) -> None:
        self._running.clear()

    def _is_worth_a_line(self, event: Event) -> bool:
        return True

    def _current(self, now: float) -> str:
        return ", ".join(
            f"[{index}] {visible(name)} for {_elapsed(now - since)}"
            for index, (name, since) in sorted(self._running.items())
        )

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveDisplay(PlainDisplay):
    """One line that says what is running, and for how long; above it what did not simply succeed.

    What succeeded is in the table that follows the run.
    """

    def __init__(self, stream: TextIO, style: Style) -> None:
        super().__init__(stream, style)
        self.interval = _FRAME
        self._frame = 0
        self._ended = 0

    def event(self, event: Event) -> None:
        self._ended += str(event["event"]).startswith("step_") and event["event"] != "step_started"
        super().event(event)
        self._draw()

    def tick(self) -> None:
        self._frame += 1
        self._draw()

    def close(self) -> None:
        super().close()
        self._write("\r\x1b[2K")

    def _is_worth_a_line(self, event: Event) -> bool:
        return not str(event["event"]).endswith("_succeeded") or bool(event.get("warning"))

    def _draw(self) -> None:
        if not self._running:
            self._write("\r\x1b[2K")
            return
        ended = f"{self._ended} done, " if self._ended else ""
        text = f"{_FRAMES[self._frame % len(_FRAMES)]} {ended}{self._current(time.monotonic())}"
        shown = text[: (self._style.width or 80) - 1]
        self._write(f"\r\x1b[2K{self._style.paint(shown, 'cyan')}")

    def _print(self, text: str) -> None:
        self._write("\r\x1b[2K")
        super()._print(text)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class JsonDisplay:
    """Each event as the engine sent it, one JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        self.interval: float | None = None
        self._stream = stream

    def event(self, event: Event) -> None:
        self._print(event)

    def notice(self, severity: str, message: str, hint: str | None) -> None:
        self._print({"event": "notice", "severity": severity, "message": message, "hint": hint})

    def say(self, text: str) -> None:
        self._print({"event": "remark", "message": text})

    def tick(self) -> None:
        """Nothing: time alone is no event."""

    def close(self) -> None:
        """Nothing is left open."""

    def _print(self, event: Event) -> None:
        print(json.dumps(event, default=str, ensure_ascii=False), file=self._stream, flush=True)


class LogDisplay:
    """Each event through structlog, with a level, a time and the same field names as `b2s logs`."""

    def __init__(self, log_format: str, stream: TextIO) -> None:
        self.interval: float | None = None
        self._log = logger(log_format, stream)

    def event(self, event: Event) -> None:
        log_event(self._log, event)

    def notice(self, severity: str, message: str, hint: str | None) -> None:
        level = "warning" if severity == "WARNING" else "info"
        getattr(self._log, level)("notice", message=message, **({"hint": hint} if hint else {}))

    def say(self, text: str) -> None:
        self._log.info("remark", message=text)

    def tick(self) -> None:
        """Nothing: time alone is no event."""

    def close(self) -> None:
        """Nothing is left open."""


def _elapsed(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(1000 * seconds)


def logger(log_format: str, stream: TextIO, *, has_own_time: bool = False) -> Any:
    """A structlog logger of `json` or `console` lines. `has_own_time`: events carry their `timestamp`."""
    import structlog

    style = Style.of(stream)
    processors: list[Any] = [structlog.processors.add_log_level]
    if not has_own_time:
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    processors.append(
        structlog.processors.JSONRenderer(default=str, ensure_ascii=False)
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=style.is_coloured, sort_keys=False)
    )
    return structlog.wrap_logger(
        structlog.PrintLogger(stream), processors=processors, cache_logger_on_first_use=False
    )


def level_of(event: Event) -> str:
    """How much an event matters: one of LEVELS."""
    kind = str(event["event"])
    if kind == "log":
        return str(event["level"])
    ended = next((level for word, level in _LEVELS if kind.endswith(word)), None)
    return ended or ("warning" if event.get("warning") else "info")


def log_event(log: Any, event: Event, **more: Any) -> None:
    """One event as a log line; fields that an event does not have are left out."""
    fields = {name: event[name] for name in _FIELDS if event.get(name) is not None}
    getattr(log, level_of(event))(event["event"], **more, **fields)


def event_line(event: Event, style: Style) -> str:
    """An event of a step or a refresh, or what a routine logged, as one line for people."""
    status = str(event["event"]).partition("_")[2]
    index = f"[{event['order_index']}] " if event.get("order_index") is not None else ""
    if event["event"] == "log":
        colour = {"debug": "dim", "warning": "yellow", "error": "red"}.get(event["level"], "")
        whose = f"{visible(event['procedure'])}: " if event.get("procedure") else ""
        return f"{style.paint(index, 'dim')}{whose}{style.paint(visible(event['message']), colour)}"
    subject = visible(str(event.get("procedure") or event.get("mv_name")))
    verb = "refresh " if event.get("mv_name") else ""
    parts = [f"{style.paint(index, 'dim')}{subject} {verb}{style.status(status)}"]
    if event.get("rows_affected") is not None:
        parts.append(plural(event["rows_affected"], "row"))
    if event.get("duration_ms") is not None and status != "rolled_back":
        parts.append(f"in {duration(event['duration_ms'])}")
    if event.get("slice_index"):
        parts.append(f"slice {event['slice_index']}, up to {bound(event['window_until'])}")
    elif (event.get("attempt") or 1) > 1:
        parts.append(f"(attempt {event['attempt']})")
    if event.get("warning"):
        parts.append(style.paint(f"({visible(event['warning'])})", "yellow"))
    message = f": {visible(event['error_message'])}" if event.get("error_message") else ""
    return " ".join(parts) + message
