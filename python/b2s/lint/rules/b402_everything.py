from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B402",
    "unfiltered-change",
    "error",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  delete from silver.orders;
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o
   where (p_since is null or o.ingested_at >= p_since) and o.ingested_at < p_until
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
  if p_mode = 'full' then
    delete from silver.orders;
  end if;
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o
   where (p_since is null or o.ingested_at >= p_since) and o.ingested_at < p_until
  on conflict (id) do update set amount = excluded.amount;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
""",
)
def unfiltered_change(step: Step, project: Project) -> Iterator[Hit]:
    """An incremental run deletes or updates a whole table: the statement has no WHERE.

    What follows fills the window only, so a DELETE without WHERE loses everything older; an UPDATE without
    WHERE writes every row anew, each time. Put it under `if p_mode = 'full'`, or say which rows are meant.
    A routine that has no window, and takes all rows each time, may delete all of them before.
    """
    if not any(step.routine.argument(step.argument(name)) for name in ("p_since", "p_until", "p_mode")):
        return
    for access in step.writes:
        if access.verb not in ("delete", "update") or access.owner.whereClause is not None:
            continue
        if access.verb == "update" and access.owner.fromClause:
            continue
        if access.verb == "delete" and access.owner.usingClause:
            continue
        if step.is_incremental(access.statement):
            hint = "write it under if p_mode = 'full' then, or add a where"
            yield Hit(
                access.offset, f"{access.verb} of all rows of {access.table} in an incremental run", hint
            )
