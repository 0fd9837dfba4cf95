"""b2s init: a project that runs, to begin with."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s init."""
    parser.epilog = (
        "Writes transformations.yaml, its JSON Schema, and a folder sql/ with a Bronze table and a routine.\n"
        "No file is overwritten. You have routines already? b2s import"
    )
    parser.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="default: this one")
    parser.add_argument("--pipeline", default="bronze_to_silver", metavar="NAME", help="name of the pipeline")


def execute(arguments: argparse.Namespace) -> int:
    """Writes the files, all or none."""
    import re

    from b2s.configvalues import IDENTIFIER
    from b2s.errors import UsageError
    from b2s.output import print_json, remark
    from b2s.scaffold.project import files

    if not re.fullmatch(IDENTIFIER, arguments.pipeline):
        raise UsageError(
            f"{arguments.pipeline} is no name for a pipeline",
            "use lower case letters, digits and underscores",
        )
    folder = Path(arguments.folder)
    made = files(arguments.pipeline)
    there = [name for name in made if (folder / name).exists() and name != ".gitignore"]
    if there:
        raise UsageError(f"{folder / there[0]} is there already", "name an empty folder: b2s init FOLDER")
    written = []
    for name, text in made.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            written.append(path.as_posix())
    if arguments.json:
        print_json(written)
        return 0
    remark(f"written: {', '.join(written)}")
    move = [f"cd {folder}"] if arguments.folder != "." else []
    steps = [
        *move,
        "b2s migrate",
        'psql "$B2S_DSN" -f sql/bronze.sql -f sql/silver.dim_customers.sql',
        "b2s sync-config && b2s test silver.dim_customers && b2s run",
        "b2s lint    needs the extra: pip install 'b2s[lint]'",
        "b2s new silver.NAME --source bronze.TABLE --pattern upsert",
    ]
    for number, step in enumerate(steps):
        remark(f"{'next: ' if number == 0 else '      '}{step}")
    return 0
