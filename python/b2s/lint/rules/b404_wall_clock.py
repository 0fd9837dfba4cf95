from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.idioms import clocks, in_predicate
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B404",
    "wall-clock",
    "warning",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o
   where o.ingested_at >= now() - interval '1 day' and o.ingested_at < p_until and o.ingested_at >= p_since
  on conflict (id) do update set amount = excluded.amount;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
""",
    good="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders (id, amount, loaded_at)
  select o.id, o.amount, now() from bronze.orders o
   where o.ingested_at < p_until and o.ingested_at >= p_since
  on conflict (id) do update set amount = excluded.amount;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
""",
)
def wall_clock(step: Step, project: Project) -> Iterator[Hit]:
    """Which rows are taken depends on the time of day.

    A run that is repeated tomorrow, a backfill and a test then read other rows than the first run did.
    Compare with `p_since` and `p_until`, or with a value that the rows carry. In a target list (`loaded_at
    = now()`) the clock does no harm and is not reported.
    """
    for _, expr in step.routine.exprs:
        for visit, shown in clocks(expr):
            if in_predicate(visit):
                yield Hit(
                    expr.offset_of(visit.node),
                    f"{shown} decides which rows are taken",
                    "use p_since and p_until",
                )
