"""b2s run: runs a request to its end and shows it while it goes."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from b2s import selection

if TYPE_CHECKING:
    from b2s.progress import Display

_CONFIGURED: Final = """
select p.max_concurrency from etl.pipelines p where p.name = coalesce(%s::text, 'bronze_to_silver')"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s run."""
    parser.epilog = (
        "Ctrl-C once: the step in flight is finished, the rest is skipped. Twice: its statement\n"
        "is cancelled. Three times: leave. SIGTERM is the same as the first Ctrl-C.\n"
        "Exit code 1 unless the run succeeded or completed with warnings."
    )
    selection.configure(parser)
    add_key(parser)
    add_workers(parser)
    shown = parser.add_argument_group("what to show")
    dry = shown.add_mutually_exclusive_group()
    dry.add_argument("--dry-run", action="store_true", help="only the plan, as b2s plan")
    dry.add_argument(
        "--execute", action="store_true", help="a rehearsal: run everything, roll it back, report the rows"
    )
    add_log_format(shown)


def add_key(parser: argparse.ArgumentParser) -> None:
    """The idempotency key of a request."""
    parser.add_argument_group("how often").add_argument(
        "--idempotency-key", metavar="KEY", help="run only once, whoever asks again with the same key"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """How many sessions of this command execute the run."""
    parser.add_argument_group("how many at once").add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help="sessions that execute the run (default: its max_concurrency; never more than steps)",
    )


def add_log_format(group: argparse._ActionsContainer) -> None:
    """The option that turns progress into structured logs."""
    group.add_argument(
        "--log-format",
        choices=("json", "console"),
        default=os.environ.get("B2S_LOG_FORMAT") or None,
        help="structured log lines to stderr instead of progress (B2S_LOG_FORMAT)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Runs, and prints the steps (or with --json the document of etl.get_run)."""
    from b2s.commands import plan
    from b2s.db import connect
    from b2s.runner import Runner

    display = open_display(arguments)
    check_workers(arguments.workers)
    if arguments.dry_run or arguments.execute:
        return plan.execute(argparse.Namespace(**vars(arguments), statements=False))
    declared = {}
    if arguments.param or arguments.workers:
        with connect(arguments.dsn) as connection:
            declared = plan.declarations(connection, arguments)
            configured = connection.execute(_CONFIGURED, [arguments.pipeline]).fetchone()
    request = selection.request_of(arguments, declared)
    if arguments.workers:
        allowed = request.get("max_concurrency") or (configured[0] if configured else 1)
        if arguments.workers > allowed:
            request["max_concurrency"] = arguments.workers
    outcome = Runner(arguments.dsn, request, display, arguments.workers).run()
    known = "this idempotency key is known: run {} was started with it, nothing was run now"
    is_known = "idempotency_key" in request and not outcome.is_new
    remark = known.format(outcome.run_id) if is_known else None
    return report(arguments, outcome.run_id, remark)


def open_display(arguments: argparse.Namespace) -> Display:
    """How the options want a run to be shown. Raises UsageError for a log format that there is not."""
    from b2s.errors import UsageError
    from b2s.progress import display_for

    if arguments.log_format not in (None, "json", "console"):
        raise UsageError(
            f"B2S_LOG_FORMAT={arguments.log_format} is neither json nor console", "unset B2S_LOG_FORMAT"
        )
    return display_for(is_json=arguments.json, log_format=arguments.log_format)


def check_workers(workers: int | None) -> None:
    """Raises UsageError unless there is at least one."""
    from b2s.errors import UsageError

    if workers is not None and workers < 1:
        raise UsageError("--workers must be at least 1", "leave it out for what the configuration allows")


def report(arguments: argparse.Namespace, run_id: int, remark: str | None = None) -> int:
    """Prints a run that has ended; returns the exit code that its outcome means."""
    from b2s import output
    from b2s.commands.show import get_run
    from b2s.db import connect
    from b2s.runview import SUCCESSES, failure_lines, next_steps, steps_table, summary

    with connect(arguments.dsn) as connection:
        run: dict[str, Any] = get_run(connection, run_id)
    if arguments.json:
        output.print_json(run)
    else:
        if remark:
            output.remark(remark)
        look = output.style()
        output.print_lines([*steps_table(run, look), *failure_lines(run, look), summary(run, look)])
        output.print_lines(f"next: {line}" for line in next_steps(run))
    return 0 if run["status"] in SUCCESSES else 1
