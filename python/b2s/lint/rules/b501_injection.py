from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from b2s.lint.parser import kind
from b2s.lint.project import OWN_SCHEMA, Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B501",
    "injection",
    "error",
    scope="routine",
    bad="""\
create procedure silver.empty_table(table_name text) language plpgsql set search_path = '' as $$
begin
  execute 'delete from silver.' || table_name;
end $$;
""",
    good="""\
create procedure silver.empty_table(table_name text) language plpgsql set search_path = '' as $$
begin
  execute format('delete from silver.%I where true', table_name);
end $$;
""",
)
def injection(step: Step, project: Project) -> Iterator[Hit]:
    """Text that comes from outside goes into EXECUTE as it is.

    Whoever chooses the value chooses the statement, with the rights of the routine's owner. Use `format`
    with `%I` for names and `%L` for values, or pass values with USING. The value is followed through
    assignments, `||`, `format`, `concat`, `coalesce` and CASE. Numbers, dates and other types that cannot
    hold SQL are not reported, nor is text that is constant in the end, or comes from a function of yours.
    Schema etl, whose routines execute what b2s compiled, is left out.
    """
    if step.routine.schema == OWN_SCHEMA:
        return
    for expr, folded in step.folded.values():
        said: set[str] = set()
        for node in folded.unsafe:
            name = _name(node)
            if name in said:
                continue
            said.add(name)
            yield Hit(expr.offset, f"{name} goes into execute unquoted", "use format with %I or %L, or using")


def _name(node: Any) -> str:
    if kind(node) == "ColumnRef":
        return ".".join(getattr(part, "sval", "*") for part in node.fields)
    return "an expression"
