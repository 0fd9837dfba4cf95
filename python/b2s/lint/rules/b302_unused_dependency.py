from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.project import Project, Step
from b2s.lint.rule import Example, Hit, rule

_PIPELINE: Final = """\
version: 1
procedures:
  - {name: silver.regions, routine: silver.load_regions, type: dimension}
  - {name: silver.customers, routine: silver.load_customers, type: dimension%s}
"""
_ROUTINES: Final = """\
create function silver.load_regions() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.regions (id) select c.id from bronze.regions c on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
create function silver.load_customers() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.customers (id) select c.id from bronze.customers c on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
"""


@rule(
    "B302",
    "unused-dependency",
    "off",
    bad=Example(_ROUTINES, _PIPELINE % ", dependencies: [silver.regions]"),
    good=Example(_ROUTINES, _PIPELINE % ""),
)
def unused_dependency(step: Step, project: Project) -> Iterator[Hit]:
    """A dependency is declared, and nothing that it writes is read.

    It may be left over, and then it delays the step and skips it for no reason. It may also be meant: an
    order is worth having for foreign keys alone. So this rule is off unless it is selected (`--select
    B302`) or given a severity. Steps that execute text known at run time only, that call other routines
    which are not here, and dependencies of a fact on a dimension are left alone.
    """
    procedure = step.procedure
    if procedure is None or step.has_opaque_text or not step.routine.is_readable:
        return
    read = {project.table(one.access) for one in project.reads(step)}
    for name in procedure.dependencies:
        other, needed = project.configured.get(name), project.procedure(name)
        if other is None or needed is None or (procedure.type == "fact" and needed.type == "dimension"):
            continue
        if not read & {project.table(access) for access in other.writes}:
            yield Hit(
                step.routine.offset, f"{procedure.name} depends on {name} and reads nothing that it writes"
            )
