-- Windows to test a routine's contract on: which rows of its sources they hold, where to cut them, where their ends meet a row.
--
-- A value is what a watermark column holds, as text; a bound is what a routine is passed as p_since or p_until. For transactions
-- the bound at a value is a snapshot in which that transaction is still open: a routine that compares ids alone takes it for ended.

-- The sources of a procedure that are columns; a query has none that could be looked into.
create or replace function etl._contract_sources(sources text[]) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object('name', s.source, 'relation', format('%I.%I', s.parts[1], s.parts[2]), 'column', format('%I', s.parts[3]),
           'value', case when a.atttypid = 'timestamp'::regtype then format('%I::timestamptz', s.parts[3]) else format('%I', s.parts[3]) end,
           'is_nullable', not a.attnotnull) order by s.n), '[]')
    from (select u.source, u.n, parse_ident(u.source) as parts from unnest(sources) with ordinality u(source, n)
           where sources[1] !~* '^\s*(select|with)\M') s
    join pg_catalog.pg_attribute a on a.attrelid = etl._relation(format('%I.%I', s.parts[1], s.parts[2])) and a.attname = s.parts[3]
$$;
comment on function etl._contract_sources(text[]) is 'The watermark columns of a procedure: name, relation, column, the value it stands for, is_nullable.';
revoke all on function etl._contract_sources(text[]) from public;
grant execute on function etl._contract_sources(text[]) to etl_owner;

create or replace function etl._contract_bound(strategy text, value text, shift int default 0) returns text
language sql stable strict set search_path = pg_catalog, pg_temp as $$
  select case strategy
    when 'timestamp' then to_jsonb(value::timestamptz + shift * interval '1 microsecond') #>> '{}'
    when 'id' then (value::bigint + shift)::text
    when 'xid' then format('%s:%s:%s', value::bigint + shift, value::bigint + shift + 1, value::bigint + shift)
  end
$$;
comment on function etl._contract_bound(text, text, int) is 'The bound at a value, or so many of the smallest steps after it.';
revoke all on function etl._contract_bound(text, text, int) from public;
grant execute on function etl._contract_bound(text, text, int) to etl_owner;

