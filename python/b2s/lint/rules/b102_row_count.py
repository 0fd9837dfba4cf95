from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.model import NUMBERS
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B102",
    "row-count",
    "info",
    bad="""\
create procedure silver.load_orders(inout p_rows bigint default null)
language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
end $$;
""",
    good="""\
create procedure silver.load_orders(inout p_rows bigint default null)
language plpgsql set search_path = '' as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
end $$;
""",
)
def row_count(step: Step, project: Project) -> Iterator[Hit]:
    """The routine does not say how many rows it wrote.

    b2s counts rows per table by itself, from the server's statistics. What the routine reports is the
    number that its author means: a returned number, or an INOUT or OUT argument that is assigned (`get
    diagnostics p_rows = row_count`).
    """
    routine = step.routine
    outputs = [one for one in routine.arguments if one.mode in "ob" and one.type in NUMBERS]
    if routine.kind == "function" and not outputs:
        if not routine.returns_set and (routine.returns or "void") not in NUMBERS:
            yield Hit(
                routine.offset,
                f"{routine.full_name} returns {routine.returns or 'nothing'}, no number of rows",
            )
        return
    if not outputs:
        yield Hit(routine.offset, f"{routine.full_name} has no INOUT or OUT argument for the number of rows")
        return
    is_assigned = any(one.name in routine.assignments for one in outputs)
    if routine.language == "plpgsql" and routine.is_readable and not is_assigned:
        yield Hit(outputs[0].offset, f"{outputs[0].name} is never assigned")
