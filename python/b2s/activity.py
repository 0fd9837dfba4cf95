"""What is being executed now: by whom, for how long, how long that usually takes, and who is in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from b2s.render import Style, duration, moment, visible
from b2s.runview import blocker_text

Document = Mapping[str, Any]

ACTIVE: Final = """
select a.order_index, a.subject as procedure, a.mode, a.attempt, a.pid, a.started_at,
       a.running_ms as duration_ms, a.usual_ms, a.wait_event_type, a.wait_event, a.lock_wait_since,
       a.blocked_by
  from etl.active_steps a where a.run_id = %(run_id)s order by a.order_index, a.subject"""
_LONG: Final = 1.5
_NOT_WAITING: Final = ("Activity", "Client", "Timeout")
"""Kinds of waits that hold nobody up: b2s itself waits so."""


def step_lines(steps: Sequence[Document], style: Style) -> Iterator[str]:
    """One line for each step that is executed, and one for each session in its way."""
    for step in steps:
        index = f"[{step['order_index']}] " if step["order_index"] is not None else ""
        took = duration(step["duration_ms"])
        usual = f", usually {duration(step['usual_ms'])}" if step["usual_ms"] is not None else ""
        is_long = step["usual_ms"] is not None and step["duration_ms"] > _LONG * step["usual_ms"]
        shown = style.paint(f"for {took}{usual}", "yellow" if is_long else "")
        again = f", attempt {step['attempt']}" if step["attempt"] > 1 else ""
        yield f"  at {index}{visible(step['procedure'])} {shown}{again}, backend {step['pid']}{_wait(step)}"
        for one in step["blocked_by"] or []:
            yield f"    {style.paint('blocked by', 'red')} {blocker_text(one)}"


def _wait(step: Document) -> str:
    if step["lock_wait_since"] is not None:
        return f", waits for a lock since {moment(step['lock_wait_since'])}"
    if step["wait_event_type"] in (None, *_NOT_WAITING):
        return ""
    return f", waits for {step['wait_event_type']} {step['wait_event']}"


def late_text(one: Document) -> str | None:
    """By how much a procedure misses its freshness objective; nothing when it does not."""
    if not one["is_late"]:
        return None
    objective = duration(one["freshness_ms"])
    if one["late_ms"] is None:
        return f"never succeeded, objective {objective}"
    return f"by {duration(one['late_ms'])}, objective {objective}"
