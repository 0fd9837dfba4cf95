from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from b2s.lint.parser import kind
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B504",
    "positional-columns",
    "warning",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders
  select * from bronze.orders o where o.ingested_at >= p_since and o.ingested_at < p_until
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
def positional_columns(step: Step, project: Project) -> Iterator[Hit]:
    """An INSERT says not which columns it fills, or takes `*` of a table.

    Values then go by position: a column added to Bronze, or in another order, puts amounts into dates or
    fails. List the columns on both sides. Temporary tables are left alone.
    """
    for access in step.writes:
        if access.verb != "insert" or access.owner.selectStmt is None:
            continue
        if not access.owner.cols:
            yield Hit(
                access.offset, f"insert into {access.table} without a list of columns", "name the columns"
            )
        else:
            star = _star(access.owner)
            if star is not None:
                yield Hit(access.expr.offset_of(star), f"{access.table} is filled from *", "name the columns")


def _star(insert: Any) -> Any:
    """The `*` over a table in the query of an INSERT; over a subquery or a WITH query it has named columns."""
    query = insert.selectStmt
    known = {cte.ctename for one in (insert, query) for cte in getattr(one.withClause, "ctes", None) or ()}
    tables = {
        (source.alias.aliasname if source.alias else source.relname)
        for source in query.fromClause or ()
        if kind(source) == "RangeVar" and (source.schemaname or source.relname not in known)
    }
    for target in query.targetList or ():
        fields: Any = getattr(target.val, "fields", None)
        if not fields or kind(fields[-1]) != "A_Star":
            continue
        if fields[-2].sval in tables if len(fields) > 1 else tables:
            return target.val
    return None
