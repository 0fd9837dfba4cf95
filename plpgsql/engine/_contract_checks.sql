-- The checks of etl.test_procedure, one function each: it makes variants and says what their comparison proves.

-- Columns whose values differ although nothing was different.
create or replace function etl._contract_volatile(first jsonb[], second jsonb[]) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  with differing as (
    select q.entry, sum(q.n) as n
      from (select e as entry, -1 as n from unnest(first) e union all select a, 1 from unnest(second) a) q
     where first is distinct from second
     group by q.entry having sum(q.n) <> 0
  ), columns as (
    select d.entry->>'table' as name, v.key
      from differing d cross join lateral jsonb_each(d.entry->'row') v
     group by d.entry->>'table', v.key, v.value having sum(d.n) <> 0
  )
  select jsonb_object_agg(c.name, c.keys) from (select name, jsonb_agg(distinct key) as keys from columns group by name) c
$$;
comment on function etl._contract_volatile(jsonb[], jsonb[]) is 'By table, the columns in which two outcomes have different values; null for none.';
revoke all on function etl._contract_volatile(jsonb[], jsonb[]) from public;
grant execute on function etl._contract_volatile(jsonb[], jsonb[]) to etl_owner;

create or replace function etl._contract_without(entries jsonb[], columns jsonb) returns jsonb[]
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(case when columns ? (e->>'table')
    then jsonb_set(e, '{row}', (e->'row') - etl._text_array(columns->(e->>'table'))) else e end), '{}') from unnest(entries) e
$$;
comment on function etl._contract_without(jsonb[], jsonb) is 'An outcome without some columns, given by table.';
revoke all on function etl._contract_without(jsonb[], jsonb) from public;
grant execute on function etl._contract_without(jsonb[], jsonb) to etl_owner;

