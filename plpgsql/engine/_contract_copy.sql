-- The scratch copy of a test: the tables a routine writes, emptied where that is possible. Over rows that are loaded already most
-- mistakes leave no trace: a row that is left out is there all the same.

create or replace function etl._contract_has_more(name text, max_rows int) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_has_more boolean;
begin
  execute format('select count(*) > $1 from (select from %s limit $1::bigint + 1) q', name) into v_has_more using max_rows;
  return v_has_more;
end $$;
comment on function etl._contract_has_more(text, int) is 'Whether a table has more than so many rows.';
revoke all on function etl._contract_has_more(text, int) from public;
grant execute on function etl._contract_has_more(text, int) to etl_owner;

-- The deletes hold row locks of production, and every comparison reads the tables whole: a limit keeps both short.
create or replace function etl._contract_check_tables(contract jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_max    int := (contract->>'max_rows')::int;
  v_hidden text := (select string_agg(t.name, ', ' order by t.name) from jsonb_object_keys(contract->'tables') t(name)
                     where etl._relation(t.name) is not null and not has_table_privilege('etl_owner', etl._relation(t.name), 'select'));
  v_large  text;
begin
  if v_hidden is not null then
    perform etl._fail('PT403', 'test.not_readable', format('role etl_owner writes %s but may not read what it wrote', v_hidden),
      format('grant select on %s to etl_owner', v_hidden));
  end if;
  v_large := (select string_agg(t.name, ', ' order by t.name) from jsonb_object_keys(contract->'tables') t(name)
               where etl._relation(t.name) is not null and etl._contract_has_more(t.name, v_max));
  if v_large is null and (contract->>'row_count')::bigint > v_max then v_large := 'the window ' || etl._contract_show_window(contract->>'since', contract->>'until'); end if;
  if v_large is not null then
    perform etl._fail('PT422', 'test.too_large', format('%s holds more than %s rows, too many to compare', v_large, v_max),
      'test in a smaller copy of the database, name a smaller window, or allow more (max_rows, --max-rows)', jsonb_build_object('max_rows', v_max));
  end if;
end $$;
comment on function etl._contract_check_tables(jsonb) is
  'Raises PT403 test.not_readable, and PT422 test.too_large when a tested table or window holds too many rows.';
revoke all on function etl._contract_check_tables(jsonb) from public;
grant execute on function etl._contract_check_tables(jsonb) to etl_owner;

-- A table can be emptied together with the tables that refer to it. Sources never are.
create or replace function etl._contract_emptiable(contract jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with recursive needed(root, relid) as (
    select t.name, etl._relation(t.name) from jsonb_object_keys(contract->'tables') t(name) where etl._relation(t.name) is not null
    union
    select n.root, k.conrelid from needed n join pg_catalog.pg_constraint k on k.contype = 'f' and k.confrelid = n.relid and k.conparentid = 0
  )
  select coalesce(jsonb_object_agg(q.root, q.names), '{}')
    from (select n.root, jsonb_agg(format('%I.%I', s.nspname, c.relname)) as names
            from needed n join pg_catalog.pg_class c on c.oid = n.relid join pg_catalog.pg_namespace s on s.oid = c.relnamespace
           group by n.root
          having bool_and(has_schema_privilege('etl_owner', s.oid, 'usage') and has_table_privilege('etl_owner', c.oid, 'select')
                          and has_table_privilege('etl_owner', c.oid, 'delete')
                          and not contract->'sources' @> jsonb_build_array(jsonb_build_object('relation', format('%I.%I', s.nspname, c.relname))))) q
   where not exists (select from jsonb_array_elements_text(q.names) x(name) where etl._contract_has_more(x.name, (contract->>'max_rows')::int))
$$;
comment on function etl._contract_emptiable(jsonb) is 'The tables that a test may empty, each with all that must be emptied with it.';
revoke all on function etl._contract_emptiable(jsonb) from public;
grant execute on function etl._contract_emptiable(jsonb) to etl_owner;

-- In whichever order foreign keys allow.
create or replace function etl._contract_empty(names text[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
  v_left text[];
begin
  foreach v_name in array names loop
    begin
      execute format('delete from %s', v_name);
    exception when foreign_key_violation then
      v_left := v_left || v_name;
      if v_left = names then raise; end if;
    end;
  end loop;
  if v_left is not null then perform etl._contract_empty(v_left); end if;
  perform etl._contract_check_constraints();
end $$;
comment on function etl._contract_empty(text[]) is 'Deletes the rows of tables, referring ones first.';
revoke all on function etl._contract_empty(text[]) from public;
grant execute on function etl._contract_empty(text[]) to etl_owner;

-- A table that stays empty is one whose rows the routine only changes: it must keep them. When the routine fails on empty tables,
-- it is tested on the tables as they are.
create or replace function etl._contract_emptied(contract jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables jsonb := etl._contract_emptiable(contract);
  v_names  jsonb;
  v_once   record;
  v_idle   text[];
begin
  while v_tables <> '{}' loop
    v_names := (select jsonb_agg(distinct n) from jsonb_each(v_tables) t, jsonb_array_elements_text(t.value) n);
    v_once := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until')),
                                    format('select etl._contract_empty(etl._text_array(%L))', v_names));
    if v_once.failure is not null then return '[]'; end if;
    v_idle := array(select k from jsonb_object_keys(v_tables) k where k not in (select r->>'table' from unnest(v_once.rows) r));
    if v_idle = '{}' then return v_names; end if;
    v_tables := v_tables - v_idle;
  end loop;
  return '[]';
end $$;
comment on function etl._contract_emptied(jsonb) is 'The tables that a test empties before it compares.';
revoke all on function etl._contract_emptied(jsonb) from public;
grant execute on function etl._contract_emptied(jsonb) to etl_owner;
