"""b2s sync-config: transformations.yaml into the catalog, shown as a plan and applied in one transaction."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from b2s.config import LoadedConfig
    from b2s.configmodel import Config
    from b2s.db import Connection
    from b2s.jobs import Cron, JobChange
    from b2s.render import Style
    from b2s.sync import Change, SyncPlan

_COLOURS: Final = {"+": "green", "-": "red"}


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
    parser.add_argument(
        "--cron-dsn",
        default=os.environ.get("B2S_CRON_DSN", ""),
        metavar="DSN",
        help="the database pg_cron lives in (B2S_CRON_DSN; default: this one, or where its scheduler is)",
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
    with ExitStack() as stack:
        connection = stack.enter_context(connect(arguments.dsn))
        if not _passes_lint(connection, loaded.config, arguments.lint or loaded.config.lint.on_sync):
            return 1
        plan = plan_config(connection, loaded)
        jobs = _Jobs.of(stack, connection, loaded, arguments)
        if not arguments.json:
            print_lines(plan_lines(plan, style()))
            print_lines(jobs.lines(style()))
        is_same = not plan.changes and not plan.drift and plan.version is not None
        applied = plan if is_look or is_same else apply_config(connection, loaded, plan)
        if not is_look:
            jobs.apply()
            _store_lineage(connection, loaded.config.pipeline)
    is_changed = bool(plan.changes or plan.drift or jobs.changes)
    if arguments.json:
        print_json({**_document(applied), **jobs.document(), "is_applied": not is_look and is_changed})
    else:
        print_lines(_conclusions(plan, applied, jobs, is_look=is_look))
    return 1 if arguments.check and is_changed else 0


@dataclass(frozen=True, slots=True)
class _Jobs:
    """What is to be done about the jobs of pg_cron; nothing where there is none to do it with."""

    cron: Cron | None
    changes: tuple[JobChange, ...]
    drift: tuple[JobChange, ...]

    @classmethod
    def of(
        cls, stack: ExitStack, connection: Connection, loaded: LoadedConfig, arguments: argparse.Namespace
    ) -> _Jobs:
        """Looks for pg_cron and compares; says on stderr why that cannot be, unless it is demanded."""
        from b2s.errors import UsageError
        from b2s.jobs import NoCron, open_cron, owner_problem, wanted_jobs
        from b2s.output import remark

        clock = loaded.config.clock
        try:
            cron = stack.enter_context(open_cron(connection, arguments.dsn, arguments.cron_dsn, clock.role))
        except NoCron as absence:
            if clock.executor == "pg_cron":
                raise UsageError(str(absence), absence.hint) from absence
            if clock.executor == "auto" and (loaded.config.schedules or arguments.cron_dsn or clock.role):
                remark(f"no jobs: {absence}\nhint: {absence.hint}")
            return cls(None, (), ())
        wanted = wanted_jobs(connection, loaded.spec(), has_seconds=cron.has_seconds)
        before = wanted_jobs(connection, None, has_seconds=cron.has_seconds)
        changes = cron.changes(wanted)
        drift = [change for change in cron.changes(before) if change.action == "~"]
        problem = owner_problem(connection, cron.owner) if wanted else None
        if problem:
            remark(f"warning: {problem[0]}\nhint: {problem[1]}")
        if not cron.has_seconds and any("second" in one.cron for one in loaded.config.schedules):
            version = ".".join(map(str, cron.version))
            remark(f"warning: pg_cron {version} fires once a minute, more often from 1.5 on")
        return cls(cron, tuple(changes), tuple(drift))

    def apply(self) -> None:
        """Makes the jobs what they should be."""
        if self.cron is not None:
            self.cron.apply(self.changes)

    def lines(self, style: Style) -> Iterator[str]:
        """The plan, drift first."""
        from b2s.sync import Change

        for prefix, changes in (("! drift: ", self.drift), ("", self.changes)):
            for one in changes:
                change = Change(one.action, "job", one.name, one.fields)
                yield from _change_lines(change, style, prefix, _COLOURS.get(one.action, "yellow"))

    def document(self) -> dict[str, Any]:
        """The plan for programs."""

        def of(changes: Sequence[JobChange]) -> list[dict[str, Any]]:
            return [{"action": one.action, "name": one.name, "fields": one.fields} for one in changes]

        return {
            "jobs": {
                "is_available": self.cron is not None,
                "changes": of(self.changes),
                "drift": of(self.drift),
            }
        }


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
        yield from _change_lines(change, style, "", _COLOURS.get(change.action, "yellow"))


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


def _conclusions(plan: SyncPlan, applied: SyncPlan, jobs: _Jobs, *, is_look: bool) -> Iterator[str]:
    from b2s.render import plural

    if jobs.changes:
        what = plural(len(jobs.changes), "job")
        yield f"{what} of pg_cron to be changed" if is_look else f"{what} of pg_cron changed"
    if not plan.changes and not plan.drift:
        yield f"pipeline {plan.pipeline} is up to date"
        return
    what = plural(len(plan.changes), "change")
    if is_look:
        yield f"{what} to pipeline {plan.pipeline}, not applied"
    elif not plan.changes:
        yield f"pipeline {plan.pipeline} as it is now is recorded as version {applied.version}"
    else:
        yield f"{what} to pipeline {plan.pipeline} applied as version {applied.version}"


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
