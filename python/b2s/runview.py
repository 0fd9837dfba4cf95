"""A run as people read it: its steps, what failed and why, what was skipped because of it, what is next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from b2s.render import Column, Style, duration, moment, plural, table, visible, visible_lines

Document = Mapping[str, Any]

_UNNAMED: Final = "bronze_to_silver"  # the pipeline of a request that names none
SUCCESSES: Final = ("succeeded", "completed_with_warnings")
_SKIPPED: Final = {
    "upstream_failed": "something it needs failed",
    "cancelled": "the run was cancelled",
    "stopped": "a failed step stops the run",
    "no_data": "there is nothing new to read",
    "reused": "an earlier run has done it",
}
_STEPS: Final = (
    Column("step", is_number=True), Column("procedure"), Column("mode"), Column("status"),
    Column("attempt", is_number=True), Column("rows", is_number=True), Column("ins/upd/del", is_number=True),
    Column("took", is_number=True), Column("remark", may_wrap=True),
)  # fmt: skip


def last_attempts(run: Document) -> list[Document]:
    """The steps of a run in order, each with its last attempt."""
    steps: dict[int, Document] = {}
    for step in run["steps"] or []:
        known = steps.get(step["order_index"])
        if known is None or step["attempt"] > known["attempt"]:
            steps[step["order_index"]] = step
    return [steps[index] for index in sorted(steps)]


def _with_slices(run: Document) -> list[Document]:
    """The same, with the rows and the time of the slices that were committed before the last attempt."""
    whole: list[Document] = []
    for step in last_attempts(run):
        parts = [
            one
            for one in run["steps"]
            if one["order_index"] == step["order_index"] and one["status"] == "advanced"
        ]
        if parts:
            tables: dict[str, dict[str, int]] = {}
            for part in (*parts, step):
                for table_name, counts in (part["table_counts"] or {}).items():
                    known = tables.setdefault(table_name, {})
                    for kind, count in counts.items():
                        known[kind] = known.get(kind, 0) + count
            step = {
                **step,
                "rows_affected": sum(part["rows_affected"] or 0 for part in (*parts, step)),
                "duration_ms": sum(part["duration_ms"] or 0 for part in (*parts, step)),
                "table_counts": tables,
                "window_since": parts[0]["window_since"],
            }
        whole.append(step)
    return whole


def steps_table(run: Document, style: Style) -> list[str]:
    """Every step and refresh of a run, one line each."""
    steps = _with_slices(run)
    reasons = {step["order_index"]: _remark(step, steps) for step in steps}
    rows = [
        (
            step["order_index"],
            step["procedure"],
            step["mode"],
            step["status"],
            step["attempt"] if step["attempt"] > 1 else None,
            step["rows_affected"],
            _changes(step),
            duration(step["duration_ms"]) if step["started_at"] else None,
            reasons[step["order_index"]],
        )
        for step in steps
    ]
    rows += [
        (None, refresh["mv_name"], "refresh", refresh["status"], None, None, None,
         duration(refresh["duration_ms"]), _refresh_remark(refresh))
        for refresh in run["mv_refreshes"]
    ]  # fmt: skip
    return table(_STEPS, rows, style)


def _changes(step: Document) -> str | None:
    if step["status"] != "succeeded" or step["table_counts"] is None:
        return None
    tables = list(step["table_counts"].values())
    return "/".join(
        str(sum(one.get(kind) or 0 for one in tables)) for kind in ("inserted", "updated", "deleted")
    )


def _remark(step: Document, steps: Sequence[Document]) -> str | None:
    if step["skip_reason"] == "upstream_failed":
        causes = failed_causes(step, steps)
        return f"because of {', '.join(causes)}" if causes else _SKIPPED["upstream_failed"]
    if step["skip_reason"]:
        return _SKIPPED.get(step["skip_reason"], step["skip_reason"])
    if step["status"] == "rolled_back":
        return str(step["error_message"] or "rolled back with its group")
    if step["error_message"]:
        return f"{step['error_class']} ({step['error_code']})"
    remarks = [f"in {step['slice_index']} slices"] if step["slice_index"] > 1 else []
    if step["held_back_by"]:
        remarks.append(f"window held back by {step['held_back_by']}")
    remarks += [
        f"check {check['name']}: {plural(check['violations'], 'violation')}"
        for check in step["warnings"] or []
    ]
    return "; ".join(remarks) or None


def _refresh_remark(refresh: Document) -> str | None:
    if refresh["skip_reason"]:
        return _SKIPPED.get(refresh["skip_reason"], refresh["skip_reason"])
    remark: str | None = refresh["warning"] or refresh["error_code"]
    return remark


def failed_causes(step: Document, steps: Sequence[Document]) -> list[str]:
    """The failed steps because of which a step was skipped, followed through everything in between."""
    by_name = {one["procedure"]: one for one in steps}
    seen: set[str] = set()
    causes: list[str] = []
    pending = [step]
    while pending:
        current = pending.pop(0)
        if current["procedure"] in seen:
            continue
        seen.add(current["procedure"])
        if current["status"] in ("failed", "cancelled", "abandoned"):
            causes.append(current["procedure"])
            continue
        pending += [
            by_name[needed["procedure"]]
            for needed in current["dependencies"]
            if needed["procedure"] in by_name
        ]
        if current["tx_scope"] == "per_group":
            pending += [one for one in steps if one["group_name"] == current["group_name"]]
    return causes


def failure_lines(run: Document, style: Style, *, is_full: bool = False) -> Iterator[str]:
    """Each failure with its remedy; `is_full` adds detail, context and the statement."""
    steps = last_attempts(run)
    for step in steps:
        if step["status"] not in ("failed", "cancelled") or not step["error_message"]:
            continue
        yield ""
        first, *more = visible_lines(step["error_message"]) or [""]
        where = f"[{step['order_index']}] {step['procedure']}"
        yield f"{style.paint(step['status'] + ':', 'red')} {style.paint(where, 'bold')}: {first}"
        yield from (f"  {line}" for line in more)
        if is_full:
            yield from _details(step)
        if step["error_hint"]:
            yield f"  {style.paint('hint:', 'cyan')} {visible(step['error_hint'])}"
        skipped = [
            one["procedure"]
            for one in steps
            if one["skip_reason"] == "upstream_failed" and step["procedure"] in failed_causes(one, steps)
        ]
        if skipped:
            yield f"  skipped because of it: {', '.join(skipped)}"
    for refresh in run["mv_refreshes"]:
        if refresh["status"] == "failed":
            yield ""
            message = visible(refresh["error_message"])
            yield f"{style.paint('failed:', 'red')} refresh of {refresh['mv_name']}: {message}"
            if refresh["error_hint"]:
                yield f"  {style.paint('hint:', 'cyan')} {visible(refresh['error_hint'])}"


def _details(step: Document) -> Iterator[str]:
    kind = f"{step['error_class']}, SQLSTATE {step['sqlstate']}"
    yield f"  code: {step['error_code']} ({kind}), attempt {step['attempt']}"
    for title, text in (
        ("detail", _plain_detail(step["error_detail"])),
        ("context", step["error_context"]),
        ("statement", step["statement"]),
    ):
        lines = visible_lines(text or "")
        if lines:
            yield f"  {title}: {lines[0]}"
            yield from (f"    {line}" for line in lines[1:])


def _plain_detail(detail: str | None) -> str | None:
    """DETAIL as the server gave it; of the JSON in an error of b2s only what was not shown already."""
    try:
        document = json.loads(detail or "")
    except ValueError:
        return detail
    if not isinstance(document, dict) or "code" not in document:
        return detail
    rest = {key: value for key, value in document.items() if key != "code"}
    return json.dumps(rest, ensure_ascii=False) if rest else None


def summary(run: Document, style: Style) -> str:
    """The outcome of a run in one line."""
    steps = last_attempts(run)
    counts: dict[str, int] = {}
    for step in steps:
        counts[step["status"]] = counts.get(step["status"], 0) + 1
    parts = ", ".join(f"{count} {status}" for status, count in counts.items())
    took = f" in {duration(run['duration_ms'])}" if run["duration_ms"] is not None else ""
    return f"run {run['run_id']} {style.status(run['status'])}{took}: {parts}"


def header_lines(run: Document, style: Style) -> Iterator[str]:
    """What was asked for, by whom, when."""
    title = style.paint(f"run {run['run_id']}", "bold")
    yield f"{title} of pipeline {run['pipeline']}: {style.status(run['status'])}"
    ended = f", ended {moment(run['ended_at'])}" if run["ended_at"] else ""
    took = f" ({duration(run['duration_ms'])})" if run["duration_ms"] is not None else ""
    yield f"  requested by {run['requested_by']}, started {moment(run['started_at'])}{ended}{took}"
    request = run["request"]
    asked = ", ".join(f"{key}: {_brief(request[key])}" for key in sorted(request)) or "everything, no options"
    yield f"  request: {visible(asked)}"
    if run["reason"]:
        approver = f" (approved by {run['approved_by']})" if run["approved_by"] else ""
        yield f"  reason: {visible(run['reason'])}{approver}"
    if run["cancel_requested_at"]:
        reason = f": {run['cancel_reason']}" if run["cancel_reason"] else ""
        when = moment(run["cancel_requested_at"])
        yield f"  cancelled by {run['cancel_requested_by']} at {when}{visible(reason)}"
    if run["is_dead"]:
        gone = "its session is gone; what it committed stays, the rest was rolled back"
        yield f"  {style.paint(gone, 'red')}"
    elif run["status"] == "abandoned":
        yield f"  {visible(run['error_message'])}"


def _brief(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def window_lines(run: Document) -> Iterator[str]:
    """The window that each step read, where it has one."""
    for step in _with_slices(run):
        if step["window_until"] and step["started_at"]:
            what = window(step["window_since"], step["window_until"])
            yield f"  [{step['order_index']}] {step['procedure']} read {what}"


def window(since: str | None, until: str | None) -> str:
    """A window as people read it: half open, the beginning when it has no start."""
    if until is None:
        return ""
    if since == until:
        return f"nothing, empty at {bound(until)}"
    first, last = bound(since) or "beginning", bound(until)
    if since and first == last:
        first, last = (value[:23].replace("T", " ") for value in (since, until))
    return f"[{first}, {last})"


def bound(value: str | None) -> str:
    """A watermark, or one end of a window; shortened where it is long."""
    if value is None:
        return ""
    if "T" in value[:11]:
        return moment(value)
    return value if len(value) <= 40 else f"{value[:39]}…"


def next_steps(run: Document) -> list[str]:
    """What to type next; nothing after a success."""
    run_id = run["run_id"]
    command = "b2s run" if run["pipeline"] == _UNNAMED else f"b2s run --pipeline {run['pipeline']}"
    if run["is_dead"]:
        return [f"{command}    records it as abandoned, and runs what is left to do"]
    if run["status"] == "running":
        return [f"b2s cancel {run_id}    finishes the step in flight and skips the rest"]
    done = ("succeeded", "no_data")
    again = [
        one["procedure"] for one in last_attempts(run) if (one["skip_reason"] or one["status"]) not in done
    ]
    if not again:
        return []
    when = "once the cause is repaired" if run["status"] == "failed" else "runs what is left"
    return [f"{command} {' '.join(again)}    {when}"]
