from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from b2s.lint.idioms import is_name
from b2s.lint.model import Expr
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B406",
    "closed-window",
    "error",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o where o.ingested_at between p_since and p_until
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
def closed_window(step: Step, project: Project) -> Iterator[Hit]:
    """The window is read with the wrong ends: `between`, `<= p_until` or `> p_since`.

    A window is half open, `[p_since, p_until)`: a row at `p_until` belongs to the next one. With `<=` it is
    read twice; with `> p_since` the row that sits exactly on the border is never read, by any run. Write `x
    >= p_since and x < p_until`.
    """
    since, until = step.argument("p_since"), step.argument("p_until")
    for _, expr, visit in step.find("A_Expr"):
        node = visit.node
        how = node.kind.name
        if how in ("AEXPR_BETWEEN", "AEXPR_BETWEEN_SYM") and isinstance(node.rexpr, tuple | list):
            if is_name(node.rexpr[0], since) or is_name(node.rexpr[1], until):
                yield _hit(expr, node, f"between takes the row at {until} twice", since, until)
        elif how == "AEXPR_OP" and node.lexpr is not None:
            operator, left, right = node.name[-1].sval, node.lexpr, node.rexpr
            if operator in ("<", "<="):
                operator, left, right = {"<": ">", "<=": ">="}[operator], right, left
            if operator == ">=" and is_name(left, until):
                yield _hit(expr, node, f"the row at {until} is read by two windows", since, until)
            elif operator == ">" and is_name(right, since) and not is_name(left, until):
                yield _hit(expr, node, f"the row at {since} is read by no window", since, until)


def _hit(expr: Expr, node: Any, message: str, since: str, until: str) -> Hit:
    return Hit(expr.offset_of(node), message, f"write x >= {since} and x < {until}")
