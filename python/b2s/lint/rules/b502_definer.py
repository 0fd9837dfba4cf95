from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B502",
    "definer-search-path",
    "error",
    scope="routine",
    bad="""\
create function silver.count_orders() returns bigint language sql stable security definer as $$
  select count(*) from silver.orders
$$;
""",
    good="""\
create function silver.count_orders() returns bigint language sql stable security definer set search_path = '' as $$
  select count(*) from silver.orders
$$;
""",
)
def definer_search_path(step: Step, project: Project) -> Iterator[Hit]:
    """A SECURITY DEFINER routine does not set its search_path.

    It looks names up where its caller says, and runs what it finds there with the rights of its owner: an
    operator named `=` in a schema of the caller is enough. Add `set search_path = ''` and qualify every
    name, or `set search_path = pg_catalog, pg_temp`. A body that is parsed at creation (`begin atomic`) is
    bound to what it means already.
    """
    routine = step.routine
    if routine.language in ("c", "internal"):
        return
    if routine.is_definer and routine.search_path is None and not routine.is_bound:
        yield Hit(
            routine.offset,
            f"{routine.full_name} is security definer and sets no search_path",
            "add set search_path = ''",
        )
