"""b2s run: runs a request to its end and shows it while it goes."""

from __future__ import annotations

import argparse
import os

from b2s import selection


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s run."""
    parser.epilog = (
        "Ctrl-C once: the step in flight is finished, the rest is skipped. Twice: its statement\n"
        "is cancelled. Three times: leave. SIGTERM is the same as the first Ctrl-C.\n"
        "Exit code 1 unless the run succeeded or completed with warnings."
    )
    selection.configure(parser)
    parser.add_argument_group("how often").add_argument(
        "--idempotency-key", metavar="KEY", help="run only once, whoever asks again with the same key"
    )
    shown = parser.add_argument_group("what to show")
    dry = shown.add_mutually_exclusive_group()
    dry.add_argument("--dry-run", action="store_true", help="only the plan, as b2s plan")
    dry.add_argument(
        "--execute", action="store_true", help="a rehearsal: run everything, roll it back, report the rows"
    )
    shown.add_argument(
        "--log-format",
        choices=("json", "console"),
        default=os.environ.get("B2S_LOG_FORMAT") or None,
        help="structured log lines to stderr instead of progress (B2S_LOG_FORMAT)",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Runs, and prints the steps (or with --json the document of etl.get_run)."""
    from b2s.commands import plan
    from b2s.commands.show import get_run
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.output import print_json, print_lines, remark, style
    from b2s.progress import display_for
    from b2s.runner import Runner
    from b2s.runview import SUCCESSES, failure_lines, next_steps, steps_table, summary

    if arguments.log_format not in (None, "json", "console"):
        raise UsageError(
            f"B2S_LOG_FORMAT={arguments.log_format} is neither json nor console", "unset B2S_LOG_FORMAT"
        )
    if arguments.dry_run or arguments.execute:
        return plan.execute(argparse.Namespace(**vars(arguments), statements=False))
    declared = {}
    if arguments.param:
        with connect(arguments.dsn) as connection:
            declared = plan.declarations(connection, arguments)
    display = display_for(is_json=arguments.json, log_format=arguments.log_format)
    outcome = Runner(arguments.dsn, selection.request_of(arguments, declared), display).run()
    with connect(arguments.dsn) as connection:
        run = get_run(connection, outcome.run_id)
    if not outcome.is_new and not arguments.json:
        remark(
            f"this idempotency key is known: run {outcome.run_id} was started with it, nothing was run now"
        )
    if arguments.json:
        print_json(run)
    else:
        look = style()
        print_lines([*steps_table(run, look), *failure_lines(run, look), summary(run, look)])
        print_lines(f"next: {line}" for line in next_steps(run))
    return 0 if outcome.status in SUCCESSES else 1
