from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B405",
    "unused-window",
    "warning",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders (id, amount) select o.id, o.amount from bronze.orders o
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
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o
   where (p_since is null or o.ingested_at >= p_since) and o.ingested_at < p_until
  on conflict (id) do update set amount = excluded.amount;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
""",
)
def unused_window(step: Step, project: Project) -> Iterator[Hit]:
    """A watermark is configured, or a window is declared, and the routine does not use it.

    It then reads everything each time, while the watermark moves on as if it did not; and the day somebody
    relies upon the watermark, it has said nothing true. Use `p_since` and `p_until` in the WHERE, or take
    the watermark and the arguments away.
    """
    routine = step.routine
    if not routine.is_readable or step.has_opaque_text:
        return
    is_watermarked = step.procedure is not None and step.procedure.watermark is not None
    for contract in ("p_since", "p_until"):
        name = step.argument(contract)
        argument = routine.argument(name)
        if argument is None:
            if is_watermarked:
                yield Hit(
                    routine.offset, f"a watermark is configured, and {routine.full_name} takes no {name}"
                )
        elif not step.uses(name):
            yield Hit(argument.offset, f"{name} is never used", "add it to the where of what reads Bronze")
