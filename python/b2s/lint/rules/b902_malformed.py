from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B902",
    "malformed-suppression",
    "warning",
    scope="engine",
    bad="""\
create function silver.count_orders() returns bigint language sql stable as $$
  select count(*) from orders -- b2s: ignore[B503]
$$;
""",
    good="""\
create function silver.count_orders() returns bigint language sql stable as $$
  select count(*) from orders -- b2s: ignore[B503] one schema per tenant, chosen by the role
$$;
""",
)
def malformed_suppression(step: Step, project: Project) -> Iterator[Hit]:
    """A suppressing comment names no rule, names one that is not there, or gives no reason.

    The form is `-- b2s: ignore[B401] why`, behind the code or on a line of its own before it;
    `ignore-next[..]` for the next line of code, `ignore-file[..]` for the whole file; several codes with
    commas. The reason is for whoever reads it next.
    """
    raise NotImplementedError
