-- A declared check as the query that counts its violations. Names reach SQL only as identifiers that the server resolved.
create or replace function etl._compile_check(definition jsonb, out sql text, out problem text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_table   oid := etl._relation(definition->>'table');
  v_name    text := (select format('%I.%I', n.nspname, c.relname) from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = v_table);
  v_columns text[] := (select array_agg(c) from jsonb_array_elements_text(definition->'columns') c);
  v_missing text := (select string_agg(c, ', ') from unnest(v_columns) c where not exists (
    select from pg_catalog.pg_attribute a where a.attrelid = v_table and a.attname = c and a.attnum > 0 and not a.attisdropped));
  v_list    text := (select string_agg(quote_ident(c), ', ') from unnest(v_columns) c);
  v_routine record;
begin
  if definition->>'type' = 'routine' then
    v_routine := etl._resolve_routine(definition->>'routine');
    problem := v_routine.message;
    if problem is not null then return; end if;
    select case p.prorettype when 'bool'::regtype then format('select case when %I.%I() then 0 else 1 end', n.nspname, p.proname)
                             when 'int4'::regtype then format('select %I.%I()::bigint', n.nspname, p.proname)
                             when 'int8'::regtype then format('select %I.%I()', n.nspname, p.proname) end
      into sql
      from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
     where p.oid = v_routine.oid and p.prokind = 'f' and not p.proretset and p.pronargs = p.pronargdefaults;
    if sql is null then problem := format('%s must be a function without required arguments that returns boolean, integer or bigint', definition->>'routine'); end if;
    return;
  end if;
  if v_table is null then problem := format('table %s does not exist', definition->>'table'); return; end if;
  if v_missing is not null then problem := format('table %s has no column %s', v_name, v_missing); return; end if;
  if not (has_table_privilege('etl_owner', v_table, 'select')
          and has_schema_privilege('etl_owner', (select c.relnamespace from pg_catalog.pg_class c where c.oid = v_table), 'usage')) then problem := format('role etl_owner may not read %s', v_name); return; end if;
  sql := case definition->>'type'
    when 'not_null' then format('select count(*) from %s where %s', v_name, (select string_agg(format('%I is null', c), ' or ') from unnest(v_columns) c))
    when 'unique' then format('select count(*) from (select 1 from %s where %s group by %s having count(*) > 1) d', v_name,
                              (select string_agg(format('%I is not null', c), ' and ') from unnest(v_columns) c), v_list)
    when 'row_count' then format('select (count(*) not between %s and %s)::int from %s', coalesce((definition->>'min')::bigint, 0),
                                 coalesce((definition->>'max')::bigint, 9223372036854775807), v_name)
  end;
end $$;
comment on function etl._compile_check(jsonb) is 'The query that counts the violations of a declared check, or what is wrong with the declaration.';
revoke all on function etl._compile_check(jsonb) from public;
