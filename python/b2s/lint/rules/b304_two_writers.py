from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.project import Project, Step
from b2s.lint.rule import Example, Hit, rule

_SQL: Final = """\
create function silver.load_customers() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.customers (id) select c.id from bronze.customers c on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
create function silver.load_guests() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.%s (id) select g.id from bronze.guests g on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
"""
_PIPELINE: Final = """\
version: 1
procedures:
  - {name: silver.customers, routine: silver.load_customers, type: dimension}
  - {name: silver.guests, routine: silver.load_guests, type: dimension}
"""


@rule(
    "B304",
    "two-writers",
    "warning",
    bad=Example(_SQL % "customers", _PIPELINE),
    good=Example(_SQL % "guests", _PIPELINE),
)
def two_writers(step: Step, project: Project) -> Iterator[Hit]:
    """Two procedures write the same table.

    A full refresh of one deletes the rows of the other, nobody can say which run a row came from, and two
    workers wait for each other. One procedure per table; what comes from two sources is joined in one
    routine. A log that all of them append to is a case for `-- b2s: ignore[B304] shared log`.
    """
    if step.procedure is None:
        return
    own, said = step.procedure.name, set()
    for access in step.writes:
        table = project.table(access)
        writers = project.writers.get(table, [])
        if len(writers) < 2 or own == table or table in said or own not in writers:
            continue
        others = [name for name in writers if name != own]
        if own == writers[0] and table not in others:
            continue
        said.add(table)
        yield Hit(access.offset, f"{own} writes {table}, which {others[0]} writes too")
