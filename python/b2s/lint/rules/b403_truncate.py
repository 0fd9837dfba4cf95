from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B403",
    "truncate",
    "error",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  truncate silver.orders;
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
def truncate(step: Step, project: Project) -> Iterator[Hit]:
    """An incremental run truncates or drops a table.

    Like a DELETE of all rows, with two more surprises: TRUNCATE and DROP wait for every reader and let none
    in until the commit, and a reader with an older snapshot then finds the table empty. In a full refresh
    it is yours to decide. Temporary tables are left alone, and so are routines without a window or a mode.
    """
    if not any(step.routine.argument(step.argument(name)) for name in ("p_since", "p_until", "p_mode")):
        return
    for access in step.writes:
        if access.verb in ("truncate", "drop") and step.is_incremental(access.statement):
            hint = "write it under if p_mode = 'full' then; delete keeps readers going"
            yield Hit(access.offset, f"{access.verb} of {access.table} in an incremental run", hint)
