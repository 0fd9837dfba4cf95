-- The rest of the checks of etl.test_procedure, and all of them in order.

-- A statement that gives the source one row without a value: a copy of its newest one, or that one itself.
create or replace function etl._contract_null_row(source jsonb, is_copy boolean) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case when is_copy
    then format('insert into %1$s (%2$s) select %3$s from %1$s order by %4$s desc nulls last limit 1', source->>'relation',
                string_agg(quote_ident(a.attname), ', ' order by a.attnum),
                string_agg(case when quote_ident(a.attname) = source->>'column' then 'null' else quote_ident(a.attname) end, ', ' order by a.attnum), source->>'column')
    else format('update %1$s set %2$s = null where ctid = (select ctid from %1$s order by %2$s desc nulls last limit 1)', source->>'relation', source->>'column') end
    from pg_catalog.pg_attribute a left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
   where a.attrelid = etl._relation(source->>'relation') and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' and a.attidentity = ''
     and (quote_ident(a.attname) = source->>'column' or pg_get_expr(d.adbin, d.adrelid) is null or pg_get_expr(d.adbin, d.adrelid) not like 'nextval(%')
$$;
comment on function etl._contract_null_row(jsonb, boolean) is 'The statement that gives a source a row whose watermark column is null.';
revoke all on function etl._contract_null_row(jsonb, boolean) from public;
grant execute on function etl._contract_null_row(jsonb, boolean) to etl_owner;

-- is_split: whether the window gives the same in pieces; if not, one row more proves nothing about pieces.
create or replace function etl._contract_nulls(contract jsonb, source jsonb, expected jsonb[], is_split boolean) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_count   bigint;
  v_remedy  text := format('alter table %s alter column %s set not null', source->>'relation', source->>'column');
  v_prepare text := etl._contract_null_row(source, true);
  v_trial   record;
  v_one     record;
  v_pieces  record;
begin
  if not (source->>'is_nullable')::boolean then return etl._contract_finding('nulls', 'ok', format('%s is not null', source->>'name')); end if;
  execute format('select count(*) from %s where %s is null', source->>'relation', source->>'column') into v_count;
  if v_count > 0 then
    return etl._contract_finding('nulls', 'warn', format('%s row(s) of %s have no %s: no window holds them', v_count, source->>'relation', source->>'column'),
      'fill them, then: ' || v_remedy);
  end if;
  v_trial := etl._contract_variant(contract, '[]', v_prepare);
  if v_trial.failure is not null then
    v_prepare := etl._contract_null_row(source, false);
    if (etl._contract_variant(contract, '[]', v_prepare)).failure is not null then
      return etl._contract_finding('nulls', 'skipped', format('%s has no null now, and none can be put there: %s', source->>'name', v_trial.failure->>'message'),
        'rule it out: ' || v_remedy);
    end if;
  end if;
  v_one := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until')), v_prepare);
  v_pieces := etl._contract_variant(contract, etl._contract_pieces(contract), v_prepare);
  return etl._contract_compare(contract, 'nulls', v_one.rows, case when is_split then v_pieces.rows else v_one.rows end, coalesce(v_one.failure, v_pieces.failure),
    format('%s has no null now; one would %s', source->>'name',
           case when v_trial.failure is not null then 'do no harm'
                when (etl._contract_difference(contract, expected, v_one.rows)).rows is null then 'be read by no window' else 'be read' end),
    format('a row with null in %s, in one piece (-) and in pieces (+)', source->>'name'), format('rule it out: %s; or leave such rows out', v_remedy));
end $$;
comment on function etl._contract_nulls(jsonb, jsonb, jsonb[], boolean) is 'What becomes of rows that have no value in a watermark column.';
revoke all on function etl._contract_nulls(jsonb, jsonb, jsonb[], boolean) from public;
grant execute on function etl._contract_nulls(jsonb, jsonb, jsonb[], boolean) to etl_owner;

create or replace function etl._contract_rows_reported(contract jsonb, reported numeric, counted bigint) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when not contract ? 'rows_column' then etl._contract_finding('rows_reported', 'ok', format('it reports no number: b2s counts what it writes, %s here', counted))
    when reported is null then etl._contract_finding('rows_reported', 'warn', format('it returned null; it wrote %s', counted),
      'get diagnostics n = row_count after the last statement that writes, and return n')
    when reported < 0 then etl._contract_finding('rows_reported', 'warn', format('it returned %s; it wrote %s', reported, counted), 'return the number of rows written, 0 for none')
    else etl._contract_finding('rows_reported', 'ok', format('it returned %s; it wrote %s', reported, counted)) end
$$;
comment on function etl._contract_rows_reported(jsonb, numeric, bigint) is 'Whether the number of rows that the routine returns can be one.';
revoke all on function etl._contract_rows_reported(jsonb, numeric, bigint) from public;
grant execute on function etl._contract_rows_reported(jsonb, numeric, bigint) to etl_owner;

