from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.model import Branch
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule

_BROAD: Final = frozenset(
    [
        "others",
        "deadlock_detected",
        "serialization_failure",
        "query_canceled",
        "lock_not_available",
        "transaction_rollback",
        "40001",
        "40p01",
        "57014",
        "55p03",
        "admin_shutdown",
    ]
)


@rule(
    "B202",
    "swallowed-error",
    "error",
    bad="""\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  return 1;
exception when others then
  raise notice 'load_orders failed: %', sqlerrm;
  return 0;
end $$;
""",
    good="""\
create function silver.load_orders() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  return 1;
exception when others then
  raise notice 'load_orders failed: %', sqlerrm;
  raise;
end $$;
""",
)
def swallowed_error(step: Step, project: Project) -> Iterator[Hit]:
    """A handler catches everything, or an error that b2s would retry, and does not raise it again.

    The step then counts as succeeded, its watermark moves on, and the rows that were not written are never
    read again. Also deadlocks, serialization failures and cancel requests end here, which b2s can only act
    upon when it sees them. Leave the handler out (b2s records error, context and hint), catch the one error
    that is meant, or end with `raise;`.
    """
    for statement in step.routine.all_statements:
        for branch in statement.branches:
            broad = [name for name in branch.errors if name in _BROAD]
            if branch.role == "handler" and broad and not _raises(branch):
                yield Hit(
                    branch.offset,
                    f"handler for {broad[0]} raises nothing",
                    "end it with raise; or leave it out",
                )


def _raises(branch: Branch) -> bool:
    return any(one.is_error for statement in branch.body for one in statement.nested())
