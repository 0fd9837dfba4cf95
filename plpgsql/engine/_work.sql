-- Several sessions on one run, and runs that wait in a queue. Each session that executes a run shares its lock.

-- A queued run is planned when it is taken up, on behalf of whoever asked for it; when that fails, so does the run.
create or replace function etl._start_queued(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_plan    record;
  v_sqlstate text; v_message text; v_detail text;
begin
  begin
    v_plan := etl._plan(run.request, coalesce(run.requested_role, run.requested_by));
    if etl._needs_approval(run.pipeline_id, run.request) and etl._approver(run, coalesce(run.subject, run.session_user_name)) is null then
      perform etl._fail_unapproved(run.run_id);
    end if;
  exception when others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail;
    update etl.runs r
       set status = 'failed', started_at = clock_timestamp(), ended_at = clock_timestamp(), error_message = v_message,
           error_code = coalesce(substring(v_detail from '"code": "([^"]+)"'), v_sqlstate)
     where r.run_id = run.run_id;
    raise warning 'run %, which was queued, cannot start: %', run.run_id, v_message;
    return false;
  end;
  update etl.runs r
     set status = 'running', started_at = clock_timestamp(), worker_pid = pg_backend_pid(), max_concurrency = v_plan.max_concurrency,
         step_count = (select count(*) from unnest(v_plan.items) i where i.kind = 'steps'),
         config_version_id = (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = run.pipeline_id)
   where r.run_id = run.run_id;
  perform etl._insert_scopes(run.run_id, v_plan.items);
  perform etl._insert_steps(run.run_id, v_plan.items);
  return true;
end $$;
comment on function etl._start_queued(etl.runs) is 'Plans a queued run and makes this session its worker; false when its plan fails, which ends it.';
revoke all on function etl._start_queued(etl.runs) from public;

-- The row of the run makes those that want to join wait for each other; its lock, taken before the next one counts, counts at once.
create or replace function etl._join_run(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_alive int[];
begin
  perform from etl.runs r where r.run_id = run.run_id and r.status = 'running' for update;
  if not found then return false; end if;
  v_alive := etl._living_workers(run);
  if v_alive = '{}' or cardinality(v_alive) >= run.max_concurrency or pg_backend_pid() = any (v_alive)
     or not pg_try_advisory_xact_lock_shared(6435443, 0) or not pg_try_advisory_xact_lock_shared(6435444, etl._lock_key(run)) then
    return false;
  end if;
  insert into etl.run_workers (run_id, pid) values (run.run_id, pg_backend_pid())
  on conflict on constraint run_workers_pkey do update set joined_at = clock_timestamp();
  -- To choose among more than that would cost more than it gains.
  if run.step_count <= 1000 then
    update etl.runs r set scope_ranks = etl._scope_ranks(r.run_id) where r.run_id = run.run_id and r.scope_ranks is null;
  end if;
  return true;
end $$;
comment on function etl._join_run(etl.runs) is 'Makes this session a worker of an active run; false when it has as many as it may have, or is dead.';
revoke all on function etl._join_run(etl.runs) from public;

-- Another session that asks to begin a run, and is refused, holds the lock for a moment.
create or replace function etl._may_begin(pipeline_id int) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  for i in 1 .. 20 loop
    exit when pg_try_advisory_xact_lock(6435443, pipeline_id);
    if i = 20 then return false; end if;
    perform pg_sleep(0.005);
  end loop;
  perform etl._abandon_dead_runs(pipeline_id);
  return not exists (select from etl.runs r where r.pipeline_id = _may_begin.pipeline_id and r.status = 'running' and r.kind = 'run');
end $$;
comment on function etl._may_begin(int) is 'Makes this transaction the only one that may begin a run of a pipeline; false when there is another one, or an active run.';
revoke all on function etl._may_begin(int) from public;

-- What there is to do: the active run, else the oldest that waits. Null run_id: nothing, or nothing that this session may do.
create or replace function etl._enlist(pipeline text, wanted_run_id bigint, out run_id bigint, out lock_key int, out pause_ms int)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_wanted      etl.runs;
  v_pipeline_id int;
  v_run         etl.runs;
begin
  if wanted_run_id is not null then
    select * into v_wanted from etl.runs r where r.run_id = wanted_run_id;
    if not found then perform etl._fail('PT404', 'run.unknown', format('there is no run %s', wanted_run_id), 'which there are: select * from etl.run_history'); end if;
  end if;
  if etl._awaits_approval(v_wanted) then perform etl._fail_unapproved(wanted_run_id); end if;
  v_pipeline_id := coalesce(v_wanted.pipeline_id, (etl._pipeline(pipeline)).pipeline_id);
  perform etl._drop_holds();
  select * into v_run from etl.runs r where r.pipeline_id = v_pipeline_id and r.status = 'running' and r.kind = 'run';
  if v_run.run_id is null then
    -- Another worker may just be taking up the oldest one: wait until it has, and help it.
    perform from etl.runs r
      where r.pipeline_id = v_pipeline_id and r.status = 'queued' and (r.run_id = wanted_run_id or wanted_run_id is null)
        and not etl._awaits_approval(r) order by r.run_id limit 1 for update;
    select * into v_run from etl.runs r where r.pipeline_id = v_pipeline_id and r.status = 'running' and r.kind = 'run';
  end if;
  if v_run.run_id is not null and etl._is_alive(v_run) then
    if (wanted_run_id is null or wanted_run_id = v_run.run_id) and etl._join_run(v_run) then run_id := v_run.run_id; end if;
  else
    for v_run in
      select * from etl.runs r
       where r.pipeline_id = v_pipeline_id and r.status = 'queued' and (r.run_id = wanted_run_id or wanted_run_id is null)
         and not etl._awaits_approval(r)
       order by r.run_id for update skip locked
    loop
      exit when not pg_try_advisory_xact_lock_shared(6435443, 0) or not etl._may_begin(v_pipeline_id);
      if etl._start_queued(v_run) then
        run_id := v_run.run_id;
        exit;
      end if;
    end loop;
  end if;
  if run_id is not null then lock_key := etl._lock_key(v_run); pause_ms := v_run.pause_ms; end if;
end $$;
comment on function etl._enlist(text, bigint) is
  'Makes this session a worker of the active run of a pipeline, or of the oldest queued one; null when there is none for it. Called by etl.work.';
revoke all on function etl._enlist(text, bigint) from public;
grant execute on function etl._enlist(text, bigint) to etl_operator;