-- After the window, one that ends where it begins, at a row if there is one.
create or replace function etl._contract_empty_window(contract jsonb, expected jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_at    text := coalesce(contract->'cuts'->>0, contract->>'until');
  v_after record := etl._contract_variant(contract, jsonb_build_array(
    etl._contract_call_of(contract, contract->>'since', contract->>'until'), etl._contract_call_of(contract, v_at, v_at)));
begin
  return etl._contract_compare(contract, 'empty_window', expected, v_after.rows, v_after.failure, 'a window that holds nothing changes nothing',
    format('before (-) and after (+) the empty window [%s, %s)', v_at, v_at), format('read %s', etl._contract_condition(contract, null, contract#>>'{sources,0,column}')));
end $$;
comment on function etl._contract_empty_window(jsonb, jsonb[]) is 'Whether a window that ends where it begins changes nothing.';
revoke all on function etl._contract_empty_window(jsonb, jsonb[]) from public;
grant execute on function etl._contract_empty_window(jsonb, jsonb[]) to etl_owner;

-- On the tables as they are: what it leaves of the old rows it must leave twice. It may write others than a window does.
create or replace function etl._contract_full(contract jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_call  jsonb := etl._contract_call_of(contract || '{"mode": "full"}', null, contract->>'until');
  v_large text := (select string_agg(s->>'relation', ', ') from jsonb_array_elements(contract->'sources') s
                    where etl._contract_has_more(s->>'relation', (contract->>'max_rows')::int));
  v_once  record;
  v_twice record;
begin
  if v_large is not null then
    return etl._contract_finding('full', 'skipped', format('%s holds more than %s rows', v_large, contract->>'max_rows'), 'allow more (max_rows, --max-rows)');
  end if;
  v_once := etl._contract_variant(contract, jsonb_build_array(v_call));
  if v_once.tables - array(select jsonb_object_keys(contract->'tables')) <> '{}' then
    contract := contract || jsonb_build_object('tables', v_once.tables || (contract->'tables'));
    perform etl._contract_check_tables(contract);
    v_once := etl._contract_variant(contract, jsonb_build_array(v_call));
  end if;
  v_twice := etl._contract_variant(contract, jsonb_build_array(v_call, v_call));
  return etl._contract_compare(contract, 'full', v_once.rows, v_twice.rows, coalesce(v_once.failure, v_twice.failure),
    'a full refresh twice is a full refresh once', 'a full refresh once (-) and twice (+)', 'delete the old rows first when p_mode is ''full''');
end $$;
comment on function etl._contract_full(jsonb) is 'Whether a full refresh can be repeated.';
revoke all on function etl._contract_full(jsonb) from public;
grant execute on function etl._contract_full(jsonb) to etl_owner;

-- All checks that compare with a run of the window, on emptied tables; these are as before afterwards. contract comes back with the
-- columns that turned out not to be deterministic.
create or replace function etl._contract_findings(inout contract jsonb, out findings jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_basis    record;
  v_source   jsonb;
  v_is_split boolean;
  v_is_over  boolean := false;
begin
  if contract->'emptied' <> '[]' then perform etl._contract_empty(etl._text_array(contract->'emptied')); end if;
  v_basis := etl._contract_deterministic(contract);
  contract := v_basis.contract;
  findings := jsonb_build_array(v_basis.finding, etl._contract_idempotent(contract, v_basis.expected));
  if contract ? 'strategy' then
    findings := findings || etl._contract_splits(contract, v_basis.expected);
    v_is_split := findings->-1->>'status' <> 'fail';
    for v_source in select s from jsonb_array_elements(contract->'sources') s loop
      findings := findings || etl._contract_boundary(contract, v_source) || etl._contract_nulls(contract, v_source, v_basis.expected, v_is_split);
    end loop;
    findings := findings || etl._contract_empty_window(contract, v_basis.expected);
  end if;
  v_is_over := true;
  raise exception using errcode = 'PT200', message = 'checks over';
exception when sqlstate 'PT200' then
  if not v_is_over then raise; end if;
end $$;
comment on function etl._contract_findings(jsonb) is 'Makes all checks that compare with a run of the window, and undoes everything.';
revoke all on function etl._contract_findings(jsonb) from public;
grant execute on function etl._contract_findings(jsonb) to etl_owner;

create or replace function etl._contract_runs(contract jsonb, counted bigint) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select etl._contract_finding('runs', case when contract->'tables' = '{}' or contract->>'row_count' = '0' or v.is_idle then 'warn' else 'ok' end,
    concat_ws('; ', case when contract ? 'strategy' then 'window ' || etl._contract_show_window(contract->>'since', contract->>'until')
                         || coalesce(format(' of %s row(s) in its sources', contract->>'row_count'), '') else 'no window' end,
      case when contract->'tables' = '{}' then 'it wrote to no table'
           else format('wrote %s row(s) in %s', counted, (select string_agg(k, ', ' order by k) from jsonb_object_keys(contract->'tables') k)) end,
      'emptied for the checks that follow: ' || nullif((select string_agg(e, ', ' order by e) from jsonb_array_elements_text(contract->'emptied') e), '')),
    case when contract->'tables' = '{}' or contract->>'row_count' = '0' or v.is_idle
           then 'little is proven by that: put rows into its sources' || case when contract ? 'strategy' then ', or name another window' else '' end end)
    from (select counted = 0 and contract->'emptied' = '[]' as is_idle) v
$$;
comment on function etl._contract_runs(jsonb, bigint) is 'The first finding of a test: what was run on which window.';
revoke all on function etl._contract_runs(jsonb, bigint) from public;
grant execute on function etl._contract_runs(jsonb, bigint) to etl_owner;
