from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B001",
    "unreadable",
    "error",
    scope="engine",
    bad="""\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  retrun 1;
end $$;
""",
    good="""\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  return 1;
end $$;
""",
)
def unreadable(step: Step, project: Project) -> Iterator[Hit]:
    """A statement or the body of a routine cannot be parsed, so nothing else can be said about it.

    The grammar is that of PostgreSQL 18, PL/pgSQL included: what is found here fails on every server,
    though a body is looked at by a server only when `check_function_bodies` is on. Each statement of a file
    is parsed on its own, so one that is wrong hides no other.
    """
    raise NotImplementedError
