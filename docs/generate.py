"""Writes the generated parts of the documentation: `make docs`, or python docs/generate.py [--dsn DSN].

sql-reference.md comes whole from the comments in the database and privileges.md from its grants, the
tables of configuration.md from the JSON Schema of transformations.yaml, the table of monitoring.md from what
the exporter exports, rules/*.md and the table of lint.md from the rules of `b2s lint`.
Without --dsn a private server is started and removed again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psycopg

from b2s.config import json_schema
from b2s.lint.report import rule_page, rule_rows
from b2s.lint.rule import all_rules
from b2s.metricfamilies import Snapshot, families
from docs.privileges import privileges

Connection = psycopg.Connection[Any]

HERE: Final = Path(__file__).resolve().parent
SQL_REFERENCE: Final = HERE / "sql-reference.md"
PRIVILEGES: Final = HERE / "privileges.md"
CONFIGURATION: Final = HERE / "configuration.md"
LINT: Final = HERE / "lint.md"
MONITORING: Final = HERE / "monitoring.md"
RULES: Final = HERE / "rules"
WHOLE_FILE: Final = "File"

_INTRODUCTION: Final = """\
# SQL reference

What a person or a program may use in schema `etl`, with the comments that the database itself carries
(`\\df+ etl.*`, `\\d+ etl.runs`). This page is generated from them: `make docs`.

