from __future__ import annotations

from collections.abc import Iterator

from b2s.lint.idioms import inserted_from_tables, is_repeatable
from b2s.lint.project import Project, Step
from b2s.lint.rule import Hit, rule


@rule(
    "B401",
    "plain-insert",
    "error",
    bad="""\
create function silver.load_orders(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint
language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  insert into silver.orders (id, amount)
  select o.id, o.amount from bronze.orders o
   where (p_since is null or o.ingested_at >= p_since) and o.ingested_at < p_until;
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
def plain_insert(step: Step, project: Project) -> Iterator[Hit]:
    """An incremental run inserts rows in a way that doubles them when it is repeated.

    Runs are repeated: a retry, a backfill, a reset watermark, a row of Bronze that is delivered twice. The
    INSERT has no ON CONFLICT, does not look at what its target holds already (NOT EXISTS, LEFT JOIN,
    EXCEPT), and no earlier DELETE makes room for it. Only what an incremental run can reach counts: an
    INSERT under `if p_mode = 'full'` is none of it. VALUES lists, which log something, are left alone, and
    so are temporary tables.
    """
    for access in step.writes:
        if access.verb != "insert" or not step.is_incremental(access.statement):
            continue
        if inserted_from_tables(access.owner) and not is_repeatable(step, access):
            yield Hit(
                access.offset,
                f"plain insert into {access.table}: a repeated run doubles the rows",
                "add on conflict (key) do update, or delete the same rows before",
            )
