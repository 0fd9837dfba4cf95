from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.project import Project, Step
from b2s.lint.rule import Example, Hit, rule

_SQL: Final = """\
create function silver.load_customers() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.customers (id) select distinct o.customer_id from %s o
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
"""
_PIPELINE: Final = """\
version: 1
procedures:
  - name: silver.customers
    routine: silver.load_customers
    type: dimension
    dependencies: [silver.orders]
    allow_fact_dependency: %s
  - {name: silver.orders, type: fact}
"""


@rule(
    "B303",
    "fact-in-dimension",
    "error",
    bad=Example(
        _SQL % "silver.orders",
        """\
version: 1
procedures:
  - {name: silver.customers, routine: silver.load_customers, type: dimension}
  - {name: silver.orders, type: fact}
""",
    ),
    good=Example(_SQL % "silver.orders", _PIPELINE % "true"),
)
def fact_in_dimension(step: Step, project: Project) -> Iterator[Hit]:
    """A dimension reads the table of a fact.

    Facts start after every selected dimension has ended, so a dimension that reads one reads the rows of
    the last run: each run is one behind. Take the rows from Bronze, make the dimension a fact, or declare
    the dependency together with `allow_fact_dependency: true`, which puts this fact first.
    """
    procedure = step.procedure
    if procedure is None or procedure.type != "dimension":
        return
    required = project.requirements(procedure.name) if procedure.allow_fact_dependency else set()
    for read in project.reads(step):
        writers = project.writers.get(project.table(read.access), [])
        facts = [name for name in writers if getattr(project.procedure(name), "type", "") == "fact"]
        if facts and procedure.name not in writers and facts[0] not in required:
            yield Hit(
                read.offset,
                f"dimension {procedure.name} reads {project.table(read.access)}{read.way}, the table of a fact",
            )
