"""A run as people read it: its steps, what failed and why, what was skipped because of it, what is next."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from b2s.render import Column, Style, duration, moment, plural, table, visible, visible_lines

Document = Mapping[str, Any]

_UNNAMED: Final = "bronze_to_silver"  # the pipeline of a request that names none
SUCCESSES: Final = ("succeeded", "completed_with_warnings")
_DONE: Final = ("succeeded", "no_data", "reused")
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
    """Each failure with its remedy; `is_full` adds everything that is known about it."""
    steps = last_attempts(run)
    for step in steps:
        if step["status"] == "abandoned" and step["started_at"] and is_full:
            yield from _lost(step, style)
        if step["status"] not in ("failed", "cancelled") or not step["error_message"]:
            continue
        yield ""
        first, *more = visible_lines(step["error_message"]) or [""]
        where = f"[{step['order_index']}] {step['procedure']}"
        yield f"{style.paint(step['status'] + ':', 'red')} {style.paint(where, 'bold')}: {first}"
        yield from (f"  {line}" for line in more)
        if is_full:
            yield from _details(step)
            yield from _attempts(run, step)
        yield from _blockers(step)
        if step["error_hint"]:
            yield f"  {style.paint('hint:', 'cyan')} {visible(step['error_hint'])}"
        if is_full:
            yield f"  rolled back: {_rolled_back(step, steps)}"
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


def _lost(step: Document, style: Style) -> Iterator[str]:
    yield ""
    where = f"[{step['order_index']}] {step['procedure']}"
    backend = f" (backend {step['worker_pid']})" if step.get("worker_pid") else ""
    yield f"{style.paint('abandoned:', 'red')} {style.paint(where, 'bold')}: its session{backend} is gone"
    yield f"  it had begun at {moment(step['started_at'])}; nothing of it was kept"


def _rolled_back(step: Document, steps: Sequence[Document]) -> str:
    if step["tx_scope"] != "per_group":
        return "this step alone"
    members = [
        one["procedure"]
        for one in steps
        if one["group_name"] == step["group_name"] and one["tx_scope"] == "per_group" and one["started_at"]
    ]
    return f"the whole group {step['group_name']}: {', '.join(members)}"


def _details(step: Document) -> Iterator[str]:
    kind = f"{step['error_class']}, SQLSTATE {step['sqlstate']}"
    yield f"  code: {step['error_code']} ({kind}), attempt {step['attempt']}"
    if step.get("timed_out_at"):
        yield f"  cancelled by the watchdog at {moment(step['timed_out_at'])}"
    yield from _titled("detail", _plain_detail(step["error_detail"]))
    for place in step.get("places") or []:
        yield from _place(place, is_changed=bool(step.get("is_changed")))
    yield from _titled("context", step["error_context"])
    yield from _titled("statement", step["statement"])


def _titled(title: str, text: str | None) -> Iterator[str]:
    lines = visible_lines(text or "")
    if lines:
        yield f"  {title}: {lines[0]}"
        yield from (f"    {line}" for line in lines[1:])


def _place(place: Document, *, is_changed: bool) -> Iterator[str]:
    """The lines of a routine around the one that failed, as they are now."""
    caution = "; it has changed since this run" if is_changed else ""
    if str(place["line"]) not in place["source"]:
        yield f"  at: {visible(place['routine'])} line {place['line']}, which is not there any more{caution}"
        return
    yield f"  at: {visible(place['routine'])} line {place['line']}, as it is now{caution}"
    width = max(len(number) for number in place["source"])
    for number, text in place["source"].items():
        mark = ">" if number == str(place["line"]) else " "
        yield f"    {mark} {number.rjust(width)} | {visible(text.expandtabs(4))}".rstrip()


def _attempts(run: Document, step: Document) -> Iterator[str]:
    """The attempts before the last one: when, why they failed, and the wait until the next."""
    attempts = [
        one
        for one in run["steps"]
        if one["order_index"] == step["order_index"] and one["slice_index"] == step["slice_index"]
    ]
    if len(attempts) < 2:
        return
    yield "  attempts:"
    for one, following in zip(attempts, [*attempts[1:], None], strict=True):
        error = f"{one['error_code']}, {visible(one['error_message'] or '')}"
        waited = ""
        if following is not None and following["started_at"] and one["ended_at"]:
            waited = (
                f"; tried again after {duration(_milliseconds(one['ended_at'], following['started_at']))}"
            )
        took = duration(one["duration_ms"])
        yield f"    {one['attempt']}  {moment(one['started_at'])}  {took}  {error}{waited}"


def _milliseconds(since: str, until: str) -> float:
    between = datetime.fromisoformat(until) - datetime.fromisoformat(since)
    return max(0.0, between.total_seconds() * 1000)


def _blockers(step: Document) -> Iterator[str]:
    what = "deadlock with" if step["sqlstate"] == "40P01" else "may have waited for"
    for one in step.get("blocked_by") or []:
        yield f"  {what}: {blocker_text(one)}"
        if one.get("query"):
            yield f"    {visible(one['query'])}"


def blocker_text(one: Document) -> str:
    """A session that is, or was, in the way of a step."""
    who = ", ".join(visible(str(one[key])) for key in ("user", "application") if one.get(key))
    since = f", in a transaction since {moment(one['since'])}" if one.get("since") else ""
    return f"backend {one['pid']}{f' ({who})' if who else ''}{since}"


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
    begun = f"started {moment(run['started_at'])}" if run["started_at"] else "not started"
    yield f"  requested by {run['requested_by']}, {begun}{ended}{took}"
    if run["parent_run_id"]:
        yield f"  takes up run {run['parent_run_id']}"
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
    elif run["status"] == "abandoned" or (run["status"] == "failed" and not run["steps"]):
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


def kept_lines(run: Document) -> Iterator[str]:
    """What a run that did not succeed has committed, and up to where."""
    for step in last_attempts(run):
        slices = [
            one
            for one in run["steps"]
            if one["order_index"] == step["order_index"] and one["status"] == "advanced"
        ]
        last = step if step["status"] == "succeeded" else (slices or [None])[-1]
        if last is None:
            continue
        upto = f", up to {bound(last['window_until'])}" if last["window_until"] else ""
        part = "" if last is step else f", {plural(len(slices), 'slice')} of its window"
        yield f"  [{step['order_index']}] {step['procedure']}{part}{upto}"


def next_steps(run: Document) -> list[str]:
    """What to type next; nothing after a success."""
    run_id = run["run_id"]
    if run["is_dead"]:
        return [
            f"b2s resume {run_id}    records it as abandoned, and does what is left",
            "b2s reap    only records it as abandoned",
        ]
    if run["status"] == "queued":
        return [
            "b2s worker --once    takes up what is queued",
            f"b2s cancel {run_id}    takes it back",
        ]
    if run["status"] == "running":
        return [f"b2s cancel {run_id}    finishes the steps in flight and skips the rest"]
    if run.get("resumed_as"):
        return [f"b2s show {run['resumed_as']}    shows the run that took it up"]
    command = "b2s run" if run["pipeline"] == _UNNAMED else f"b2s run --pipeline {run['pipeline']}"
    steps = last_attempts(run)
    again = [one for one in steps if (one["skip_reason"] or one["status"]) not in _DONE]
    if again and run["status"] not in SUCCESSES:
        names = " ".join(one["procedure"] for one in again)
        return [
            f"b2s resume {run_id}    {_when(run, again)}",
            f"{command} {names}    the same, reading up to now",
        ]
    held = [one for one in steps if one.get("held_back_by")]
    if held:
        names = " ".join(one["procedure"] for one in held)
        return [f"{command} {names}    reads the rest, once this is over: {held[0]['held_back_by']}"]
    return []


def _when(run: Document, again: Sequence[Document]) -> str:
    """What has to happen before a run is resumed."""
    failed = [one for one in again if one["status"] == "failed"]
    blocker = next((one["blocked_by"][0] for one in failed if one.get("blocked_by")), None)
    if not failed:
        return "does what is left"
    if blocker is not None and all(one["error_class"] == "transient" for one in failed):
        return f"once {blocker_text(blocker)} has ended"
    if all(one["error_class"] == "transient" for one in failed):
        return "tries again; nothing is wrong with the data"
    if all(one["error_class"] == "timeout" for one in failed):
        return "once it is known what it waited for, or timeout is raised (b2s sync-config)"
    return "once the cause is repaired"
