-- What a test of a routine's contract is made of: calls, and what the tables written hold after them.
--
-- MVCC is the scratch copy. Every variant (some calls, one after the other) runs in a subtransaction that is undone, so each
-- of them starts from the same rows, and nobody but this transaction ever sees one. What a variant found survives in variables.
--
-- contract, here and in the other files: {call_sql, rows_column, settings, mode, parameters, strategy, sources, since, until,
-- ignored, pieces, max_rows, tables, emptied}. A call is {"mode", "since", "until"}.

create or replace function etl._contract_call_of(contract jsonb, since text, until text) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('mode', contract->>'mode', 'since', since, 'until', until)
$$;
comment on function etl._contract_call_of(jsonb, text, text) is 'A call of the tested routine for one window.';
revoke all on function etl._contract_call_of(jsonb, text, text) from public;
grant execute on function etl._contract_call_of(jsonb, text, text) to etl_owner;

create or replace function etl._contract_show_window(since text, until text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select format('[%s, %s)', coalesce(since, 'the beginning'), until)
$$;
comment on function etl._contract_show_window(text, text) is 'A window as text.';
revoke all on function etl._contract_show_window(text, text) from public;
grant execute on function etl._contract_show_window(text, text) to etl_owner;

-- In a run the next call is another transaction: deferred constraints are checked, and deferred again. Those in schemas that
-- etl_owner may not use it may not name, and cannot have deferred.
create or replace function etl._contract_check_constraints() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_deferred text := (select string_agg(distinct format('%I.%I', n.nspname, k.conname), ', ')
                        from pg_catalog.pg_constraint k join pg_catalog.pg_namespace n on n.oid = k.connamespace
                       where k.condeferred and has_schema_privilege('etl_owner', n.oid, 'usage'));
begin
  set constraints all immediate;
  if v_deferred is not null then execute 'set constraints ' || v_deferred || ' deferred'; end if;
end $$;
comment on function etl._contract_check_constraints() is 'Checks deferred constraints now, as a commit would, and defers them again.';
revoke all on function etl._contract_check_constraints() from public;
grant execute on function etl._contract_check_constraints() to etl_owner;

-- And its temporary tables are gone.
create or replace function etl._contract_drop_temporary(kept oid[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_table text;
begin
  for v_table in
    select c.relname from pg_catalog.pg_class c
     where c.relnamespace = pg_my_temp_schema() and c.relkind in ('r', 'p') and not c.relispartition and c.oid <> all (kept)
  loop
    execute format('drop table if exists pg_temp.%I cascade', v_table);
  end loop;
end $$;
comment on function etl._contract_drop_temporary(oid[]) is 'Drops the temporary tables of this session but those to keep.';
revoke all on function etl._contract_drop_temporary(oid[]) from public;
grant execute on function etl._contract_drop_temporary(oid[]) to etl_owner;

create or replace function etl._contract_call(contract jsonb, call jsonb, out reported numeric, out counted bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_temporary oid[] := array(select c.oid from pg_catalog.pg_class c where c.relnamespace = pg_my_temp_schema());
  v_seen      bigint[] := etl._change_baseline();
  v_result    record;
begin
  if contract ? 'settings' then perform etl._apply_settings(contract->'settings'); end if;
  if contract ? 'rows_column' then
    execute contract->>'call_sql' into v_result
      using call->>'mode', call->>'since', call->>'until', (contract->>'run_id')::bigint, contract->'parameters';
    reported := (to_jsonb(v_result)->>(contract->>'rows_column'))::numeric;
  else
    execute contract->>'call_sql' using call->>'mode', call->>'since', call->>'until', (contract->>'run_id')::bigint, contract->'parameters';
  end if;
  perform set_config('search_path', 'pg_catalog, pg_temp', true);
  select coalesce(sum((t.value->>'inserted')::bigint + (t.value->>'updated')::bigint + (t.value->>'deleted')::bigint), 0)
    into counted from etl._count_changes(v_seen, v_seen) c, jsonb_each(c.changes) t;
  perform etl._contract_check_constraints(), etl._contract_drop_temporary(v_temporary);
end $$;
comment on function etl._contract_call(jsonb, jsonb) is
  'Calls the tested routine as a step would, in the caller''s subtransaction; the rows it reported and those it wrote.';
revoke all on function etl._contract_call(jsonb, jsonb) from public;
grant execute on function etl._contract_call(jsonb, jsonb) to etl_owner;

-- Partitions count as the table they belong to. Values that the table itself draws (identity, sequences) differ from call to call.
create or replace function etl._contract_tables(seen oid[], ignored jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(t.name, jsonb_build_object('skipped', k.skipped, 'key', k.key)), '{}')
    from (select distinct c.oid, format('%I.%I', n.nspname, c.relname) as name
            from unnest(etl._written_tables()) w(oid)
            join pg_catalog.pg_class c on c.oid = coalesce(pg_partition_root(w.oid), w.oid)
            join pg_catalog.pg_namespace n on n.oid = c.relnamespace
           where w.oid <> all (seen) and c.relkind in ('r', 'p') and c.relpersistence <> 't' and n.nspname <> 'etl') t
    cross join lateral (
      select coalesce(jsonb_agg(a.attname) filter (where a.attidentity <> '' or pg_get_expr(d.adbin, d.adrelid) like 'nextval(%'
                                                         or ignored ? a.attname or ignored ? (t.name || '.' || quote_ident(a.attname))), '[]') as skipped,
             coalesce(jsonb_agg(a.attname order by array_position(i.indkey::int2[], a.attnum)) filter (where a.attnum = any (i.indkey)), '[]') as key
        from pg_catalog.pg_attribute a
        left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        left join pg_catalog.pg_index i on i.indrelid = a.attrelid and i.indisprimary
       where a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped) k
$$;
comment on function etl._contract_tables(oid[], jsonb) is
  'The tables that this transaction has locked for writing since, by name: the columns not to compare, and the primary key.';
revoke all on function etl._contract_tables(oid[], jsonb) from public;
grant execute on function etl._contract_tables(oid[], jsonb) to etl_owner;

-- jsonb, because it knows when two values are equal: 1.0 and 1.00, whatever the type of the column.
create or replace function etl._contract_rows(tables jsonb) returns jsonb[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_table record;
  v_rows  jsonb[];
  v_all   jsonb[] := '{}';
begin
  for v_table in select t.key as name, etl._text_array(t.value->'skipped') as skipped, c.relkind
                   from jsonb_each(tables) t join pg_catalog.pg_class c on c.oid = etl._relation(t.key) order by t.key loop
    execute format('select array_agg(jsonb_build_object(''table'', $1, ''row'', to_jsonb(t) - $2)) from %s %s t',
                   case v_table.relkind when 'r' then 'only' end, v_table.name)
      into v_rows using v_table.name, v_table.skipped;
    v_all := v_all || v_rows;
  end loop;
  return v_all;
end $$;
comment on function etl._contract_rows(jsonb) is 'The rows of tables as they are now, without the columns that are not compared.';
revoke all on function etl._contract_rows(jsonb) from public;
grant execute on function etl._contract_rows(jsonb) to etl_owner;

-- A cancel request is not caught: it ends the test, and everything is undone.
create or replace function etl._contract_variant(
  contract jsonb, calls jsonb, prepare text default null, checks jsonb default null,
  out "rows" jsonb[], out tables jsonb, out reported numeric, out counted bigint, out failure jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_seen     oid[] := etl._written_tables();
  v_call     jsonb;
  v_is_over  boolean := false;
  v_sqlstate text; v_message text; v_detail text; v_hint text; v_context text;
begin
  begin
    if prepare is not null then execute prepare; end if;
    for v_call in select c from jsonb_array_elements(calls) c loop
      select c.reported, c.counted into reported, counted from etl._contract_call(contract, v_call) c;
    end loop;
    if checks is not null then perform etl._judge_checks(contract->>'name', etl._unmet_checks(checks)); end if;
    tables := etl._contract_tables(v_seen, contract->'ignored');
    "rows" := etl._contract_rows(contract->'tables');
    v_is_over := true;
    raise exception using errcode = 'PT200', message = 'variant over';
  exception when assert_failure or others then
    if v_is_over then return; end if;
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
      v_hint = pg_exception_hint, v_context = pg_exception_context;
  end;
  failure := etl._failure(v_sqlstate, v_message, v_detail, v_hint, v_context, null);
  failure := failure || jsonb_build_object(
    'message', concat_ws('; ', v_message, nullif(v_detail, ''),
      nullif(regexp_replace(v_context, '(^|\n)(SQL statement [^\n]*\n)?PL/pgSQL function etl\._(contract|unmet_checks|judge_checks).*$', ''), '')),
    'hint', case when failure->>'class' = 'transient' then 'another session works on the same rows: test again when no run is active'
                 else failure->>'hint' end);
end $$;
comment on function etl._contract_variant(jsonb, jsonb, text, jsonb) is
  'Makes calls in a subtransaction and undoes them: what the tables held in the end, which were written, the rows reported and written by the last call, or why it failed.';
revoke all on function etl._contract_variant(jsonb, jsonb, text, jsonb) from public;
grant execute on function etl._contract_variant(jsonb, jsonb, text, jsonb) to etl_owner;

-- Rows that one outcome has and the other one has not, as often as they are missing. Mostly both are the same in the same order.
create or replace function etl._contract_difference(contract jsonb, expected jsonb[], actual jsonb[], out "rows" jsonb, out summary text)
language sql immutable set search_path = pg_catalog, pg_temp as $$
  with differing as materialized (
    select q.entry, sum(q.n) as n
      from (select e as entry, -1 as n from unnest(expected) e union all select a, 1 from unnest(actual) a) q
     where expected is distinct from actual
     group by q.entry having sum(q.n) <> 0
  ), shown as (
    select jsonb_build_object('table', d.entry->>'table', 'change', case when d.n < 0 then '-' else '+' end, 'row', d.entry->'row') as line,
           row_number() over (order by d.entry->>'table', k.key, d.n, d.entry, r.i) as position
      from differing d cross join lateral generate_series(1, least(abs(d.n), 20)) r(i)
      cross join lateral (
        select jsonb_agg(d.entry->'row'->c order by o) as key
          from jsonb_array_elements_text(contract->'tables'->(d.entry->>'table')->'key') with ordinality x(c, o)) k
  )
  select (select jsonb_agg(s.line order by s.position) from shown s where s.position <= 20),
         (select string_agg(format('%s %s', t.name, t.changes), ', ' order by t.name)
            from (select d.entry->>'table' as name, concat_ws(' ', '-' || nullif(sum(-d.n) filter (where d.n < 0), 0),
                                                              '+' || nullif(sum(d.n) filter (where d.n > 0), 0)) as changes
                    from differing d group by 1) t)
$$;
comment on function etl._contract_difference(jsonb, jsonb[], jsonb[]) is
  'How two outcomes differ: up to 20 rows with - (expected only) or + (actual only), and the totals by table; null when they do not.';
revoke all on function etl._contract_difference(jsonb, jsonb[], jsonb[]) from public;
grant execute on function etl._contract_difference(jsonb, jsonb[], jsonb[]) to etl_owner;

create or replace function etl._contract_finding(
  check_name text, status text, detail text, remedy text default null, difference jsonb default null) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('check_name', check_name, 'status', status, 'detail', detail, 'remedy', remedy, 'difference', difference)
$$;
comment on function etl._contract_finding(text, text, text, text, jsonb) is 'One row of what etl.test_procedure returns.';
revoke all on function etl._contract_finding(text, text, text, text, jsonb) from public;
grant execute on function etl._contract_finding(text, text, text, text, jsonb) to etl_owner;

-- claim: what was to be proven; legend: what - and + stand for.
create or replace function etl._contract_compare(
  contract jsonb, check_name text, expected jsonb[], actual jsonb[], failure jsonb, claim text, legend text, remedy text) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_difference record;
begin
  if failure is not null then
    return etl._contract_finding(check_name, 'fail', format('%s: %s', legend, failure->>'message'), failure->>'hint');
  end if;
  v_difference := etl._contract_difference(contract, expected, actual);
  if v_difference.rows is null then return etl._contract_finding(check_name, 'ok', claim); end if;
  return etl._contract_finding(check_name, 'fail', format('%s: rows %s', legend, v_difference.summary), remedy, v_difference.rows);
end $$;
comment on function etl._contract_compare(jsonb, text, jsonb[], jsonb[], jsonb, text, text, text) is
  'The finding of a check that two outcomes are the same.';
revoke all on function etl._contract_compare(jsonb, text, jsonb[], jsonb[], jsonb, text, text, text) from public;
grant execute on function etl._contract_compare(jsonb, text, jsonb[], jsonb[], jsonb, text, text, text) to etl_owner;
