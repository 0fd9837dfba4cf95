from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B305",
    "writes-bronze",
    "error",
    bad="""\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  update bronze.orders set is_loaded = true where not is_loaded;
  return 1;
end $$;
""",
    good="""\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  return 1;
end $$;
""",
)
def writes_bronze(step: Step, project: Project) -> Iterator[Hit]:
    """A step writes a table of Bronze.

    Bronze is what came from outside, and the only thing from which Silver can be built again. A flag such
    as `is_loaded` in it is a second watermark that a rollback, a backfill and a full refresh do not know
    of. Let b2s keep the watermark. Which schemas are Bronze: `lint: {bronze: [bronze]}` in
    transformations.yaml.
    """
    for access in step.writes:
        if access.schema in project.bronze:
            yield Hit(access.offset, f"{access.verb} of {access.table}: Bronze is only read")
