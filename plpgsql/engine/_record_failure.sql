-- After a scope was rolled back: what failed, what that means for the rest of the run, and whether to try again.

-- Everything that needs one of these scopes, directly or not, and was not started.
create or replace function etl._requiring_scopes(run_id bigint, scope_index int) returns int[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive down(scope_index) as (
    select unnest(s.required_by) from etl.run_scopes s
     where s.run_id = _requiring_scopes.run_id and s.scope_index = _requiring_scopes.scope_index
    union
    select unnest(s.required_by) from down d join etl.run_scopes s on s.run_id = _requiring_scopes.run_id and s.scope_index = d.scope_index
  )
  select array_agg(distinct d.scope_index) from down d
    join etl.procedure_runs p on p.run_id = _requiring_scopes.run_id and p.scope_index = d.scope_index and p.status = 'pending'
$$;
comment on function etl._requiring_scopes(bigint, int) is 'The pending scopes that need one to succeed, transitively, or null.';
revoke all on function etl._requiring_scopes(bigint, int) from public;

-- The new attempt has the same window, parameters and statement. No session takes it up before the delay has passed.
create or replace function etl._prepare_attempt(scope etl.run_scopes, delay_ms float8) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  insert into etl.procedure_runs (run_id, order_index, attempt, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode,
    tx_scope, isolation, parameters, dependencies, statement, rows_column, lock_key, settings, watermark_strategy, state_key, window_since,
    window_until, window_goal, slice_index, definition)
  select p.run_id, p.order_index, p.attempt + 1, p.scope_index, p.procedure_id, p.procedure_name, p.procedure_type, p.group_name, p.mode,
         p.tx_scope, p.isolation, p.parameters, p.dependencies, p.statement, p.rows_column, p.lock_key, p.settings, p.watermark_strategy, p.state_key,
         p.window_since, p.window_until, p.window_goal, p.slice_index, p.definition
    from etl.procedure_runs p
   where p.run_id = scope.run_id and p.order_index between scope.first_order_index and scope.last_order_index and p.attempt = scope.attempt;
  update etl.run_scopes s set attempt = s.attempt + 1, ready_at = clock_timestamp() + delay_ms * interval '1 ms'
   where s.run_id = scope.run_id and s.scope_index = scope.scope_index;
end $$;
comment on function etl._prepare_attempt(etl.run_scopes, float8) is 'Plans the next attempt of a whole scope.';
revoke all on function etl._prepare_attempt(etl.run_scopes, float8) from public;

create or replace function etl._record_step_failure(scope etl.run_scopes, failure jsonb, failed_status text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  -- An error outside every step (a deferred constraint, the serialization probe) belongs to the last one.
  v_failed int := coalesce((failure->>'order_index')::int, scope.last_order_index);
  v_step   etl.procedure_runs;
begin
  for v_step in
    update etl.procedure_runs p
       set status = case when p.order_index = v_failed then failed_status
                         when failed_status = 'cancelled' then 'cancelled' else 'rolled_back' end,
           ended_at = clock_timestamp(), duration_ms = extract(epoch from clock_timestamp() - p.started_at) * 1000,
           error_class = case when p.order_index = v_failed then failure->>'class' end,
           error_code = case when p.order_index = v_failed then failure->>'code' end,
           sqlstate = case when p.order_index = v_failed then failure->>'sqlstate' end,
           error_message = case when p.order_index = v_failed then failure->>'message'
                                else format('rolled back with its group: step %s failed', v_failed) end,
           error_detail = case when p.order_index = v_failed then failure->>'detail' end,
           error_hint = case when p.order_index = v_failed then failure->>'hint' end,
           error_context = case when p.order_index = v_failed then failure->>'context' end,
           blocked_by = case when p.order_index = v_failed then failure->'blocked_by' end
     where p.run_id = scope.run_id and p.order_index between scope.first_order_index and scope.last_order_index
       and p.attempt = scope.attempt
    returning p.*
  loop
    perform etl._announce(etl._step_event('step_' || v_step.status, v_step, jsonb_strip_nulls(jsonb_build_object(
      'duration_ms', v_step.duration_ms, 'error_class', v_step.error_class, 'error_code', v_step.error_code,
      'error_message', v_step.error_message))));
  end loop;
end $$;
comment on function etl._record_step_failure(etl.run_scopes, jsonb, text) is 'Writes the outcome of every step of a scope that was rolled back.';
revoke all on function etl._record_step_failure(etl.run_scopes, jsonb, text) from public;

-- Milliseconds to wait before the next attempt, or null when there is none: exponential with jitter.
create or replace function etl._retry_delay(scope etl.run_scopes, failure jsonb) returns float8
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select least(p.max_backoff_ms, p.backoff_ms * 2.0 ^ (n.attempts - 1)) * (0.5 + random() / 2)
    from etl.procedure_runs s join etl.procedures p using (procedure_id)
    cross join lateral (select count(*) as attempts from etl.procedure_runs a
                         where a.run_id = s.run_id and a.order_index = s.order_index and a.slice_index = s.slice_index) n
   where failure->>'class' = 'transient' and s.run_id = scope.run_id and s.attempt = scope.attempt
     and s.order_index = coalesce((failure->>'order_index')::int, scope.last_order_index) and n.attempts < p.max_attempts
$$;
comment on function etl._retry_delay(etl.run_scopes, jsonb) is 'Milliseconds until the next attempt of a scope, or null when it is not to be tried again.';
revoke all on function etl._retry_delay(etl.run_scopes, jsonb) from public;

create or replace function etl._record_refresh_failure(scope etl.run_scopes, failure jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_refresh etl.mv_refreshes;
begin
  update etl.mv_refreshes m
     set status = case when failure->>'class' = 'cancelled' then 'cancelled' else 'failed' end, ended_at = clock_timestamp(),
         error_code = failure->>'code', error_message = failure->>'message', error_hint = failure->>'hint'
   where m.run_id = scope.run_id and m.scope_index = scope.scope_index
  returning m.* into v_refresh;
  perform etl._announce(jsonb_build_object('event', 'refresh_' || v_refresh.status, 'run_id', v_refresh.run_id,
    'mv_name', v_refresh.mv_name, 'duration_ms', v_refresh.duration_ms, 'error_code', v_refresh.error_code,
    'error_message', v_refresh.error_message));
end $$;
comment on function etl._record_refresh_failure(etl.run_scopes, jsonb) is 'Writes the failure of a refresh; the data stays.';
revoke all on function etl._record_refresh_failure(etl.run_scopes, jsonb) from public;

-- Nobody cancels one statement, or a wait, to see the next one start: an interruption asks the run to stop. Whoever asked
-- first stays on record.
create or replace function etl._note_interruption(run_id bigint, reason text) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  update etl.runs r
     set cancel_requested_at = clock_timestamp(), cancel_requested_by = etl._requester(), cancel_reason = _note_interruption.reason
   where r.run_id = _note_interruption.run_id and r.cancel_requested_at is null and r.ended_at is null
$$;
comment on function etl._note_interruption(bigint, text) is 'Records that a run is to stop because its session was interrupted.';
revoke all on function etl._note_interruption(bigint, text) from public;

-- A statement that etl.watchdog cancelled: that is the step's own failure, and nobody asked the run to stop.
create or replace function etl._timed_out(scope etl.run_scopes, failure jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_timeout_ms bigint;
begin
  if failure->>'class' <> 'cancelled' or scope.kind <> 'steps' then return failure; end if;
  select sum((p.settings->>'timeout_ms')::bigint) into v_timeout_ms
    from etl.procedure_runs p
   where p.run_id = scope.run_id and p.order_index between scope.first_order_index and scope.last_order_index and p.attempt = scope.attempt
     and p.timed_out_at is not null;
  if v_timeout_ms is null then return failure; end if;
  return failure || jsonb_build_object('class', 'timeout', 'code', 'step.timeout', 'message', format('the timeout of %s ms has passed', v_timeout_ms),
    'hint', 'find out what it waited for (etl.step_history, pg_stat_activity), raise timeout, or read less at a time (max_window); then start the run again');
end $$;
comment on function etl._timed_out(etl.run_scopes, jsonb) is 'A failure as it is, or as a timeout when the watchdog had cancelled the step.';
revoke all on function etl._timed_out(etl.run_scopes, jsonb) from public;

-- Like any error that can pass by itself.
create or replace function etl._loss_of(worker_pid int) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('class', 'transient', 'code', 'worker.lost', 'sqlstate', '57P01',
    'message', format('the session that executed the step (backend %s) is gone', worker_pid),
    'hint', 'nothing of the step was kept; another session tries it again')
$$;
comment on function etl._loss_of(int) is 'The failure of a step whose session is gone.';
revoke all on function etl._loss_of(int) from public;

-- Returns the milliseconds to wait before the scope is claimed again, or null: the run goes on with what is left.
create or replace function etl._record_failure(run_id bigint, scope_index int, failure jsonb) returns float8
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set plan_cache_mode = force_generic_plan set jit = off as $$
declare
  v_run   etl.runs := etl._check_owner(run_id);
  v_scope etl.run_scopes;
  v_delay float8;
  v_stops boolean;
  v_is_halved boolean;
  v_pids      int[];
  v_waiting   int[];
  v_locked    int[];
  v_skipped   int[];
begin
  select * into strict v_scope from etl.run_scopes s
   where s.run_id = _record_failure.run_id and s.scope_index = _record_failure.scope_index;
  -- A session ends its own scope, or one whose session is gone: of that, all that is known is that it is gone, whoever says otherwise.
  v_pids := array(select p.worker_pid from etl.procedure_runs p where p.run_id = v_scope.run_id and p.scope_index = v_scope.scope_index and p.status = 'running'
                  union select m.worker_pid from etl.mv_refreshes m where m.run_id = v_scope.run_id and m.scope_index = v_scope.scope_index and m.status = 'running');
  if v_pids = '{}' or v_pids <> array[pg_backend_pid()] and v_pids && array_remove(etl._living_workers(v_run), pg_backend_pid()) then
    perform etl._fail_not_owned(run_id);
  elsif v_pids <> array[pg_backend_pid()] then
    failure := etl._loss_of(v_pids[1]);
  end if;
  -- Whoever cancelled the step holds its rows until what it has noted can be seen.
  if failure->>'class' = 'cancelled' then
    perform from etl.procedure_runs p
      where p.run_id = v_scope.run_id and p.order_index between v_scope.first_order_index and v_scope.last_order_index and p.attempt = v_scope.attempt
        for update;
  end if;
  failure := etl._timed_out(v_scope, failure);
  if failure->>'class' = 'cancelled' and v_run.cancel_requested_at is null then perform etl._note_interruption(run_id, failure->>'message'); end if;
  if v_scope.kind = 'refresh' then
    perform etl._record_refresh_failure(v_scope, failure);
  else
    if v_run.cancel_requested_at is null then
      v_delay := etl._retry_delay(v_scope, failure);
      v_is_halved := v_delay is null and etl._halve_slice(v_scope, failure);
    end if;
    perform etl._record_step_failure(v_scope, failure,
      case when v_delay is not null or v_is_halved then 'retrying' when failure->>'class' = 'cancelled' then 'cancelled' else 'failed' end);
    perform etl._keep_logs(run_id);
    if v_is_halved then return 0; end if;
    if v_delay is not null then
      perform etl._prepare_attempt(v_scope, v_delay);
      return v_delay;
    end if;
  end if;
  select bool_or(p.on_failure = 'stop') into v_stops
    from etl.procedure_runs s join etl.procedures p using (procedure_id)
   where s.run_id = _record_failure.run_id and s.order_index between v_scope.first_order_index and v_scope.last_order_index;
  -- Sessions whose steps fail at the same time do this one after the other, and lock all the scopes it is about in one go, in order.
  perform from etl.runs r where r.run_id = _record_failure.run_id for update;
  v_waiting := etl._requiring_scopes(run_id, scope_index);
  v_locked := scope_index || coalesce(v_waiting, '{}') || case when v_stops then etl._pending_scopes(run_id) else '{}' end;
  perform from etl.run_scopes s
    where s.run_id = _record_failure.run_id
      and s.scope_index = any (v_locked || array(select unnest(e.required_by || e.precedes) from etl.run_scopes e
                                                  where e.run_id = _record_failure.run_id and e.scope_index = any (v_locked)))
    order by s.scope_index for update;
  v_skipped := etl._skip_scopes(run_id, v_waiting, case when failure->>'class' = 'cancelled' then 'cancelled' else 'upstream_failed' end);
  if v_stops then v_skipped := v_skipped || etl._skip_scopes(run_id, etl._pending_scopes(run_id), 'stopped'); end if;
  perform etl._release(run_id, scope_index || v_skipped);
  if v_run.kind = 'backfill' then perform etl._count_chunks(v_run, scope_index); end if;
  return null;
end $$;
comment on function etl._record_failure(bigint, int, jsonb) is
  'Records why a scope was rolled back, skips what needs it, or plans the next attempt. Called by the engine only.';
revoke all on function etl._record_failure(bigint, int, jsonb) from public;
grant execute on function etl._record_failure(bigint, int, jsonb) to etl_operator;