-- Columns that are not deterministic are left out of all later comparisons: contract comes back with them, expected without.
create or replace function etl._contract_deterministic(inout contract jsonb, out expected jsonb[], out finding jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_calls    jsonb := jsonb_build_array(etl._contract_call_of(contract, contract->>'since', contract->>'until'));
  v_first    record;
  v_second   record;
  v_volatile jsonb;
  v_table    record;
begin
  v_first := etl._contract_variant(contract, v_calls);
  v_second := etl._contract_variant(contract, v_calls);
  finding := etl._contract_compare(contract, 'deterministic', v_first.rows, v_second.rows, coalesce(v_first.failure, v_second.failure),
    'the same rows give the same result', 'run from the same rows once (-) and once more (+)',
    'order rows fully where only some of them are taken (distinct on, limit, row_number), and compute values from the source');
  expected := v_first.rows;
  v_volatile := etl._contract_volatile(v_first.rows, v_second.rows);
  if v_volatile is null then return; end if;
  for v_table in select t.key as name, t.value as columns from jsonb_each(v_volatile) t loop
    contract := jsonb_set(contract, array['tables', v_table.name, 'skipped'], (contract->'tables'->v_table.name->'skipped') || v_table.columns);
  end loop;
  expected := etl._contract_without(v_first.rows, v_volatile);
  if (etl._contract_difference(contract, expected, etl._contract_without(v_second.rows, v_volatile))).rows is null then
    finding := finding || (
      select jsonb_build_object('status', 'warn', 'difference', null,
               'detail', format('not deterministic, and not compared: %s', string_agg(t.key || '.' || c, ', ' order by t.key, c)),
               'remedy', format('compute it from the source (now() is the same for a whole run), or say that it may differ (ignore_columns, --ignore): %s',
                                string_agg(distinct c, ', ')))
        from jsonb_each(v_volatile) t, jsonb_array_elements_text(t.value) c);
  end if;
end $$;
comment on function etl._contract_deterministic(jsonb) is
  'Runs the window twice from the same rows: the outcome to expect, and the contract without the columns that differ by themselves.';
revoke all on function etl._contract_deterministic(jsonb) from public;
grant execute on function etl._contract_deterministic(jsonb) to etl_owner;

create or replace function etl._contract_idempotent(contract jsonb, expected jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_call  jsonb := etl._contract_call_of(contract, contract->>'since', contract->>'until');
  v_twice record := etl._contract_variant(contract, jsonb_build_array(v_call, v_call));
begin
  return etl._contract_compare(contract, 'idempotent', expected, v_twice.rows, v_twice.failure, 'run twice is run once', 'run once (-) and twice (+)',
    'write so that it can be repeated: insert ... on conflict (key) do update, merge, or delete what the window will write before inserting it');
end $$;
comment on function etl._contract_idempotent(jsonb, jsonb[]) is 'Whether the window run twice gives what it gives once.';
revoke all on function etl._contract_idempotent(jsonb, jsonb[]) from public;
grant execute on function etl._contract_idempotent(jsonb, jsonb[]) to etl_owner;

-- What the routine should say about one end of its window, or about both.
create or replace function etl._contract_condition(contract jsonb, bound text, "column" text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case when contract->>'strategy' = 'xid' then format('etl.arrived(%s, p_since, p_until)', c.name)
              else concat_ws(' and ', case when bound is distinct from 'until' then format('(p_since is null or %s >= p_since)', c.name) end,
                                      case when bound is distinct from 'since' then format('%s < p_until', c.name) end) end
    from (select coalesce("column", 'the column') as name) c
$$;
comment on function etl._contract_condition(jsonb, text, text) is 'The condition by which a routine reads its window; bound since or until: that end of it.';
revoke all on function etl._contract_condition(jsonb, text, text) from public;
grant execute on function etl._contract_condition(jsonb, text, text) to etl_owner;

create or replace function etl._contract_pieces(contract jsonb) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with bounds as (
    select b.bound, b.n from unnest(array[contract->>'since'] || etl._text_array(contract->'cuts') || array[contract->>'until']) with ordinality b(bound, n)
  )
  select jsonb_agg(etl._contract_call_of(contract, f.bound, t.bound) order by f.n) from bounds f join bounds t on t.n = f.n + 1
$$;
comment on function etl._contract_pieces(jsonb) is 'The calls that read the window piece by piece.';
revoke all on function etl._contract_pieces(jsonb) from public;
grant execute on function etl._contract_pieces(jsonb) to etl_owner;

create or replace function etl._contract_splits(contract jsonb, expected jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_cuts   text := array_to_string((etl._text_array(contract->'cuts'))[1:4], ', ') || case when jsonb_array_length(contract->'cuts') > 4 then ', ...' else '' end;
  v_pieces record;
begin
  if contract->'cuts' = '[]' then
    return etl._contract_finding('splits', 'skipped', case when contract->'sources' = '[]' then 'the source is a query: there are no rows to cut the window at'
                                                           else 'the window holds too few different values to be cut' end);
  end if;
  v_pieces := etl._contract_variant(contract, etl._contract_pieces(contract));
  return etl._contract_compare(contract, 'splits', expected, v_pieces.rows, v_pieces.failure,
    format('one window is the same window in %s pieces, cut at %s', jsonb_array_length(contract->'cuts') + 1, v_cuts),
    format('in one piece (-) and in pieces cut at %s (+)', v_cuts),
    format('read %s, and compute each key that the window touches from all its rows, not from those of the window alone',
           etl._contract_condition(contract, null, contract#>>'{sources,0,column}')));
end $$;
comment on function etl._contract_splits(jsonb, jsonb[]) is 'Whether the window in pieces gives what it gives in one.';
revoke all on function etl._contract_splits(jsonb, jsonb[]) from public;
grant execute on function etl._contract_splits(jsonb, jsonb[]) to etl_owner;

-- Around one value of a source, with no row right before it. base: what the tables hold when nothing is read.
create or replace function etl._contract_boundary_at(contract jsonb, source jsonb, value text, base jsonb[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_before    text := etl._contract_bound(contract->>'strategy', value, -1);
  v_at        text := etl._contract_bound(contract->>'strategy', value);
  v_after     text := etl._contract_bound(contract->>'strategy', value, 1);
  v_around    record := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_before, v_after)));
  v_from      record := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_at, v_after)));
  v_other     record;
  v_since     text;
  v_finding   jsonb;
  v_is_oldest boolean := etl._contract_count_inside(contract, null, v_at) = 0;
begin
  v_finding := etl._contract_compare(contract, 'boundary', v_around.rows, v_from.rows, coalesce(v_around.failure, v_from.failure), null,
    format('a row of %s at p_since: read by %s (-) and by %s (+)', source->>'name',
           etl._contract_show_window(v_before, v_after), etl._contract_show_window(v_at, v_after)),
    format('read %s', etl._contract_condition(contract, 'since', source->>'column')));
  if v_finding->>'status' = 'fail' then return v_finding; end if;
  if (etl._contract_difference(contract, base, v_from.rows)).rows is null then return null; end if;
  foreach v_since in array array[v_before] || case when v_is_oldest then array[null::text] end loop
    v_other := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_since, v_at)));
    v_finding := etl._contract_compare(contract, 'boundary', base, v_other.rows, v_other.failure, null,
      format('a row of %s at p_until: before (-) and after (+) the window %s, which holds no row', source->>'name', etl._contract_show_window(v_since, v_at)),
      format('read %s', etl._contract_condition(contract, 'until', source->>'column')));
    if v_finding->>'status' = 'fail' then return v_finding; end if;
  end loop;
  if v_is_oldest then
    v_other := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, null, v_after)));
    v_finding := etl._contract_compare(contract, 'boundary', v_around.rows, v_other.rows, v_other.failure, null,
      format('the oldest row of %s: read by %s (-) and by a first window, where p_since is null (+)', source->>'name', etl._contract_show_window(v_before, v_after)),
      format('read %s', etl._contract_condition(contract, 'since', source->>'column')));
    if v_finding->>'status' = 'fail' then return v_finding; end if;
  end if;
  v_other := etl._contract_variant(contract, jsonb_build_array(etl._contract_call_of(contract, v_before, v_at), etl._contract_call_of(contract, v_at, v_after)));
  return etl._contract_compare(contract, 'boundary', v_around.rows, v_other.rows, v_other.failure,
    format('a row of %s at p_since is read, one at p_until is left to the next window', source->>'name'),
    format('a row of %s in one window (-) and between two (+)', source->>'name'),
    format('read %s', etl._contract_condition(contract, null, source->>'column')));
