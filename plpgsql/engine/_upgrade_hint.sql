-- Which procedures could read with the strongest strategy, and what to type.

-- The columns by which a procedure tells new rows, with what the catalog says of their tables. None for a query.
create or replace function etl._watermark_columns(procedure etl.procedures)
returns table (source text, relation oid, table_name text, relkind "char", is_partition boolean, column_name text, attnum smallint, type text,
  is_nullable boolean)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if procedure.watermark_sources is null or etl._is_query(procedure.watermark_sources) then return; end if;
  return query
    select s.source, c.oid, format('%I.%I', n.nspname, c.relname), c.relkind, c.relispartition, a.attname::text, a.attnum,
           format_type(a.atttypid, null), not a.attnotnull
      from unnest(procedure.watermark_sources) s(source)
      cross join lateral parse_ident(s.source) i(parts)
      join pg_catalog.pg_namespace n on n.nspname = i.parts[1]
      join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = i.parts[2]
      join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attname = i.parts[3] and a.attnum > 0 and not a.attisdropped;
end $$;
comment on function etl._watermark_columns(etl.procedures) is 'The watermark columns of a procedure that exist, with their tables.';
revoke all on function etl._watermark_columns(etl.procedures) from public;

create or replace function etl._upgrade_hint(procedure etl.procedures) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'could use xid: '
      || coalesce(string_agg(distinct format('b2s watermark add-column %s', c.table_name), '; ') filter (where x.attnum is null),
                  'strategy: xid, source: ' || string_agg(distinct c.table_name || '.etl_xid', ', '))
    from etl._watermark_columns(procedure) c
    left join pg_catalog.pg_attribute x on x.attrelid = c.relation and x.attname = 'etl_xid' and not x.attisdropped and x.atttypid = 'xid8'::regtype
   where procedure.watermark_strategy in ('timestamp', 'id')
  having bool_and(c.relkind in ('r', 'p') and not c.is_partition) and count(distinct c.source) = (select count(distinct s) from unnest(procedure.watermark_sources) s)
$$;
comment on function etl._upgrade_hint(etl.procedures) is
  'How a procedure that reads timestamps or ids of plain tables could read transactions instead, or null: it does already, or cannot.';
revoke all on function etl._upgrade_hint(etl.procedures) from public;
