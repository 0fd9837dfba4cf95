"""b2s new: a routine by a pattern, with its table, its grants and its entry in transformations.yaml."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from b2s.scaffold.patterns import Design
    from b2s.scaffold.source import Table, Wish

_PATTERNS: Final = ("upsert", "append", "scd2", "snapshot", "delete_insert")
_STRATEGIES: Final = ("timestamp", "id", "xid", "none")
_DIMENSION: Final = re.compile(r"(^|_)(dim|dimension|ref|lookup)(_|$)")
_EPILOG: Final = """\
upsert         the newest row of each key
append         rows that never change, each once
scd2           a history: valid_from, valid_to, is_current
snapshot       a copy of all rows for each day
delete_insert  all rows of each key that has changed, such as the lines of an order

Columns, key and what tells new rows come from the source table in the database; with --columns nothing is
asked of a database. No file is overwritten."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of b2s new."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "name", metavar="PROCEDURE", help="the table to fill, which names the procedure: silver.orders"
    )
    parser.add_argument("--pattern", choices=_PATTERNS, required=True, help="how it is filled")
    parser.add_argument("--source", metavar="TABLE", help="the table to read (default: bronze.NAME)")
    parser.add_argument(
        "--key", metavar="A,B", help="what tells rows apart (default: a key of the target or of the source)"
    )
    what = "what tells new rows (default: what the source has, xid before timestamp)"
    parser.add_argument("--strategy", choices=_STRATEGIES, help=what)
    parser.add_argument("--watermark", metavar="COLUMN", help="the column for it (default: the likeliest)")
    parser.add_argument(
        "--valid-from", metavar="COLUMN", help="scd2: the column that says when a version began"
    )
    parser.add_argument(
        "--columns", metavar="'A TYPE, ...'", help="the columns of the source, without asking a database"
    )
    parser.add_argument(
        "--type", choices=("dimension", "fact"), help="default: dimension for dim_..., else fact"
    )
    parser.add_argument("--depends-on", action="append", default=[], metavar="PROCEDURE", help="repeatable")
    parser.add_argument("--description", metavar="TEXT", help="what it is for, in a sentence")
    parser.add_argument("--routine", metavar="NAME", help="the function to write (default: SCHEMA.load_NAME)")
    parser.add_argument(
        "--sql-dir", default="sql", metavar="FOLDER", help="where its file goes (default: sql)"
    )
    parser.add_argument(
        "--apply", action="store_true", help="run the file in the database, in one transaction"
    )
    parser.add_argument("--stdout", action="store_true", help="print the SQL and the entry, write nothing")