end $$;
comment on function etl._contract_boundary_at(jsonb, jsonb, text, jsonb[]) is
  'Whether windows that begin and end at a row read it exactly once; null when the routine does nothing with that row.';
revoke all on function etl._contract_boundary_at(jsonb, jsonb, text, jsonb[]) from public;
grant execute on function etl._contract_boundary_at(jsonb, jsonb, text, jsonb[]) to etl_owner;

create or replace function etl._contract_boundary(contract jsonb, source jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_base    jsonb[] := etl._contract_rows(contract->'tables');
  v_values  text[] := etl._contract_boundary_values(contract, source);
  v_finding jsonb;
begin
  for i in 1 .. cardinality(v_values) loop
    v_finding := etl._contract_boundary_at(contract, source, v_values[i], v_base);
    if v_finding is not null then return v_finding; end if;
  end loop;
  return etl._contract_finding('boundary', 'skipped', case
    when v_values = '{}' then format('%s has no value with nothing right before it', source->>'name')
    when contract->'emptied' = '[]' then format('what the oldest rows of %s lead to is in the tables already, and these cannot be emptied', source->>'name')
    else format('the oldest rows of %s leave no trace in what the routine writes', source->>'name') end);
end $$;
comment on function etl._contract_boundary(jsonb, jsonb) is 'Whether a row of a source at the end of two windows is read exactly once.';
revoke all on function etl._contract_boundary(jsonb, jsonb) from public;
grant execute on function etl._contract_boundary(jsonb, jsonb) to etl_owner;
