-- From a request to a backfill that this session executes: a new one, or what is left of an earlier one.

-- A backfill, those it goes on with, and those that went on with any of them: what one of them has done need not be done again.
create or replace function etl._backfill_family(run etl.runs) returns setof etl.runs
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive up(run_id, parent_run_id) as (
    select run.run_id, run.parent_run_id
    union all
    select r.run_id, r.parent_run_id from up join etl.runs r on r.run_id = up.parent_run_id
  ), family(run_id) as (
    select min(up.run_id) from up
    union
    select r.run_id from family f join etl.runs r on r.pipeline_id = run.pipeline_id and r.run_id > f.run_id and r.parent_run_id = f.run_id
  )
  select r.* from family f join etl.runs r using (run_id)
$$;
comment on function etl._backfill_family(etl.runs) is 'A backfill with everything that it resumes and that resumes it.';
revoke all on function etl._backfill_family(etl.runs) from public;

-- The backfill that a request wants to go on with. Raises what stands against that.
create or replace function etl._resumable(request jsonb) returns etl.runs
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_id     bigint := (request->>'resume')::bigint;
  v_run    etl.runs;
  v_active etl.runs;
begin
  perform etl._fail_backfill(coalesce(jsonb_agg(etl._backfill_problem(k.name, 'backfill.invalid',
      format('%s is that of backfill %s, which is resumed', k.name, v_id), format('call etl.backfill(resume => %s)', v_id))), '[]'))
    from jsonb_object_keys(request - '{resume,pause_ms,reason,idempotency_key,pipeline,time_zone}'::text[]) k(name);
  select * into v_run from etl.runs r where r.run_id = v_id;
  if v_run.run_id is null then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', v_id), 'which there are: select * from etl.backfill_progress');
  elsif v_run.kind <> 'backfill' then
    perform etl._fail('PT422', 'backfill.not_a_backfill', format('run %s is not a backfill', v_id),
      'a run needs no resume: call etl.start_run() begins at the watermarks, as they were committed');
  end if;
  select * into v_active from etl._backfill_family(v_run) f where etl._is_alive(f) limit 1;
  if v_active.run_id is not null then
    perform etl._fail('PT409', 'run.active', format('backfill %s is active', v_active.run_id),
      format('wait for it, or stop it: select etl.cancel_run(%s, reason => ''...'')', v_active.run_id),
      jsonb_build_object('run_id', v_active.run_id, 'pid', v_active.worker_pid, 'user', v_active.session_user_name));
  end if;
  return v_run;
end $$;
comment on function etl._resumable(jsonb) is
  'The backfill to resume. Raises PT404 run.unknown, PT422 backfill.not_a_backfill or backfill.invalid, PT409 run.active.';
revoke all on function etl._resumable(jsonb) from public;

create or replace function etl._backfill_left(parent etl.runs) returns setof etl.procedure_runs
language sql stable set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
  select c.* from etl.procedure_runs c
   where c.run_id = parent.run_id and c.attempt = 1
     and not exists (select from etl.procedure_runs d
                      where d.run_id = any (array(select f.run_id from etl._backfill_family(parent) f)) and d.status = 'succeeded'
                        and d.procedure_id = c.procedure_id and d.window_until = c.window_until)
$$;
comment on function etl._backfill_left(etl.runs) is 'The chunks of a backfill that have not succeeded, neither in it nor in one that resumed it.';
revoke all on function etl._backfill_left(etl.runs) from public;

-- Statement and parameters are those of the configuration as it is now, the windows stay.
create or replace function etl._plan_resume(parent etl.runs)
returns table (order_index int, procedure_id int, window_since text, window_until text, parameters jsonb)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_selected int[];
  v_gone     jsonb;
  v_params   record;
