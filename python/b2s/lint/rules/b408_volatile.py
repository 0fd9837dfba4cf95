from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from b2s.lint.idioms import function_name, inserted_from_tables, looks_at_target
from b2s.lint.parser import walk
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule

_DRAWN: Final = frozenset(
    [
        "random",
        "gen_random_uuid",
        "uuid_generate_v1",
        "uuid_generate_v4",
        "uuidv4",
        "uuidv7",
        "nextval",
        "random_normal",
    ]
)


@rule(
    "B408",
    "volatile-value",
    "warning",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  delete from silver.orders t using bronze.orders o
   where o.id = t.order_id and o.ingested_at >= p_since and o.ingested_at < p_until;
  insert into silver.orders (id, order_id)
  select gen_random_uuid(), o.id from bronze.orders o where o.ingested_at >= p_since and o.ingested_at < p_until;
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
  insert into silver.orders (id, order_id)
  select gen_random_uuid(), o.id from bronze.orders o where o.ingested_at >= p_since and o.ingested_at < p_until
  on conflict (order_id) do nothing;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
""",
)
def volatile_value(step: Step, project: Project) -> Iterator[Hit]:
    """A written value is drawn anew each time: `random()`, `gen_random_uuid()`, `nextval()`.

    After a repeated run the row has another key, and whatever refers to it refers to nothing. Take a key
    from the data (a hash of the business key, `md5(...)`), let the table draw it and keep it with ON
    CONFLICT, or draw it only for rows that are not there yet: these forms are not reported.
    """
    for access in step.writes:
        if access.verb == "insert" and access.owner.onConflictClause is not None:
            continue
        if access.verb == "insert" and looks_at_target(step, access):
            continue
        if access.verb not in ("insert", "update") or not step.is_incremental(access.statement):
            continue
        if access.verb == "insert" and not inserted_from_tables(access.owner):
            continue
        for visit in walk(access.owner):
            if visit.kind == "FuncCall" and function_name(visit.node) in _DRAWN:
                shown = function_name(visit.node)
                yield Hit(
                    access.expr.offset_of(visit.node),
                    f"{shown}() gives {access.table} another value each run",
                )
