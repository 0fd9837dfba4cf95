"""b2s import: a configuration from the routines that are there."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from b2s.importer.infer import Inferred
    from b2s.importer.inventory import Inventory
    from b2s.lint.engine import Report

_EPILOG: Final = """\
Reads; changes neither the database nor a routine. Writes two files and overwrites none without --force:
the configuration, and a report of what to change. Routines that b2s cannot run as they are stay in the
file as comments.

Needs the parser pglast: pip install 'b2s[lint]'."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s import."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="files or folders of SQL instead of a database"
    )
    parser.add_argument(
        "--schema", action="append", default=[], metavar="NAME",
        help="routines of this schema only (repeatable; default: all)",
    )  # fmt: skip
    parser.add_argument("--pipeline", default="bronze_to_silver", metavar="NAME", help="name of the pipeline")
    parser.add_argument(
        "--output", metavar="FILE", help="the configuration (default: --config; - for stdout)"
    )
    parser.add_argument(
        "--report", metavar="FILE", default="import-report.md", help="default: import-report.md"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")


def execute(arguments: argparse.Namespace) -> int:
    """Reads, infers, writes."""
    from b2s.importer.classify import classify
    from b2s.importer.document import document
    from b2s.importer.infer import infer
    from b2s.importer.report import report
    from b2s.importer.split import split
    from b2s.lint import parser
    from b2s.output import print_json

    parser.require()
    schemas = [one.strip() for word in arguments.schema for one in word.split(",") if one.strip()]
    output = arguments.output or arguments.config
    _refuse_to_overwrite([output, arguments.report], is_forced=arguments.force)
    inventory = _inventory(arguments, schemas)
    judged = classify(inventory)
    inferred = infer(inventory, judged)
    taken = {one.name for one in inventory.routines}
    splits = {
        entry.name: split(entry.judged, taken) for entry in inferred.entries if len(entry.judged.targets) > 1
    }
    text = document(inventory, judged, inferred, arguments.pipeline)
    _write(output, text)
    findings = _lint(inventory, inferred, text)
    _write(arguments.report, report(inventory, judged, inferred, splits, findings))
    if arguments.json:
        print_json({
            "procedures": [entry.name for entry in inferred.entries],
            "routines": [
                {
                    "routine": one.found.signature,
                    "role": one.role,
                    "loads": one.targets,
                    "reasons": one.reasons,
                }
                for one in judged
            ],
            "groups": inferred.groups, "splits": sorted(splits), "config": output, "report": arguments.report,
        })  # fmt: skip
    else:
        _summarise(
            inferred,
            len(inventory.routines),
            sum(one.role == "blocked" for one in judged),
            splits,
            output,
            arguments.report,
        )
    return 0


def _refuse_to_overwrite(paths: list[str], *, is_forced: bool) -> None:
    from b2s.errors import UsageError

    for path in paths:
        if path != "-" and Path(path).exists() and not is_forced:
            raise UsageError(
                f"{path} is there already", "name another file with --output or --report, or add --force"
            )


def _inventory(arguments: argparse.Namespace, schemas: list[str]) -> Inventory:
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.importer.inventory import inventory_of, read_inventory
    from b2s.lint.sources import read_files

    if arguments.paths:
        inventory = inventory_of(read_files(arguments.paths), schemas)
    else:
        with connect(arguments.dsn) as connection:
            inventory = read_inventory(connection, schemas)
    if not inventory.routines:
        where = f" of schema {', '.join(schemas)}" if schemas else ""
        raise UsageError(
            f"{inventory.origin} holds no function or procedure{where}",
            "name the schema of your routines: --schema",
        )
    return inventory


def _write(path: str, text: str) -> None:
    from b2s.errors import UsageError

    if path == "-":
        print(text, end="")
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def _lint(inventory: Inventory, inferred: Inferred, text: str) -> Report | None:
    """What lint says of the routines under the new configuration; None when it holds no procedure."""
    import tempfile

    from b2s.config import load_config
    from b2s.lint.engine import lint

    if not inferred.entries:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transformations.yaml"
        path.write_text(text, encoding="utf-8")
        config = load_config(path, {}).config
    wanted = {id(entry.found.routine.source) for entry in inferred.entries}
    return lint([one.source for one in inventory.parsed if id(one.source) in wanted], config)


def _summarise(
    inferred: Inferred, routines: int, blocked: int, splits: Iterable[str], output: str, report: str
) -> None:
    from b2s.output import remark
    from b2s.render import plural

    remark(
        f"{plural(routines, 'routine')} read, "
        f"{plural(len(inferred.entries), 'procedure')} configured in {output}"
    )
    if blocked:
        remark(
            f"{plural(blocked, 'routine')} to be changed before b2s can run "
            f"{'it' if blocked == 1 else 'them'}"
        )
    for name, members in inferred.groups.items():
        remark(f"{', '.join(members)} read each other: group {name}")
    for name in splits:
        remark(f"{name} loads many tables: {report} proposes a split")
    remark(f"next: read {report}, make the grants it lists, then b2s sync-config --dry-run")