-- Bounds as a user gives them, in the form the engine passes.
create or replace function etl._contract_given_bound(strategy text, name text, bound text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  return case strategy when 'timestamp' then to_jsonb(bound::timestamptz) #>> '{}' when 'id' then bound::bigint::text
                       else bound::pg_snapshot::text end;
exception when data_exception then
  perform etl._fail('PT422', 'test.window', format('%s is not a bound of the %s strategy: %s', name, strategy, bound),
    case strategy when 'timestamp' then 'write a time as ''2026-11-21 02:00+00''' when 'id' then 'write a whole number'
                  else 'write a pg_snapshot, such as select pg_current_snapshot() returns' end);
end $$;
comment on function etl._contract_given_bound(text, text, text) is 'A bound given by a user, checked and in normal form. Raises PT422 test.window.';
revoke all on function etl._contract_given_bound(text, text, text) from public;
grant execute on function etl._contract_given_bound(text, text, text) to etl_owner;

-- %1$s in the template is a watermark column, %2$s its table.
create or replace function etl._contract_union(sources jsonb, template text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg(format(template, s->>'value', s->>'relation'), ' union all ') from jsonb_array_elements(sources) s
$$;
comment on function etl._contract_union(jsonb, text) is 'A query over all sources of a procedure.';
revoke all on function etl._contract_union(jsonb, text) from public;
grant execute on function etl._contract_union(jsonb, text) to etl_owner;

-- $1 and $2 are the bounds. A row without a value is in no window.
create or replace function etl._contract_rows_inside(contract jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select etl._contract_union(contract->'sources', 'select %1$s as v from %2$s where ' || case contract->>'strategy'
    when 'timestamp' then '($1 is null or %1$s >= $1::timestamptz) and %1$s < $2::timestamptz'
    when 'id' then '($1 is null or %1$s >= $1::bigint) and %1$s < $2::bigint'
    else 'etl.arrived(%1$s, $1::pg_snapshot, $2::pg_snapshot)' end)
$$;
comment on function etl._contract_rows_inside(jsonb) is 'The query for the values of the source rows that lie between two bounds.';
revoke all on function etl._contract_rows_inside(jsonb) from public;
grant execute on function etl._contract_rows_inside(jsonb) to etl_owner;

create or replace function etl._contract_count_inside(contract jsonb, since text, until text) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_count bigint;
begin
  if contract->'sources' = '[]' then return null; end if;
  execute format('select count(*) from (%s) q', etl._contract_rows_inside(contract)) into v_count using since, until;
  return v_count;
end $$;
comment on function etl._contract_count_inside(jsonb, text, text) is 'How many source rows lie between two bounds; null when the source is a query.';
revoke all on function etl._contract_count_inside(jsonb, text, text) from public;
grant execute on function etl._contract_count_inside(jsonb, text, text) to etl_owner;

-- The newest value of the sources, up to now; with an offset, the newest but so many in one of them.
create or replace function etl._contract_newest(contract jsonb, preceding int default 0) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_value text;
begin
  execute format('select to_jsonb(q.v) #>> ''{}'' from (%s) q order by q.v desc limit 1', etl._contract_union(contract->'sources',
      '(select %1$s as v from %2$s where %1$s is not null'
      || case when contract->>'strategy' = 'timestamp' then ' and %1$s <= clock_timestamp() and %1$s > ''-infinity''' else '' end
      || ' order by %1$s desc limit 1 offset ' || preceding || ')'))
    into v_value;
  return v_value;
end $$;
comment on function etl._contract_newest(jsonb, int) is 'The newest value in the sources of a procedure, or the newest but so many; null when there are fewer.';
revoke all on function etl._contract_newest(jsonb, int) from public;
grant execute on function etl._contract_newest(jsonb, int) to etl_owner;

-- What is not given: until just behind the newest row, since before the newest 10,000 rows of a source.
create or replace function etl._contract_window(contract jsonb, inout since text, inout until text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_strategy text := contract->>'strategy';
  v_newest   text;
begin
  since := etl._contract_given_bound(v_strategy, 'since', since);
  until := etl._contract_given_bound(v_strategy, 'until', until);
  if contract->'sources' = '[]' then
    if until is null then execute etl._query_value_sql(contract->>'query') into v_newest; end if;
  elsif until is null or since is null then
    v_newest := etl._contract_newest(contract);
    if since is null and until is null then since := etl._contract_bound(v_strategy, etl._contract_newest(contract, 9999)); end if;
  end if;
  until := coalesce(until, etl._contract_bound(v_strategy, v_newest, 1),
                    case v_strategy when 'timestamp' then to_jsonb(now()) #>> '{}' when 'id' then '0' else pg_current_snapshot()::text end);
  if not (case v_strategy when 'timestamp' then since::timestamptz < until::timestamptz when 'id' then since::bigint < until::bigint
                          else pg_snapshot_xmax(since::pg_snapshot) <= pg_snapshot_xmax(until::pg_snapshot) end) then
    perform etl._fail('PT422', 'test.window', format('the window [%s, %s) is empty', since, until), 'since lies before until');
  end if;
end $$;
comment on function etl._contract_window(jsonb, text, text) is
  'The window to test: as given, else the newest rows of the sources. Raises PT422 test.window.';
revoke all on function etl._contract_window(jsonb, text, text) from public;
grant execute on function etl._contract_window(jsonb, text, text) to etl_owner;

-- Bounds that cut the window at rows there are, so that each of those rows is the first of one piece and just behind another one.
create or replace function etl._contract_cuts(contract jsonb) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_values text[];
begin
  if contract->'sources' = '[]' then return '{}'; end if;
  execute format($q$
    select array_agg(to_jsonb(d.v) #>> '{}' order by d.v)
      from (select q.v, row_number() over (order by q.v) as position, count(*) over () as n from (select distinct v from (%s) s) q) d
     where d.position in (select d.n * i / $3 + 1 from generate_series(1, $3 - 1) i) $q$, etl._contract_rows_inside(contract))
    into v_values using contract->>'since', contract->>'until', (contract->>'pieces')::int;
  return array(select b.bound from unnest(v_values) with ordinality u(value, n), lateral etl._contract_bound(contract->>'strategy', u.value) b(bound)
                where b.bound is distinct from contract->>'since' order by u.n);
end $$;
comment on function etl._contract_cuts(jsonb) is 'The bounds at which the window of a test is cut into pieces, each at a row.';
revoke all on function etl._contract_cuts(jsonb) from public;
grant execute on function etl._contract_cuts(jsonb) to etl_owner;

-- The oldest values of a source with nothing right before them in any source: what a routine does there, it does because of that row.
create or replace function etl._contract_boundary_values(contract jsonb, source jsonb) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_values   text[];
  v_found    text[] := '{}';
  v_strategy text := contract->>'strategy';
begin
  execute format('select array_agg(to_jsonb(q.v) #>> ''{}'' order by q.v) from (select distinct %1$s as v from %2$s where %1$s is not null %3$s order by 1 limit 50) q',
                 source->>'value', source->>'relation', case when v_strategy = 'timestamp' then format('and isfinite(%s)', source->>'value') end)
    into v_values;
  for i in 1 .. coalesce(cardinality(v_values), 0) loop
    exit when cardinality(v_found) = 5;
    if etl._contract_count_inside(contract, etl._contract_bound(v_strategy, v_values[i], -1), etl._contract_bound(v_strategy, v_values[i])) = 0 then
      v_found := v_found || v_values[i];
    end if;
  end loop;
  return v_found;
end $$;
comment on function etl._contract_boundary_values(jsonb, jsonb) is 'Up to five values of a source around which to test the ends of windows.';
revoke all on function etl._contract_boundary_values(jsonb, jsonb) from public;
grant execute on function etl._contract_boundary_values(jsonb, jsonb) to etl_owner;

create or replace function etl._contract_with_window(contract jsonb, since text, until text) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_window record := etl._contract_window(contract, since, until);
begin
  contract := contract || jsonb_build_object('since', v_window.since, 'until', v_window.until);
  return contract || jsonb_build_object('cuts', etl._contract_cuts(contract),
    'row_count', etl._contract_count_inside(contract, v_window.since, v_window.until));
end $$;
comment on function etl._contract_with_window(jsonb, text, text) is 'A contract with the window to test it on, and where to cut that. Raises PT422 test.window.';
revoke all on function etl._contract_with_window(jsonb, text, text) from public;
grant execute on function etl._contract_with_window(jsonb, text, text) to etl_owner;