begin
  select array_agg(q.procedure_id), coalesce(jsonb_agg(etl._backfill_problem('procedures', 'procedure.unknown',
           format('%s, of which backfill %s has chunks left, is no longer configured with a watermark of the %s strategy', q.procedure_name, parent.run_id,
                  parent.request->>'strategy'), 'start another backfill: call etl.backfill(procedures => ...)')) filter (where p.procedure_id is null), '[]')
    into v_selected, v_gone
    from (select distinct c.procedure_id, c.procedure_name from etl._backfill_left(parent) c) q
    left join etl.procedures p on p.procedure_id = q.procedure_id and p.is_active and p.watermark_strategy = parent.request->>'strategy';
  if v_selected is null then
    perform etl._fail('PT409', 'backfill.nothing_left', format('nothing is left of backfill %s: every chunk has succeeded', parent.run_id),
      'to read the range again, start another backfill: call etl.backfill(procedures => ...)');
  end if;
  v_params := etl._plan_parameters(v_selected, coalesce(parent.request->'params', '{}'));
  perform etl._fail_backfill(v_gone || coalesce((select jsonb_agg(x) from jsonb_array_elements(v_params.problems) x where x->>'code' <> 'params.unused'), '[]'));
  return query
    select row_number() over (order by c.order_index)::int, c.procedure_id, c.window_since, c.window_until,
           coalesce(v_params.parameters->c.procedure_id::text, '{}')
      from etl._backfill_left(parent) c;
end $$;
comment on function etl._plan_resume(etl.runs) is 'The chunks that are left of a backfill. Raises PT409 backfill.nothing_left, PT404 procedure.unknown.';
revoke all on function etl._plan_resume(etl.runs) from public;

-- What was asked for, completed: bounds as they were understood, or found.
create or replace function etl._resolved_request(request jsonb, run_id bigint) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_strategy text := (select p.watermark_strategy from etl.procedures p join etl.pipelines l using (pipeline_id)
                       where p.is_active and l.pipeline_id = (etl._pipeline(request->>'pipeline')).pipeline_id and request->'procedures' ? p.name limit 1);
  v_found    record;
begin
  select case v_strategy when 'timestamp' then to_jsonb(min(p.window_since::timestamptz)) #>> '{}' when 'id' then min(p.window_since::bigint)::text
                         else min(pg_snapshot_xmin(p.window_since::pg_snapshot))::text end as start,
         case v_strategy when 'timestamp' then to_jsonb(max(p.window_until::timestamptz)) #>> '{}' when 'id' then max(p.window_until::bigint)::text
                         else max(pg_snapshot_xmin(p.window_until::pg_snapshot))::text end as until
    into v_found
    from etl.procedure_runs p where p.run_id = _resolved_request.run_id;
  return request || jsonb_strip_nulls(jsonb_build_object('strategy', v_strategy,
    'from', coalesce(etl._bound(v_strategy, request->>'from'), v_found.start), 'until', coalesce(etl._bound(v_strategy, request->>'until'), v_found.until)));
end $$;
comment on function etl._resolved_request(jsonb, bigint) is 'The request of a new backfill with its strategy and its bounds: those given, else those of its chunks.';
revoke all on function etl._resolved_request(jsonb, bigint) from public;

-- Chunks wait for nothing but their turn: one that fails leaves the others alone, unless its procedure says on_failure: stop.
create or replace function etl._insert_chunks(run etl.runs, request jsonb, parent etl.runs) returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
declare
  v_count int;
begin
  insert into etl.procedure_runs (run_id, order_index, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode, tx_scope, isolation,
    parameters, dependencies, statement, rows_column, lock_key, settings, window_since, window_until)
  with procedure as materialized (
    select p.procedure_id, p.name, p.type, g.name as group_name, p.isolation, p.call_sql, p.rows_column, etl._step_settings(p, l.search_path) as settings
      from etl.procedures p
      join etl.pipelines l using (pipeline_id)
      left join etl.group_members m using (procedure_id)
      left join etl.groups g using (group_id)
     where p.pipeline_id = run.pipeline_id
  ), chunk as materialized (
    select * from etl._plan_backfill(request) where parent.run_id is null
    union all
    select * from etl._plan_resume(parent) where parent.run_id is not null
  )
  select run.run_id, c.order_index, c.order_index, p.procedure_id, p.name, p.type, p.group_name, 'incremental', 'per_procedure', p.isolation,
         c.parameters, '[]', p.call_sql, p.rows_column, etl._lock_key(run), p.settings, c.window_since, c.window_until
    from chunk c join procedure p using (procedure_id)
   order by c.order_index;
  get diagnostics v_count = row_count;
  insert into etl.run_scopes (run_id, scope_index, kind, isolation, first_order_index, last_order_index, remaining_dependencies)
  select p.run_id, p.scope_index, 'steps', p.isolation, p.order_index, p.order_index, 0 from etl.procedure_runs p where p.run_id = run.run_id;
  return v_count;
