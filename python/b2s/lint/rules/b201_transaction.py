from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B201",
    "transaction-control",
    "error",
    bad="""\
create procedure silver.load_orders(inout p_rows bigint default null) language plpgsql as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
  commit;
end $$;
""",
    good="""\
create procedure silver.load_orders(inout p_rows bigint default null) language plpgsql as $$
begin
  insert into silver.orders (id) select o.id from bronze.orders o on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
end $$;
""",
)
def transaction_control(step: Step, project: Project) -> Iterator[Hit]:
    """A step commits or rolls back by itself.

    The transaction belongs to b2s: data, watermark, checks and outcome are one commit, or none of them is.
    A COMMIT inside would publish rows before their checks, and the server refuses it anyway (2D000). Leave
    it out; to read much data in several transactions, set `max_window`.
    """
    for statement in step.routine.all_statements:
        if statement.kind in ("commit", "rollback"):
            yield Hit(
                statement.offset,
                f"{statement.kind} inside a step",
                "leave it out: b2s commits the step as a whole",
            )
    for _, expr, visit in step.find("TransactionStmt"):
        yield Hit(expr.offset_of(visit.node), "transaction control inside a step", "leave it out")