Routines whose name begins with an underscore belong to the engine; they are guarded, and of no use by hand.
Arguments are passed by name (`mode => 'full'`); their names do not change between releases.
How a call is refused: [errors.md](errors.md). How runs behave: [runs.md](runs.md).
"""

_ROUTINES: Final = """
select p.proname, case p.prokind when 'p' then 'procedure' else 'function' end,
       pg_get_function_arguments(p.oid), pg_get_function_result(p.oid), obj_description(p.oid, 'pg_proc'),
       (select string_agg(r, ', ' order by n)
          from unnest(array['etl_reader', 'etl_operator', 'etl_admin']) with ordinality u(r, n)
         where has_function_privilege(r, p.oid, 'execute'))
  from pg_proc p
 where p.pronamespace = 'etl'::regnamespace and p.proname !~ '^_'
 order by p.proname"""
_RELATIONS: Final = """
select c.oid::int8, c.relname, obj_description(c.oid, 'pg_class')
  from pg_class c
 where c.relnamespace = 'etl'::regnamespace and c.relkind::text = any (%s) and not c.relispartition
 order by c.relname"""
_COLUMNS: Final = """
select a.attname, format_type(a.atttypid, a.atttypmod), coalesce(col_description(a.attrelid, a.attnum), '')
  from pg_attribute a
 where a.attrelid = %s::oid and a.attnum > 0 and not a.attisdropped
 order by a.attnum"""
_TYPES: Final = """
select t.typname, obj_description(t.oid, 'pg_type')
  from pg_type t
  left join pg_class c on c.oid = t.typrelid
 where t.typnamespace = 'etl'::regnamespace and (t.typtype in ('d', 'e') or c.relkind = 'c')
 order by t.typname"""


def sql_reference(connection: Connection) -> str:
    """The whole of sql-reference.md, from a database that b2s is installed in."""
    lines = [_INTRODUCTION, "## Verbs", ""]
    for name, kind, arguments, result, comment, roles in connection.execute(_ROUTINES.encode()):
        lines += [f"### etl.{name}", "", "```sql", *_signature(name, kind, arguments, result), "```", ""]
        lines += [comment or "", "", f"May be called by: {roles or 'the owner only'}.", ""]
    for title, relkinds in (("Views", ["v"]), ("Tables", ["r", "p"])):
        lines += [f"## {title}", ""]
        for oid, name, comment in connection.execute(_RELATIONS.encode(), [relkinds]).fetchall():
            columns = connection.execute(_COLUMNS.encode(), [oid]).fetchall()
            lines += [f"### etl.{name}", "", comment or "", ""]
            lines += [*_table(("column", "type", "meaning"), columns), ""]
    lines += ["## Types", ""]
    lines += _table(("type", "meaning"), connection.execute(_TYPES.encode()).fetchall())
    return "\n".join(lines) + "\n"


def _signature(name: str, kind: str, arguments: str, result: str | None) -> Iterator[str]:
    """A declaration, an argument a line; commas inside parentheses or quotes do not separate."""
    parts = re.findall(r"""(?:[^,('"]|'[^']*'|\([^)]*\))+""", arguments)
    if len(parts) < 3:
        yield f"{kind} etl.{name}({arguments})" + (f" returns {result}" if result else "")
        return
    yield f"{kind} etl.{name}("
    for part in parts[:-1]:
        yield f"  {part.strip()},"
    yield f"  {parts[-1].strip()})" + (f" returns {result}" if result else "")


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for first, *rest in rows:
        cells = [f"`{first}`", *(str(cell or "").replace("|", "\\|").replace("\n", " ") for cell in rest)]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return lines


def configuration(text: str) -> str:
    """The text of configuration.md with the tables between its markers made anew.

    Raises KeyError when a marker names a mapping that the schema does not have.
    """
    models = field_tables()

    def made_anew(match: re.Match[str]) -> str:
        table = "\n".join(models[match[1]])
        return f"<!-- fields of {match[1]} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- fields of (\w+) -->\n.*?<!-- end -->", made_anew, text, flags=re.DOTALL)


def field_tables() -> dict[str, list[str]]:
    """For each mapping of the file the table of its fields; `File` is the file as a whole."""
    schema = json_schema()
    return {
        name: _table(("field", "value", "default", "meaning"), list(_fields(model)))
        for name, model in {WHOLE_FILE: schema, **schema["$defs"]}.items()
    }


def lint(text: str) -> str:
    """The text of lint.md with the table of the rules made anew."""
    rows = [f"| {' | '.join(row)} |" for row in rule_rows()]
    table = "\n".join(["| rule | name | severity | finds |", "| --- | --- | --- | --- |", *rows])
    return re.sub(
        r"<!-- rules -->\n.*?<!-- end -->",
        lambda _: f"<!-- rules -->\n\n{table}\n\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def monitoring(text: str) -> str:
    """The text of monitoring.md with the table of the metrics made anew."""
    server = {
        "version": "",
        "is_full_refresh_frozen": False,
        "schedule_count": 0,
        "horizon": None,
        "clock_at": None,
    }
    rows = [
        (
            f"{family.name}_total" if family.type == "counter" else family.name,
            family.type,
            ", ".join(getattr(family, "_labelnames", ())),
            family.documentation,
        )
        for family in families(Snapshot(server=[server]), is_openmetrics=False)
    ]
    table = "\n".join(_table(("metric", "type", "labels", "meaning"), rows))
    return re.sub(
        r"<!-- metrics -->\n.*?<!-- end -->",
        lambda _: f"<!-- metrics -->\n\n{table}\n\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def rule_pages() -> dict[Path, str]:
    """A page for each rule."""
    return {RULES / f"{code}.md": rule_page(rule) for code, rule in all_rules().items()}


def _fields(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    required = model.get("required", ())
    for name, field in model["properties"].items():
        default = field.get("default")
        shown = "required" if name in required else "" if default is None else f"`{_plain(default)}`"
        yield name, _values(field), shown, field.get("description", "")


def _values(field: Mapping[str, Any]) -> str:
    """What a field takes, in words."""
    branches = field.get("anyOf") or [field]
    found = [_value(one) for one in branches if one.get("pattern") != r"\$\{"]
    return ", ".join(dict.fromkeys(found))


def _value(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return f"[{schema['$ref'].rpartition('/')[2]}](#{schema['$ref'].rpartition('/')[2].lower()})"
    if "const" in schema:
        return f"`{_plain(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_plain(one)}`" for one in schema["enum"])
    if schema.get("oneOf"):
        return ", ".join(_value(one) for one in schema["oneOf"])
    if schema.get("type") == "array":
        return f"list of {_values(schema['items'])}" if schema.get("items") else "list"
    if schema.get("type") == "object":
        inner = next(iter(schema.get("patternProperties", {}).values()), schema.get("additionalProperties"))
        return f"mapping to {_values(inner)}" if isinstance(inner, dict) and inner else "mapping"
    if schema.get("type") in ("integer", "number"):
        return _number(schema)
    if "ms|s|h|d" in schema.get("pattern", ""):
        return "duration"
    return _NAMES.get(schema.get("pattern", ""), str(schema.get("type", "any")))


def _number(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    kind = "whole number" if schema["type"] == "integer" else "number"
    if low is None or low < -(2**31):
        return kind
    if low == high:
        return f"`{low}`"
    return f"{kind} {low} to {high}" if high is not None and high < 2**31 - 1 else f"{kind} from {low}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_NAMES: Final = {
    r"^[a-z_][a-z0-9_]*$": "name",
    r"^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?$": "schema.name",
    r"^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?(\([^()]*\))?$": "schema.name or schema.name(types)",
}
"""What the patterns of the schema mean."""


def main() -> int:
    """Writes both pages; with --check only says (exit code 1) that they are out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dsn", help="a database that b2s is installed in; default: a private server")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when something is out of date"
    )
    arguments = parser.parse_args()
    wanted = {
        **_from_database(arguments.dsn),
        CONFIGURATION: configuration(CONFIGURATION.read_text(encoding="utf-8")),
        LINT: lint(LINT.read_text(encoding="utf-8")),
        MONITORING: monitoring(MONITORING.read_text(encoding="utf-8")),
        **rule_pages(),
    }
    stale = [
        path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        print(f"{path.name} {'is out of date' if arguments.check else 'written'}", file=sys.stderr)
        if not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if arguments.check and stale else 0


def _from_database(dsn: str | None) -> dict[Path, str]:
    if dsn:
        with psycopg.connect(dsn) as connection:
            return {SQL_REFERENCE: sql_reference(connection), PRIVILEGES: privileges(connection)}
    from b2s.embedded import EmbeddedServer
    from b2s.migrate import migrate

    with EmbeddedServer() as server:
        migrate(server.dsn)
        return _from_database(server.dsn)


if __name__ == "__main__":
    sys.exit(main())
