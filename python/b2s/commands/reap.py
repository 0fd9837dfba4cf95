"""b2s reap: records runs whose sessions are gone as what they are."""

from __future__ import annotations

import argparse
from typing import Final

_DEAD: Final = "select h.run_id from etl.run_history h where h.is_dead order by h.run_id"
_RECORDED: Final = """
select r.run_id, r.kind from etl.runs r
 where r.run_id = any (%s) and r.status = 'abandoned' order by r.run_id"""


def configure(parser: argparse.ArgumentParser) -> None:
    """b2s reap has no options of its own."""
    parser.epilog = "Every start of a run does this for its pipeline, and b2s worker does it all the time."


def execute(arguments: argparse.Namespace) -> int:
    """Records dead runs as abandoned, and says how to go on with each."""
    from b2s.db import connect
    from b2s.output import print_json
    from b2s.render import plural

    with connect(arguments.dsn) as connection:
        dead = [row[0] for row in connection.execute(_DEAD)]
        connection.execute("select etl.reap()")
        recorded = connection.execute(_RECORDED, [dead]).fetchall()
    if arguments.json:
        print_json({"abandoned": [run_id for run_id, _ in recorded]})
        return 0
    found = plural(len(recorded), "dead run")
    print(f"{found} recorded as abandoned" if recorded else "no run is dead")
    for run_id, kind in recorded:
        print(f"next: b2s backfill --resume {run_id}" if kind == "backfill" else f"next: b2s resume {run_id}")
    return 0
