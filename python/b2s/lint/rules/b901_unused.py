from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B901",
    "unused-suppression",
    "warning",
    scope="engine",
    bad="""\
create function silver.count_orders() returns bigint language sql stable as $$
  select count(*) from silver.orders -- b2s: ignore[B503] the schema is known
$$;
""",
    good="""\
create function silver.count_orders() returns bigint language sql stable as $$
  select count(*) from orders -- b2s: ignore[B503] one schema per tenant, chosen by the role
$$;
""",
)
def unused_suppression(step: Step, project: Project) -> Iterator[Hit]:
    """A comment suppresses a finding that is not there.

    The code has been repaired, or the comment stands at the wrong line; either way it would hide the next
    finding. Remove it. Codes that are not looked at this time (`--select`, `--ignore`, `off`) are not
    reported.
    """
    raise NotImplementedError