def execute(arguments: argparse.Namespace) -> int:
    """Designs, writes, applies."""
    from b2s.errors import UsageError
    from b2s.scaffold.entry import add_entry, entry_lines
    from b2s.scaffold.source import design

    wish = _wish(arguments)
    source, target = _tables(arguments, wish)
    made = design(wish, source, target)
    lines = list(
        entry_lines(
            made, arguments.name, _type(arguments), _dependencies(arguments, made), arguments.description
        )
    )
    text = _file(made, arguments)
    if arguments.stdout:
        print(text, *lines, sep="\n")
        return 0
    path = Path(arguments.sql_dir) / f"{arguments.name}.sql"
    if path.exists():
        raise UsageError(f"{path} is there already", "name another procedure, or remove the file")
    add_entry(Path(arguments.config), lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if arguments.apply:
        _apply(arguments.dsn, text)
    _say(arguments, path, made, is_indexed=any(key[:1] == made.key[:1] for key in source.keys))
    return 0


def _wish(arguments: argparse.Namespace) -> Wish:
    from b2s.configvalues import QUALIFIED
    from b2s.errors import UsageError
    from b2s.names import quoted
    from b2s.scaffold.source import Wish

    if not re.fullmatch(QUALIFIED, arguments.name) or "." not in arguments.name:
        raise UsageError(
            f"{arguments.name} is not schema.name in lower case letters, digits and underscores",
            "for example: silver.orders",
        )
    schema, name = arguments.name.split(".")
    return Wish(
        target=f"{quoted(schema)}.{quoted(name)}",
        routine=arguments.routine or f"{quoted(schema)}.load_{name}",
        source=_qualified(arguments.source or f"bronze.{name}"),
        pattern=arguments.pattern,
        strategy=arguments.strategy,
        watermark=arguments.watermark,
        key=tuple(part.strip() for part in (arguments.key or "").split(",") if part.strip()),
        time=arguments.valid_from,
    )


def _qualified(name: str) -> str:
    """A qualified name as SQL writes it."""
    from b2s.errors import UsageError
    from b2s.names import parts_of, quoted

    parts = parts_of(name)
    if len(parts) != 2:
        raise UsageError(f"{name} is not schema.table", "for example: --source bronze.orders")
    return ".".join(quoted(part) for part in parts)


def _tables(arguments: argparse.Namespace, wish: Wish) -> tuple[Table, Table | None]:
    from b2s.db import connect
    from b2s.errors import UsageError
    from b2s.scaffold.source import described, read_table

    if arguments.columns is not None:
        return described(wish.source, arguments.columns), None
    with connect(arguments.dsn) as connection:
        source = read_table(connection, wish.source)
        target = read_table(connection, wish.target)
    if source is None:
        raise UsageError(
            f"table {wish.source} does not exist",
            "name the table to read: --source; or describe it: --columns 'order_id bigint, at timestamptz'",
        )
    return source, target


def _type(arguments: argparse.Namespace) -> str:
    name = arguments.name.split(".")[1]
    return arguments.type or ("dimension" if _DIMENSION.search(name) else "fact")


def _dependencies(arguments: argparse.Namespace, made: Design) -> list[str]:
    """Those named, and the procedure that fills the source, if the configuration has one."""
    from b2s.config import load_config

    found = [one.strip() for word in arguments.depends_on for one in word.split(",") if one.strip()]
    path = Path(arguments.config)
    if path.exists():
        names = {one.name for one in load_config(path).config.procedures}
        if made.source in names and made.source not in found:
            found.append(made.source)
    return found


def _file(made: Design, arguments: argparse.Namespace) -> str:
    from b2s.scaffold.entry import grants_sql
    from b2s.scaffold.patterns import routine_sql, table_sql

    parts = [
        f"-- {arguments.name}: {arguments.description or _PURPOSES[made.pattern].format(source=made.source)}"
    ]
    if not made.has_target:
        parts.append(table_sql(made))
    return "\n\n".join([*parts, routine_sql(made), grants_sql(made)]) + "\n"


_PURPOSES: Final = {
    "upsert": "the newest row of each key of {source}.",
    "append": "the rows of {source}, each once.",
    "scd2": "the history of {source}: a row per version of a key, from valid_from until valid_to.",
    "snapshot": "all rows of {source} as they were on each day.",
    "delete_insert": "the rows of {source}, all those of a key together.",
}


def _apply(dsn: str, text: str) -> None:
    from b2s.db import connect

    with connect(dsn) as connection, connection.transaction():
        connection.execute(text.encode())


def _say(arguments: argparse.Namespace, path: Path, made: Design, *, is_indexed: bool) -> None:
    from b2s.output import remark

    remark(f"{path} written, {arguments.name} added to {arguments.config}")
    if made.strategy != "none" and made.pattern != "append" and not is_indexed:
        remark(f"it looks up rows by key: an index on {made.source} ({', '.join(made.key)}) keeps that fast")
    first = [] if arguments.apply else [f'psql "$B2S_DSN" -f {path}']
    for number, line in enumerate(
        [*first, "b2s sync-config", f"b2s test {arguments.name}", f"b2s run {arguments.name}"]
    ):
        remark(f"{'next: ' if number == 0 else '      '}{line}")
