from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B503",
    "unqualified-table",
    "warning",
    scope="routine",
    bad="""\
create function silver.count_orders() returns bigint language sql stable as $$
  select count(*) from orders
$$;
""",
    good="""\
create function silver.count_orders() returns bigint language sql stable as $$
  select count(*) from silver.orders
$$;
""",
)
def unqualified_table(step: Step, project: Project) -> Iterator[Hit]:
    """A table is named without its schema, and the routine does not set a search_path.

    Which table is meant depends on the session: in psql it may be another than in a run, where the
    search_path is what transformations.yaml says (`search_path:`, empty by default), and the step fails
    with "relation does not exist". Write the schema, set a search_path in the routine, or configure one for
    the pipeline.
    """
    if step.routine.search_path or step.routine.is_bound:
        return
    if step.is_step and project.config is not None and project.config.search_path:
        return
    said: set[str] = set()
    for access in step.accesses:
        if not access.schema and access.name not in said and access.name not in step.routine.variables:
            said.add(access.name)
            yield Hit(access.offset, f"{access.name} is named without its schema", "write schema.table")