end $$;
comment on function etl._insert_chunks(etl.runs, jsonb, etl.runs) is 'Plans the chunks of a backfill, new or resumed, and stores them; returns their number.';
revoke all on function etl._insert_chunks(etl.runs, jsonb, etl.runs) from public;

create or replace function etl._create_backfill(asked jsonb, parent etl.runs) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_request     jsonb := coalesce(parent.request - 'idempotency_key' - 'reason', '{}') || asked;
  v_pipeline_id int := coalesce(parent.pipeline_id, (etl._pipeline(asked->>'pipeline')).pipeline_id);
  v_run         etl.runs;
begin
  insert into etl.runs (kind, pipeline_id, config_version_id, parent_run_id, mode, request, idempotency_key, fingerprint, requested_by,
    application_name, reason, max_concurrency, pause_ms, step_count, started_at, status, worker_pid)
  values ('backfill', v_pipeline_id, (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = v_pipeline_id), parent.run_id,
    'incremental', v_request, asked->>'idempotency_key', etl._fingerprint(asked), etl._requester(), current_setting('application_name'),
    coalesce(asked->>'reason', parent.reason), 1, 0, 0, clock_timestamp(), 'running', pg_backend_pid())
  returning * into v_run;
  v_run.step_count := etl._insert_chunks(v_run, asked, parent);
  update etl.runs r
     set step_count = v_run.step_count, pause_ms = coalesce((v_request->>'pause_ms')::int, 0),
         request = case when parent.run_id is null then etl._resolved_request(v_request, v_run.run_id) else v_request end,
         parameters = (select coalesce(jsonb_object_agg(q.procedure_name, q.parameters) filter (where q.parameters <> '{}'), '{}')
                         from (select distinct on (p.procedure_id) p.procedure_name, p.parameters from etl.procedure_runs p
                                where p.run_id = v_run.run_id order by p.procedure_id) q)
   where r.run_id = v_run.run_id
  returning * into v_run;
  return v_run;
end $$;
comment on function etl._create_backfill(jsonb, etl.runs) is 'Plans a backfill and stores it as a run that this session executes.';
revoke all on function etl._create_backfill(jsonb, etl.runs) from public;

-- The row of the backfill to resume is held until this one is stored: of two that resume the same one, the second finds the first active.
create or replace function etl._begin_backfill(request jsonb, out run_id bigint, out lock_key int, out pause_ms int, out is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run    etl.runs := etl._known_run(request);
  v_parent etl.runs;
begin
  run_id := v_run.run_id;
  is_new := run_id is null;
  if not is_new then return; end if;
  perform etl._drop_holds();
  if not pg_try_advisory_xact_lock_shared(6435443, 0) then
    perform etl._fail('PT409', 'install.active', 'b2s is being upgraded in this database', 'try again in a moment');
  end if;
  if request ? 'resume' then
    perform from etl.runs r where r.run_id = (_begin_backfill.request->>'resume')::bigint for update;
    v_parent := etl._resumable(request);
  end if;
  perform etl._abandon_dead_runs(coalesce(v_parent.pipeline_id, (etl._pipeline(request->>'pipeline')).pipeline_id));
  v_run := etl._create_backfill(request, v_parent);
  run_id := v_run.run_id; lock_key := etl._lock_key(v_run); pause_ms := v_run.pause_ms;
end $$;
comment on function etl._begin_backfill(jsonb) is
  'Plans a backfill and stores it as a run owned by this session, or finds the one that has the same idempotency key. Raises what etl.backfill raises.';
revoke all on function etl._begin_backfill(jsonb) from public;
grant execute on function etl._begin_backfill(jsonb) to etl_admin;
