"""b2s purge: delete history that is no longer kept."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s purge."""
    parser.epilog = (
        "What is kept for how long says `retention` in transformations.yaml; nothing here makes it shorter.\n"
        "A job of pg_cron and b2s worker --schedule do this once a day."
    )
    parser.add_argument(
        "--batch", type=int, default=5000, metavar="N", help="attempts per transaction (5000)"
    )
    parser.add_argument("--for", dest="limit", default="1h", metavar="TIME", help="stop after so long (1h)")


def execute(arguments: argparse.Namespace) -> int:
    """Purges, and says of what."""
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.options import seconds
    from b2s.output import print_json, remark

    if arguments.batch < 1:
        raise UsageError(f"--batch {arguments.batch} is not a number of attempts", "--batch 5000")
    limit = seconds("--for", arguments.limit)
    with connect(arguments.dsn) as connection:
        connection.add_notice_handler(
            lambda notice: remark(f"{notice.severity_nonlocalized or ''}: {notice.message_primary}".lower())
        )
        row = connection.execute(
            "call etl.purge(batch_rows => %s, max_duration => make_interval(secs => %s))",
            [arguments.batch, limit],
        ).fetchone()
    counts: dict[str, int] = row[0] if row else {}
    if arguments.json:
        print_json(counts)
        return 0
    gone = [f"{count} {what}" for what, count in counts.items() if count]
    print(f"purged {', '.join(gone)}" if gone else "nothing to purge: all there is is to be kept")
    return 0
