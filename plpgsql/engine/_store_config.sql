-- Writing a validated configuration into the catalog tables. The caller holds the configuration lock.

-- What is new, changed its time or comes back begins now: it owes nothing for the time before. The rows are locked first, in the
-- order in which a clock takes them, whatever their order in the file.
create or replace function etl._store_schedules(pipeline_id int, config jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform from etl.schedules s where s.pipeline_id = _store_schedules.pipeline_id order by s.schedule_id for update;
  update etl.schedules s set is_active = false
   where s.pipeline_id = _store_schedules.pipeline_id and s.is_active and s.name not in (select x->>'name' from jsonb_array_elements(config->'schedules') x);
  insert into etl.schedules as s (pipeline_id, name, definition, next_at)
  select _store_schedules.pipeline_id, x->>'name', jsonb_strip_nulls(x), etl._next_slot(x->>'cron', x->>'timezone', clock_timestamp())
    from jsonb_array_elements(config->'schedules') x
  on conflict on constraint a_schedule_name_is_unique_in_its_pipeline do update
    set definition = excluded.definition, is_active = true,
        next_at = case when s.is_active and (s.definition->>'cron', s.definition->>'timezone') = (excluded.definition->>'cron', excluded.definition->>'timezone')
                    then coalesce(s.next_at, excluded.next_at) else excluded.next_at end;
end $$;
comment on function etl._store_schedules(int, jsonb) is 'Stores the schedules of a pipeline, each with the time at which it is due next.';
revoke all on function etl._store_schedules(int, jsonb) from public;

create or replace function etl._store_pipeline(config jsonb) returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline_id int;
begin
  insert into etl.pipelines (name, description, max_concurrency, search_path, helper_server, clock, retention, approvals,
    observe_lineage)
  values (config->>'pipeline', config->>'description', (config->>'max_concurrency')::int, etl._text_array(config->'search_path'),
          config->>'helper_server', coalesce(etl._setting(config->'clock'), '{}'), coalesce(etl._setting(config->'retention'), '{}'),
          coalesce(config->>'approvals', 'none'), coalesce(config->>'observe_lineage', 'daily'))
  on conflict (name) do update
    set description = excluded.description, max_concurrency = excluded.max_concurrency, search_path = excluded.search_path,
        helper_server = excluded.helper_server, clock = excluded.clock, retention = excluded.retention, approvals = excluded.approvals,
        observe_lineage = excluded.observe_lineage
  returning pipeline_id into v_pipeline_id;
  update etl.groups g set is_active = false
   where g.pipeline_id = v_pipeline_id and g.is_active and g.name not in (select x->>'name' from jsonb_array_elements(config->'groups') x);
  insert into etl.groups (pipeline_id, name, description)
  select v_pipeline_id, x->>'name', x->>'description' from jsonb_array_elements(config->'groups') x
  on conflict (pipeline_id, name) do update set description = excluded.description, is_active = true;
  perform etl._store_schedules(v_pipeline_id, config);
  insert into etl.tags (name) select distinct t from jsonb_array_elements(config->'procedures') p, jsonb_array_elements_text(p->'tags') t
  on conflict do nothing;
  insert into etl.refresh_targets (pipeline_id, name)
  select distinct v_pipeline_id, m->>'name' from jsonb_array_elements(config->'procedures') p, jsonb_array_elements(p->'mv_refresh') m
  on conflict do nothing;
  return v_pipeline_id;
end $$;
comment on function etl._store_pipeline(jsonb) is 'Stores a pipeline with its groups, schedules, tags and refresh targets.';
revoke all on function etl._store_pipeline(jsonb) from public;

-- Such values mean a time only in a zone: without one of its own, a step would read other rows in a session of another zone.
create or replace function etl._is_without_time_zone(watermark jsonb) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select watermark->>'strategy' = 'timestamp' and not etl._is_query(etl._text_array(watermark->'source')) and exists (
    select from jsonb_array_elements_text(watermark->'source') s
      cross join lateral parse_ident(s) i(parts)
      join pg_catalog.pg_attribute a on a.attrelid = etl._relation(format('%I.%I', i.parts[1], i.parts[2])) and a.attname = i.parts[3]
     where a.atttypid = 'timestamp'::regtype)
$$;
comment on function etl._is_without_time_zone(jsonb) is 'Whether a source of a watermark is a column of type timestamp without time zone.';
revoke all on function etl._is_without_time_zone(jsonb) from public;

create or replace function etl._store_procedure(pipeline_id int, p jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_call      record := etl._compile_call(p);
  v_watermark jsonb := case when jsonb_typeof(p->'watermark') = 'object' then p->'watermark' else '{}' end;
begin
  insert into etl.procedures (pipeline_id, name, type, description, routine, routine_signature, call_sql, rows_column, default_mode,
    allow_full_refresh, allow_fact_dependency, transaction_scope, isolation, args, watermark_strategy, watermark_sources, state_key, delay_ms, on_empty, watermark_time_zone,
    max_attempts, backoff_ms, max_backoff_ms, timeout_ms, lock_timeout_ms, on_failure, max_window, checks, freshness_ms, is_active)
  values (_store_procedure.pipeline_id, p->>'name', p->>'type', p->>'description', p->>'routine', v_call.routine_signature, v_call.call_sql,
    v_call.rows_column, p->>'default_mode', (p->>'allow_full_refresh')::boolean, (p->>'allow_fact_dependency')::boolean,
    p->>'transaction_scope', p->>'isolation', p->'args', v_watermark->>'strategy', etl._text_array(v_watermark->'source'), v_watermark->>'state_key',
    coalesce((v_watermark->>'delay_ms')::int, 0), coalesce(v_watermark->>'on_empty', 'run'),
    case when etl._is_without_time_zone(v_watermark) then current_setting('timezone') end, (p#>>'{retries,attempts}')::int, (p#>>'{retries,backoff_ms}')::int,
    (p#>>'{retries,max_backoff_ms}')::int, (p->>'timeout_ms')::int, (p->>'lock_timeout_ms')::int, p->>'on_failure',
    nullif(p->'max_window', 'null'),
    (select coalesce(jsonb_agg(c || jsonb_build_object('sql', (etl._compile_check(c)).sql) order by n), '[]')
       from jsonb_array_elements(p->'checks') with ordinality x(c, n)), (p->>'freshness_ms')::bigint, true)
  on conflict on constraint a_procedure_name_is_unique_in_its_pipeline do update set
    type = excluded.type, description = excluded.description, routine = excluded.routine, routine_signature = excluded.routine_signature,
    call_sql = excluded.call_sql, rows_column = excluded.rows_column, default_mode = excluded.default_mode,
    allow_full_refresh = excluded.allow_full_refresh, allow_fact_dependency = excluded.allow_fact_dependency,
    transaction_scope = excluded.transaction_scope, isolation = excluded.isolation, args = excluded.args,
    watermark_strategy = excluded.watermark_strategy, watermark_sources = excluded.watermark_sources, state_key = excluded.state_key,
    delay_ms = excluded.delay_ms, on_empty = excluded.on_empty,
    watermark_time_zone = case when excluded.watermark_time_zone is not null then coalesce(procedures.watermark_time_zone, excluded.watermark_time_zone) end, max_attempts = excluded.max_attempts, backoff_ms = excluded.backoff_ms,
    max_backoff_ms = excluded.max_backoff_ms, timeout_ms = excluded.timeout_ms, lock_timeout_ms = excluded.lock_timeout_ms,
    on_failure = excluded.on_failure, max_window = excluded.max_window, checks = excluded.checks,
    freshness_ms = excluded.freshness_ms, is_active = true;
end $$;
comment on function etl._store_procedure(int, jsonb) is 'Stores one procedure with its compiled call and checks.';
revoke all on function etl._store_procedure(int, jsonb) from public;

-- What links procedures to each other and to the rest is replaced whole.
create or replace function etl._store_links(pipeline_id int, config jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_mine int[] := (select array_agg(p.procedure_id) from etl.procedures p where p.pipeline_id = _store_links.pipeline_id);
begin
  delete from etl.dependencies d where d.procedure_id = any (v_mine);
  delete from etl.parameters d where d.procedure_id = any (v_mine);
  delete from etl.group_members d where d.procedure_id = any (v_mine);
  delete from etl.procedure_tags d where d.procedure_id = any (v_mine);
  delete from etl.procedure_refresh_targets d where d.procedure_id = any (v_mine);
  insert into etl.dependencies (procedure_id, depends_on_id)
  select distinct p.procedure_id, q.procedure_id
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements_text(x->'dependencies') d(name)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.procedures q on q.pipeline_id = _store_links.pipeline_id and q.name = d.name;
  insert into etl.parameters (procedure_id, name, ordinal, declaration)
  select p.procedure_id, d.param->>'name', d.n, jsonb_strip_nulls(d.param)
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements(x->'params') with ordinality d(param, n)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name';
  insert into etl.group_members (group_id, procedure_id)
  select g.group_id, p.procedure_id
    from jsonb_array_elements(config->'procedures') x
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.groups g on g.pipeline_id = _store_links.pipeline_id and g.name = x->>'group';
  insert into etl.procedure_tags (procedure_id, tag_id)
  select distinct p.procedure_id, t.tag_id
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements_text(x->'tags') d(name)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.tags t on t.name = d.name;
  insert into etl.procedure_refresh_targets (procedure_id, refresh_target_id, refresh_after, refresh_on, concurrency)
  select p.procedure_id, t.refresh_target_id, m.target->>'after', m.target->>'on', m.target->>'concurrently'
    from jsonb_array_elements(config->'procedures') x cross join lateral jsonb_array_elements(x->'mv_refresh') m(target)
    join etl.procedures p on p.pipeline_id = _store_links.pipeline_id and p.name = x->>'name'
    join etl.refresh_targets t on t.pipeline_id = _store_links.pipeline_id and t.name = m.target->>'name';
end $$;
comment on function etl._store_links(int, jsonb) is 'Stores dependencies, parameters, group members, tags and refresh targets of all procedures of a pipeline.';
revoke all on function etl._store_links(int, jsonb) from public;
