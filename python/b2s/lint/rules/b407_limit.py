from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from b2s.lint.model import Stmt
from b2s.lint.parser import kind
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B407",
    "unordered-limit",
    "warning",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o where o.ingested_at >= p_since and o.ingested_at < p_until limit 1000
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
   order by o.id limit 1000
  on conflict (id) do update set amount = excluded.amount;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
""",
)
def unordered_limit(step: Step, project: Project) -> Iterator[Hit]:
    """LIMIT without ORDER BY: which rows are taken is up to the plan.

    Two runs over the same rows give two results, and a step that takes the first thousand of a window
    leaves the others to nobody, because the watermark moves over all of them. To read in portions, set
    `max_window`. Probes for existence (EXISTS, a constant target list, one row into a variable) are not
    reported.
    """
    for statement, expr, visit in step.find("SelectStmt"):
        node = visit.node
        if node.limitCount is None or node.sortClause or not node.fromClause or _is_all(node.limitCount):
            continue
        if any(parent == "SubLink" for parent, _ in visit.path()) and _is_one(node.limitCount):
            continue
        if all(kind(target.val) == "A_Const" for target in node.targetList or ()):
            continue
        if visit.parent is None and statement is not None and _is_probe(statement, node):
            continue
        yield Hit(
            expr.offset_of(node.limitCount),
            "limit without order by takes any rows",
            "add order by, or use max_window",
        )


def _is_probe(statement: Stmt, node: Any) -> bool:
    is_into = statement.kind == "execsql" and bool(statement.targets)
    return statement.kind == "perform" or (is_into and _is_one(node.limitCount))


def _is_all(node: Any) -> bool:
    return kind(node) == "A_Const" and bool(node.isnull)


def _is_one(node: Any) -> bool:
    return kind(node) == "A_Const" and getattr(node.val, "ival", None) == 1
