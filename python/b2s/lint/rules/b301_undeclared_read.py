from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.project import Project, Step
from b2s.lint.rule import Example, Hit, rule

_ROUTINES: Final = """\
create function silver.load_customers() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.customers (id) select c.id from bronze.customers c on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
create function silver.load_orders() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.orders (id)
    select o.id from bronze.orders o join silver.customers c on c.id = o.customer_id
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
"""
_PIPELINE: Final = """\
version: 1
procedures:
  - {name: silver.customers, routine: silver.load_customers, type: dimension}
  - {name: silver.orders, routine: silver.load_orders, type: fact%s}
"""


@rule(
    "B301",
    "undeclared-read",
    "error",
    bad=Example(_ROUTINES, _PIPELINE % ""),
    good=Example(_ROUTINES, _PIPELINE % ", dependencies: [silver.customers]"),
)
def undeclared_read(step: Step, project: Project) -> Iterator[Hit]:
    """A step reads a table that another procedure writes, without depending on it.

    Nothing then puts the two in order: today the writer may happen to be first, and after a rename, a retry
    or with two workers it is not, and the step reads yesterday's rows. A failure of the writer does not
    hold the step back either. Declare the dependency; an indirect one counts. Tables that no procedure of
    the file writes are of no concern here. What is read by functions that the step calls counts as well,
    where they are among what is looked at; `b2s lineage --check` also sees views and text put together at
    run time.
    """
    if step.procedure is None:
        return
    own = step.procedure.name
    required = project.requirements(own)
    said: set[str] = set()
    for read in project.reads(step):
        table = project.table(read.access)
        writers = project.writers.get(table, [])
        if not writers or table in said or own in writers or required & set(writers):
            continue
        said.add(table)
        yield Hit(
            read.offset,
            f"{own} reads {table}{read.way}, which {writers[0]} writes, and does not depend on it",
            f"add to {own}: dependencies: [{writers[0]}]",
        )
