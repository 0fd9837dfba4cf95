"""b2s sync-config: transformations.yaml into the catalog, shown as a plan and applied in one transaction."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2s.configmodel import Config
    from b2s.db import Connection
    from b2s.render import Style
    from b2s.sync import Change, SyncPlan


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s sync-config."""
    parser.epilog = (
        "Prints + added, ~ changed (old -> new), - removed; ! what changed in the catalog by other means."
    )
    parser.add_argument(
        "--lint",
        choices=("error", "warn", "off"),
        help="look at the routines of the database first: refuse to apply on findings, only show them, "
        "or do not look (default: lint.on_sync of the file)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="show the plan and change nothing")
    how.add_argument("--check", action="store_true", help="like --dry-run, but exit 1 on changes or drift")


def execute(arguments: argparse.Namespace) -> int:
    """Plans, shows, and applies unless asked only to look."""
    from b2s.config import load_config
    from b2s.db import connect
    from b2s.output import print_json, print_lines, style
    from b2s.sync import apply_config, plan_config

    is_look = arguments.dry_run or arguments.check
    loaded = load_config(Path(arguments.config))
    with connect(arguments.dsn) as connection:
        if not _passes_lint(connection, loaded.config, arguments.lint or loaded.config.lint.on_sync):
            return 1
        plan = plan_config(connection, loaded)
        if not arguments.json:
            print_lines(plan_lines(plan, style()))
        applied = plan if is_look else apply_config(connection, loaded, plan)
        if not is_look:
            _store_lineage(connection, loaded.config.pipeline)
    if arguments.json:
        print_json({**_document(applied), "is_applied": not is_look and bool(plan.changes or plan.drift)})
    else:
        print(_conclusion(plan, applied, is_look=is_look))
    return 1 if arguments.check and (plan.changes or plan.drift) else 0


def _passes_lint(connection: Connection, config: Config, demand: str) -> bool:
    """Shows, as remarks, what lint finds in the configured routines; False when that forbids to apply."""
    if demand == "off":
        return True
    from b2s.lint import parser
    from b2s.lint.database import read_database
    from b2s.lint.engine import Options, lint
    from b2s.lint.report import summary, text_lines
    from b2s.output import remark
    from b2s.render import Style

    parser.require()
    live = read_database(connection, config)
    target = config.lint.target_version or live.version
    report = lint(live.sources, config, Options(target_version=target), live.foreign or ())
    for line in text_lines(report, Style.of(sys.stderr)):
        remark(line)
    is_refused = demand == "error" and any(one.is_failure for one in report.findings)
    remark(f"lint: {summary(report)}{'; nothing was applied' if is_refused else ''}")
    return not is_refused


def _store_lineage(connection: Connection, pipeline: str) -> None:
    """Notes what the SQL of new and changed routines reads and writes, where the parser is installed."""
    from b2s.lint import parser

    if parser.is_installed():
        from b2s.lineage.scan import scan, store

        found = scan(connection, pipeline, only_changed=True).found
        if found:
            store(connection, pipeline, found)


def plan_lines(plan: SyncPlan, style: Style) -> Iterator[str]:
    """A plan, drift first."""
    for change in plan.drift:
        yield from _change_lines(change, style, "! drift: ", "yellow")
    for change in plan.changes:
        yield from _change_lines(change, style, "", {"+": "green", "-": "red"}.get(change.action, "yellow"))


def _change_lines(change: Change, style: Style, prefix: str, colour: str) -> Iterator[str]:
    yield style.paint(f"{prefix}{change.action} {change.kind} {change.name}", colour)
    if change.action != "~":
        return
    for field, (old, new) in change.fields.items():
        yield f"    {field}: {_value(old)} -> {_value(new)}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _conclusion(plan: SyncPlan, applied: SyncPlan, *, is_look: bool) -> str:
    from b2s.render import plural

    if not plan.changes and not plan.drift:
        return f"pipeline {plan.pipeline} is up to date"
    what = plural(len(plan.changes), "change")
    if is_look:
        return f"{what} to pipeline {plan.pipeline}, not applied"
    if not plan.changes:
        return f"pipeline {plan.pipeline} as it is now is recorded as version {applied.version}"
    return f"{what} to pipeline {plan.pipeline} applied as version {applied.version}"


def _document(plan: SyncPlan) -> dict[str, Any]:
    return {
        "pipeline": plan.pipeline,
        "version": plan.version,
        "digest": plan.digest,
        "base_digest": plan.base_digest,
        "changes": [_change(change) for change in plan.changes],
        "drift": [_change(change) for change in plan.drift],
    }


def _change(change: Change) -> dict[str, Any]:
    return {"action": change.action, "kind": change.kind, "name": change.name, "fields": change.fields}
