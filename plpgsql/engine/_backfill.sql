-- Backfills: a past range of some procedures, read again beside the live watermark.
--
-- A backfill is a run whose steps are chunks: attempts with a window of their own and without a state_key, all planned before
-- the first one starts. etl._walk executes them like any step and finds no watermark to move. It holds a lock of its own
-- (etl._lock_key) and not that of the pipeline, so runs go on beside it. A chunk and a step of a run that read windows of
-- the same procedure exclude each other (etl._execute_step): a chunk must not write a row as it read it over the newer one
-- that the run has written since.

create or replace function etl._backfill_request(
  procedures text[], from_ text, until text, chunk text, params jsonb, pause interval, reason text, resume bigint, idempotency_key text,
  pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_strip_nulls(jsonb_build_object('procedures', procedures, 'from', from_, 'until', until, 'chunk', chunk,
      'pause_ms', nullif(round(extract(epoch from pause) * 1000), case when resume is null then 0 end), 'reason', reason, 'resume', resume,
      'idempotency_key', idempotency_key, 'pipeline', pipeline,
      -- What a bound without an offset means, and where a day begins.
      'time_zone', case when concat(from_, until, chunk) ~ '[^0-9-]' then current_setting('timezone') end))
    || case when params is null or params = '{}' then '{}' else jsonb_build_object('params', params) end
$$;
comment on function etl._backfill_request(text[], text, text, text, jsonb, interval, text, bigint, text, text) is 'The arguments of etl.backfill as one jsonb request.';
revoke all on function etl._backfill_request(text[], text, text, text, jsonb, interval, text, bigint, text, text) from public;
grant execute on function etl._backfill_request(text[], text, text, text, jsonb, interval, text, bigint, text, text) to etl_reader;

create or replace function etl._backfill_problem(field text, code text, message text, hint text) returns jsonb
language sql immutable
return jsonb_build_object('loc', jsonb_build_array(field), 'code', code, 'message', message, 'hint', hint);
comment on function etl._backfill_problem(text, text, text, text) is 'One problem of a request for a backfill.';
revoke all on function etl._backfill_problem(text, text, text, text) from public;

create or replace function etl._fail_backfill(problems jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if problems = '[]' then return; end if;
  perform etl._fail(case when problems->0->>'code' like '%.unknown' then 'PT404' else 'PT422' end, problems->0->>'code',
    (select string_agg(p->>'message', '; ') from jsonb_array_elements(problems) p),
    coalesce(problems->0->>'hint', 'what there is: select * from etl.list_procedures()'), jsonb_build_object('errors', problems));
end $$;
comment on function etl._fail_backfill(jsonb) is 'Raises PT404 or PT422 with the code of the first problem and all of them in DETAIL; nothing when there is none.';
revoke all on function etl._fail_backfill(jsonb) from public;

-- An id of a transaction begins at 1: a snapshot can hold no less. The year 10000 leaves room for one more chunk after the end.
create or replace function etl._bound(strategy text, value text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  return case strategy
    when 'timestamp' then case when isfinite(value::timestamptz) and value::timestamptz < '10000-01-01Z' then to_jsonb(value::timestamptz) #>> '{}' end
    when 'id' then (value::bigint)::text
    else greatest(value::bigint, 1)::text end;
exception when data_exception then
  return null;
end $$;
comment on function etl._bound(text, text) is 'A bound of a backfill in one spelling: a timestamptz, or a bigint for ids and transactions; null when it is not one.';
revoke all on function etl._bound(text, text) from public;

create or replace function etl._chunk_problem(strategy text, chunk text) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp set intervalstyle = 'postgres' as $$
begin
  if strategy <> 'timestamp' then
    return case when chunk::bigint <= 0 then format('chunk is a number above 0, not %s', chunk) end;
  elsif chunk ~ '^\s*[-+0-9.]+\s*$' then
    return format('chunk %s has no unit', chunk);
  end if;
  return case when chunk::interval <= interval '0' or chunk::interval::text ~ '-' then format('chunk is longer than nothing, not %s', chunk)
              when chunk::interval > interval '1000 years' then format('chunk is at most 1000 years, not %s', chunk) end;
exception when data_exception then
  return format(case strategy when 'timestamp' then '%s is not an interval' else '%s is not a number' end, chunk);
end $$;
comment on function etl._chunk_problem(text, text) is 'What is wrong with the size of a chunk, or null.';
revoke all on function etl._chunk_problem(text, text) from public;

-- The query for the least value in the sources, from $1 on when has_start. Null: it would have to read a whole source each
-- time, for want of an index, or the source is a query; then nothing can be skipped.
create or replace function etl._least_value_sql(procedure etl.procedures, has_start boolean) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case when bool_and(not has_start or exists (
           select from pg_catalog.pg_index i
             join pg_catalog.pg_class x on x.oid = i.indexrelid
             join pg_catalog.pg_am m on m.oid = x.relam and m.amname = 'btree'
             join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
             join pg_catalog.pg_class c on c.oid = i.indrelid
             join pg_catalog.pg_namespace n on n.oid = c.relnamespace
            where i.indisvalid and i.indpred is null and (n.nspname, c.relname, a.attname) = (s.parts[1], s.parts[2], s.parts[3])))
         then format('select to_jsonb(least(%s)::%s) #>> ''{}''', string_agg(format('(select min(%I) from %I.%I%s)', s.parts[3], s.parts[1], s.parts[2],
                case when has_start then format(' where %I >= $1::%s', s.parts[3], t.column_type) end), ', '), min(t.result_type)) end
    from (select parse_ident(u.source) as parts from unnest(procedure.watermark_sources) u(source)) s
    cross join (select case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'text::xid8' end as column_type,
                       case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'text::bigint' end as result_type) t
$$;
comment on function etl._least_value_sql(etl.procedures, boolean) is 'The query for the least value in the sources of a procedure, from $1 on; null when it cannot use an index.';
revoke all on function etl._least_value_sql(etl.procedures, boolean) from public;

-- Chunk n is [start + n * width, start + (n + 1) * width): months keep their day, and days their hour of the clock. The number of
-- the chunk that holds a value is estimated by length and then corrected, as months and days differ in theirs.
create or replace function etl._time_chunks(least_value_sql text, start timestamptz, until timestamptz, width interval, max_count int)
returns table (window_since text, window_until text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_value timestamptz;
  v_n     bigint := 0;
  v_count int := 0;
begin
  while start + v_n * width < until and v_count < max_count loop
    if least_value_sql is not null then
      v_value := etl._read_source(least_value_sql, to_jsonb(start + v_n * width) #>> '{}');
      exit when v_value is null or v_value >= until;
      v_n := greatest(v_n, floor(extract(epoch from v_value - start) / extract(epoch from width)));
      while start + v_n * width > v_value loop v_n := v_n - 1; end loop;
      while start + (v_n + 1) * width <= v_value loop v_n := v_n + 1; end loop;
    end if;
    window_since := to_jsonb(start + v_n * width) #>> '{}';
    window_until := to_jsonb(least(start + (v_n + 1) * width, until)) #>> '{}';
    return next;
    v_n := v_n + 1;
    v_count := v_count + 1;
  end loop;
end $$;
comment on function etl._time_chunks(text, timestamptz, timestamptz, interval, int) is
  'The chunks of a range of time; with a query for the least value from $1 on, those that hold none are left out.';
revoke all on function etl._time_chunks(text, timestamptz, timestamptz, interval, int) from public;

create or replace function etl._number_chunks(least_value_sql text, start bigint, until bigint, width bigint, max_count int)
returns table (window_since text, window_until text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_since numeric := start;
  v_value bigint;
  v_count int := 0;
begin
  while v_since < until and v_count < max_count loop
    if least_value_sql is not null then
      v_value := etl._read_source(least_value_sql, v_since::bigint::text);
      exit when v_value is null or v_value >= until;
      v_since := start + div(v_value::numeric - start, width) * width;
    end if;
    window_since := v_since::text;
    window_until := least(v_since + width, until)::text;
    return next;
    v_since := v_since + width;
    v_count := v_count + 1;
  end loop;
end $$;
comment on function etl._number_chunks(text, bigint, bigint, bigint, int) is
  'The chunks of a range of numbers; with a query for the least value from $1 on, those that hold none are left out.';
revoke all on function etl._number_chunks(text, bigint, bigint, bigint, int) from public;

-- The snapshot 'N:N:' sees what is below N and nothing else: between two of them etl.arrived finds the ids from one to the other.
create or replace function etl._procedure_chunks(procedure etl.procedures, start text, until text, chunk text, max_count int)
returns table (window_since text, window_until text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_least_sql text := case when not etl._is_query(procedure.watermark_sources) then etl._least_value_sql(procedure, true) end;
begin
  if procedure.watermark_strategy = 'timestamp' then
    return query select * from etl._time_chunks(v_least_sql, start::timestamptz, until::timestamptz, chunk::interval, max_count);
  elsif procedure.watermark_strategy = 'id' then
    return query select * from etl._number_chunks(v_least_sql, start::bigint, until::bigint, chunk::bigint, max_count);
  else
    return query select format('%s:%s:', c.window_since, c.window_since), format('%s:%s:', c.window_until, c.window_until)
      from etl._number_chunks(v_least_sql, start::bigint, until::bigint, chunk::bigint, max_count) c;
  end if;
end $$;
comment on function etl._procedure_chunks(etl.procedures, text, text, text, int) is 'The windows into which a backfill of one procedure is cut, at most so many.';
revoke all on function etl._procedure_chunks(etl.procedures, text, text, text, int) from public;

-- The range of one procedure: what the request says, else from the first row there is to the watermark of the runs.
create or replace function etl._backfill_range(procedure etl.procedures, request jsonb, out start text, out until text, out problems jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp set datestyle = 'ISO' as $$
declare
  v_watermark text := (select s.last_success_watermark from etl.state s where s.state_key = procedure.state_key);
begin
  problems := '[]';
  start := etl._bound(procedure.watermark_strategy, request->>'from');
  until := etl._bound(procedure.watermark_strategy, request->>'until');
  if not request ? 'until' then
    if v_watermark is null then
      problems := problems || etl._backfill_problem('until', 'backfill.no_until', format('%s has no watermark up to which it could be backfilled', procedure.name),
        'say where to end: until => ''...''; without a watermark, a plain run reads everything: call etl.start_run()');
    elsif procedure.watermark_strategy = 'xid' then
      until := pg_snapshot_xmin(v_watermark::pg_snapshot)::text;
    else
      until := etl._bound(procedure.watermark_strategy, v_watermark);
    end if;
  end if;
  if not request ? 'from' then
    if etl._is_query(procedure.watermark_sources) then
      problems := problems || etl._backfill_problem('from_', 'backfill.no_from', format('the source of %s is a query, which does not tell where its rows begin', procedure.name),
        'say where to begin: from_ => ''...''');
    elsif problems = '[]' then
      start := etl._read_source(etl._least_value_sql(procedure, false));
      start := coalesce(etl._bound(procedure.watermark_strategy, start), until);
    end if;
  elsif (case procedure.watermark_strategy when 'timestamp' then start::timestamptz >= until::timestamptz else start::bigint >= until::bigint end) then
    problems := problems || etl._backfill_problem('from_', 'backfill.invalid',
      format('from_ %s is not before %s %s', start, case when request ? 'until' then 'until' else format('the watermark of %s,', procedure.name) end, until),
      'a backfill reads from from_, inclusive, to until, exclusive');
  end if;
end $$;
comment on function etl._backfill_range(etl.procedures, jsonb) is 'From where to where a procedure is to be backfilled, and what is wrong with that.';
revoke all on function etl._backfill_range(etl.procedures, jsonb) from public;

-- What is wrong with a request, as far as it can be told before the range of each procedure is known.
create or replace function etl._backfill_problems(request jsonb, selected int[]) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with strategy as (
    select min(p.watermark_strategy) as name from etl.procedures p where p.procedure_id = any (selected) having count(distinct p.watermark_strategy) = 1
  ), found(field, code, message, hint) as (
    select 'procedures', 'selection.empty', 'a backfill needs the names of procedures', 'call etl.backfill(procedures => ''{silver.orders}'', ...)'
     where not request ? 'procedures'
    union all
    select 'procedures', 'backfill.no_watermark', format('%s has no watermark, so it has no range to read again', p.name),
           'run it: call etl.start_run(procedures => ...)'
      from etl.procedures p where p.procedure_id = any (selected) and p.watermark_strategy is null
    union all
    select 'procedures', 'backfill.mixed_strategies', format('the procedures have watermarks of different kinds: %s', string_agg(p.name || ' ' || p.watermark_strategy, ', ' order by p.name)),
           'one backfill for each kind: bounds and chunks are times for one, numbers for the other'
      from etl.procedures p where p.procedure_id = any (selected) having count(distinct p.watermark_strategy) > 1
    union all
    select b.field, 'backfill.invalid', format('%s is not %s: %s', b.field,
             case s.name when 'timestamp' then 'a time' when 'id' then 'an id' else 'the number of a transaction' end, b.value),
           case s.name when 'timestamp' then 'write a time as 2026-11-21 02:00+00' else 'write a whole number' end
      from strategy s cross join (values ('from_', request->>'from'), ('until', request->>'until')) b(field, value)
     where b.value is not null and etl._bound(s.name, b.value) is null
    union all
    select 'chunk', 'backfill.invalid', coalesce(etl._chunk_problem(s.name, request->>'chunk'), 'a backfill needs the size of a chunk'),
           case s.name when 'timestamp' then 'chunk => ''1 day''' else 'chunk => ''100000''' end
      from strategy s where not request ? 'chunk' or etl._chunk_problem(s.name, request->>'chunk') is not null
    union all
    select 'pause', 'backfill.invalid', 'pause is between nothing and 24 days', 'pause => ''1 second'''
     where (request->>'pause_ms')::numeric not between 0 and 2073600000
    union all
    select 'params', 'backfill.invalid', 'params is an object like {"silver.fact_sales": {"country": "DE"}}', null
     where jsonb_typeof(request->'params') <> 'object'
  )
  select coalesce(jsonb_agg(etl._backfill_problem(f.field, f.code, f.message, f.hint)), '[]') from found f
$$;
comment on function etl._backfill_problems(jsonb, int[]) is 'Problems of a request for a backfill that do not depend on the data.';
revoke all on function etl._backfill_problems(jsonb, int[]) from public;

create or replace function etl._fail_too_many_chunks(procedure etl.procedures, start text, until text, chunk text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set intervalstyle = 'postgres' as $$
declare
  v_is_time boolean := procedure.watermark_strategy = 'timestamp';
  v_length  numeric := case when v_is_time then extract(epoch from until::timestamptz - start::timestamptz) else until::numeric - start::numeric end;
  v_width   numeric := case when v_is_time then extract(epoch from chunk::interval) else chunk::numeric end;
begin
  perform etl._fail('PT422', 'backfill.too_many_chunks', format('a backfill has at most 100000 chunks; chunks of %s would make %s of the range of %s',
      chunk, ceil(v_length / v_width), procedure.name),
    format('larger chunks, at least: chunk => ''%s''; or a part of the range at a time',
      case when v_is_time then make_interval(secs => ceil(v_length / 100000)::float8)::text else ceil(v_length / 100000)::text end));
end $$;
comment on function etl._fail_too_many_chunks(etl.procedures, text, text, text) is 'Raises PT422 backfill.too_many_chunks with the size that would do.';
revoke all on function etl._fail_too_many_chunks(etl.procedures, text, text, text) from public;

-- All chunks of the first procedure come first, then those of the next, in the order of dependencies. Writes nothing.
create or replace function etl._plan_backfill(request jsonb)
returns table (order_index int, procedure_id int, window_since text, window_until text, parameters jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(request->>'pipeline');
  v_selection record := etl._select_procedures(v_pipeline.pipeline_id, request);
  v_problems  jsonb;
  v_params    record;
  v_procedure etl.procedures;
  v_range     record;
  v_count     int := 0;
  v_rows      int;
begin
  -- Nothing named is not everything: nobody backfills by accident.
  if not request ? 'procedures' then select null::int[] as selected, '[]'::jsonb as problems into v_selection; end if;
  v_problems := v_selection.problems || etl._backfill_problems(request, v_selection.selected);
  if jsonb_typeof(coalesce(request->'params', '{}')) = 'object' then
    v_params := etl._plan_parameters(v_selection.selected, coalesce(request->'params', '{}'));
    v_problems := v_problems || v_params.problems;
  end if;
  if v_problems = '[]' then
    select coalesce(jsonb_agg(e.problem order by p.name), '[]') into v_problems
      from etl.procedures p cross join lateral jsonb_array_elements((etl._backfill_range(p, request)).problems) e(problem)
     where p.procedure_id = any (v_selection.selected);
  end if;
  perform etl._fail_backfill(v_problems);
  for v_procedure in
    select p.* from etl._order_procedures(v_selection.selected, 'per_procedure') o join etl.procedures p using (procedure_id)
     order by o.phase, o.scope_level, o.scope_number, o."position"
  loop
    v_range := etl._backfill_range(v_procedure, request);
    return query
      select v_count + c.n::int, v_procedure.procedure_id, c.window_since, c.window_until, coalesce(v_params.parameters->v_procedure.procedure_id::text, '{}')
        from etl._procedure_chunks(v_procedure, v_range.start, v_range.until, request->>'chunk', 100001 - v_count)
             with ordinality c(window_since, window_until, n);
    get diagnostics v_rows = row_count;
    v_count := v_count + v_rows;
    if v_count > 100000 then perform etl._fail_too_many_chunks(v_procedure, v_range.start, v_range.until, request->>'chunk'); end if;
  end loop;
end $$;
comment on function etl._plan_backfill(jsonb) is
  'The chunks of a new backfill. Raises PT404 for unknown names, PT422 for everything else that is wrong with the request, all at once.';
revoke all on function etl._plan_backfill(jsonb) from public;
