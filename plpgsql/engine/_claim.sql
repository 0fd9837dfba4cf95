-- Claiming the next scope of a run. Runs in a transaction of its own, committed asynchronously: a crash that loses it
-- loses nothing, and the window it fixes is older than the snapshot in which the data will be read.
--
-- etl._claim turns off every plan but the index scan, and replanning, for all that it calls: every statement here is a
-- primary-key access, planned once per session. Left alone, the server plans some anew for every step (200 us), or sorts a
-- whole run, of which it has no statistics yet, to find the next scope (2,000 us). jit is off wherever a kind of plan is, as
-- the server takes the penalty for a large query.

-- Scopes that ended free those that wait for them, once: one that is passed has done so. Whoever ended a scope releases it; for
-- a session that died before it could, another one does (etl._recover_lost_scope). One statement, whose index scan takes the rows
-- in ascending order, so that sessions cannot wait for each other in a circle.
create or replace function etl._release(run_id bigint, scopes int[]) returns boolean
language plpgsql volatile as $$
declare
  v_freed int[];
begin
  select array_agg(f.scope_index) into v_freed
    from etl.run_scopes s cross join lateral unnest(s.required_by || s.precedes) f(scope_index)
   where s.run_id = _release.run_id and s.scope_index = any (scopes) and not s.is_passed;
  if v_freed is null then return false; end if;
  update etl.run_scopes s
     set remaining_dependencies = s.remaining_dependencies - coalesce(cardinality(array_positions(v_freed, s.scope_index)), 0),
         is_passed = s.is_passed or s.scope_index = any (scopes)
   where s.run_id = _release.run_id and s.scope_index = any (v_freed || scopes);
  return true;
end $$;
comment on function etl._release(bigint, int[]) is 'Counts ended scopes down in the scopes that wait for them; false when nothing did.';
revoke all on function etl._release(bigint, int[]) from public;

-- Ends scopes that will not run: their steps and refreshes are skipped. The caller frees what waits for those that are returned;
-- another session may just have taken, or skipped, the others.
create or replace function etl._skip_scopes(run_id bigint, scopes int[], reason text) returns int[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_skipped int[];
begin
  with steps as (
    update etl.procedure_runs p set status = 'skipped', skip_reason = reason, ended_at = clock_timestamp()
      from etl.run_scopes s
     where s.run_id = _skip_scopes.run_id and s.scope_index = any (scopes)
       and p.run_id = s.run_id and p.order_index between s.first_order_index and s.last_order_index and p.status = 'pending'
    returning p.scope_index
  ), refreshes as (
    update etl.mv_refreshes m set status = 'skipped', skip_reason = reason, ended_at = clock_timestamp()
     where m.run_id = _skip_scopes.run_id and m.scope_index = any (scopes) and m.status = 'pending'
    returning m.scope_index
  )
  select coalesce(array_agg(distinct q.scope_index), '{}') into v_skipped from (select * from steps union all select * from refreshes) q;
  return v_skipped;
end $$;
comment on function etl._skip_scopes(bigint, int[], text) is 'Skips scopes that were not started, with a reason; returns those it has skipped.';
revoke all on function etl._skip_scopes(bigint, int[], text) from public;

-- Scopes whose steps or refresh were not started.
create or replace function etl._pending_scopes(run_id bigint) returns int[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  select array_agg(q.scope_index) from (
    select p.scope_index from etl.procedure_runs p where p.run_id = _pending_scopes.run_id and p.status = 'pending'
    union select m.scope_index from etl.mv_refreshes m where m.run_id = _pending_scopes.run_id and m.status = 'pending') q
$$;
comment on function etl._pending_scopes(bigint) is 'The scopes of a run that were not started, or null.';
revoke all on function etl._pending_scopes(bigint) from public;

create or replace function etl._is_ready(scope etl.run_scopes) returns boolean
language plpgsql volatile as $$
begin
  if scope.ready_at > clock_timestamp() then return false; end if;
  case scope.kind
    when 'steps' then return exists (
      select from etl.procedure_runs p
       where p.run_id = scope.run_id and p.order_index = scope.first_order_index and p.attempt = scope.attempt and p.status = 'pending');
    when 'refresh' then return exists (
      select from etl.mv_refreshes m where m.run_id = scope.run_id and m.scope_index = scope.scope_index and m.status = 'pending');
    else return true;
  end case;
end $$;
comment on function etl._is_ready(etl.run_scopes) is 'Whether a scope that waits for no other one can be started now.';
revoke all on function etl._is_ready(etl.run_scopes) from public;

-- Where the scopes of a run are ranked: the ready one with the highest rank. Else the first ready one after the one given, or of all
-- when there is none after it. One that another session is just taking is passed over.
create or replace function etl._next_scope(run etl.runs, after_scope int) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope etl.run_scopes;
begin
  if run.scope_ranks is not null then
    select s.* into v_scope
      from etl.run_scopes s
     where s.run_id = run.run_id and s.remaining_dependencies = 0 and not s.is_passed and etl._is_ready(s)
     order by run.scope_ranks[s.scope_index] desc, s.scope_index limit 1 for update of s skip locked;
  else
    select s.* into v_scope
      from etl.run_scopes s
     where s.run_id = run.run_id and s.scope_index > after_scope and s.remaining_dependencies = 0 and not s.is_passed and etl._is_ready(s)
     order by s.scope_index limit 1 for update of s skip locked;
    if v_scope.scope_index is null and after_scope > 0 then return etl._next_scope(run, 0); end if;
  end if;
  return v_scope;
end $$;
comment on function etl._next_scope(etl.runs, int) is 'The next scope that is ready to start, its row locked, or null.';
revoke all on function etl._next_scope(etl.runs, int) from public;

-- Why a refresh must not happen, or null.
create or replace function etl._refresh_skip_reason(run_id bigint, scope_index int) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'upstream_failed'
    from etl.mv_refreshes m
   where m.run_id = _refresh_skip_reason.run_id and m.scope_index = _refresh_skip_reason.scope_index
     and (m.refresh_on = 'success' and exists (
            select from unnest(m.feeders) f(order_index)
             where not exists (select from etl.procedure_runs p
                                where p.run_id = m.run_id and p.order_index = f.order_index
                                  and (p.status = 'succeeded' or p.skip_reason in ('no_data', 'reused'))))
          or exists (select from etl.mv_refreshes d
                      where d.run_id = m.run_id and d.scope_index = any (m.depends_on) and d.status <> 'succeeded'
                         and d.skip_reason is distinct from 'reused'))
$$;
comment on function etl._refresh_skip_reason(bigint, int) is 'upstream_failed when a refresh must be skipped, else null.';
revoke all on function etl._refresh_skip_reason(bigint, int) from public;

-- What the start of a scope's steps brings with it: windows, and news for clients that follow.
create or replace function etl._open_steps(run etl.runs, scope etl.run_scopes) returns void
language plpgsql volatile as $$
declare
  v_step etl.procedure_runs;
begin
  for v_step in
    select * from etl.procedure_runs p
     where p.run_id = run.run_id and p.order_index between scope.first_order_index and scope.last_order_index and p.attempt = scope.attempt
     order by p.order_index
  loop
    if v_step.watermark_strategy is not null and v_step.window_until is null then
      perform etl._fix_window(run, v_step.order_index, scope.attempt);
    end if;
    if current_setting('b2s.progress', true) = 'json' then perform etl._announce(etl._step_event('step_started', v_step)); end if;
  end loop;
end $$;
comment on function etl._open_steps(etl.runs, etl.run_scopes) is 'Fixes the windows of the steps of a scope and announces them to clients that follow.';
revoke all on function etl._open_steps(etl.runs, etl.run_scopes) from public;

-- Takes a scope for this session. Another session may have taken it since it was seen pending: then nothing is updated.
create or replace function etl._take_scope(run etl.runs, scope etl.run_scopes) returns boolean
language plpgsql volatile as $$
declare
  v_has_window boolean;
begin
  if scope.kind = 'refresh' then
    update etl.mv_refreshes m set status = 'running', worker_pid = pg_backend_pid(), started_at = clock_timestamp()
     where m.run_id = run.run_id and m.scope_index = scope.scope_index and m.status = 'pending';
    return found;
  end if;
  update etl.procedure_runs p set status = 'running', worker_pid = pg_backend_pid(), started_at = clock_timestamp()
   where p.run_id = run.run_id and p.order_index = scope.first_order_index and p.attempt = scope.attempt and p.status = 'pending'
  returning p.watermark_strategy is not null into v_has_window;
  if not found then return false; end if;
  if scope.first_order_index < scope.last_order_index then
    update etl.procedure_runs p set status = 'running', worker_pid = pg_backend_pid(), started_at = clock_timestamp()
     where p.run_id = run.run_id and p.order_index > scope.first_order_index and p.order_index <= scope.last_order_index
       and p.attempt = scope.attempt;
  elsif not v_has_window and current_setting('b2s.progress', true) is distinct from 'json' then
    return true;
  end if;
  perform etl._open_steps(run, scope);
  -- Steps whose window holds no row may have been skipped; when nothing is left of the scope, what waits for it goes on.
  if exists (select from etl.procedure_runs p
              where p.run_id = run.run_id and p.order_index between scope.first_order_index and scope.last_order_index
                and p.attempt = scope.attempt and p.status = 'running') then return true; end if;
  perform etl._release(run.run_id, array[scope.scope_index]);
  return false;
end $$;
comment on function etl._take_scope(etl.runs, etl.run_scopes) is
  'Marks the steps or the refresh of a scope running in this session and fixes windows; false when another session was faster, or nothing was left to run.';
revoke all on function etl._take_scope(etl.runs, etl.run_scopes) from public;

-- The next scope that can be taken, taken: past barriers and refreshes that must not happen. Null when none is left.
create or replace function etl._take_next(run etl.runs, after_scope int) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope  etl.run_scopes;
  v_reason text;
begin
  loop
    v_scope := etl._next_scope(run, after_scope);
    if v_scope.kind = 'barrier' then
      perform etl._release(run.run_id, array[v_scope.scope_index]);
      continue;
    end if;
    if v_scope.kind = 'refresh' then
      v_reason := etl._refresh_skip_reason(run.run_id, v_scope.scope_index);
      if v_reason is not null then
        perform etl._release(run.run_id, etl._skip_scopes(run.run_id, array[v_scope.scope_index], v_reason));
        continue;
      end if;
    end if;
    if v_scope.scope_index is null or etl._take_scope(run, v_scope) then return v_scope; end if;
  end loop;
end $$;
comment on function etl._take_next(etl.runs, int) is 'Takes the next scope of a run that is ready; null when none is left.';
revoke all on function etl._take_next(etl.runs, int) from public;

-- What was not started is skipped, and frees what waits for it. Its rows are locked at once or not at all: a session that waited
-- here, for others that have just freed or taken scopes, could have them wait for it in turn.
create or replace function etl._cancel_pending(run_id bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_skipped int[];
begin
  begin
    perform from etl.run_scopes s where s.run_id = _cancel_pending.run_id and not s.is_passed order by s.scope_index for update nowait;
  exception when lock_not_available then
    return null;
  end;
  v_skipped := etl._skip_scopes(run_id, etl._pending_scopes(run_id), 'cancelled');
  perform etl._release(run_id, v_skipped);
  return v_skipped <> '{}';
end $$;
comment on function etl._cancel_pending(bigint) is
  'Skips every scope of a run that was not started because the run is to stop; false when there was none left, null when others are just busy with them.';
revoke all on function etl._cancel_pending(bigint) from public;

create or replace function etl._has_worked(run etl.runs) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select run.worker_pid = pg_backend_pid() or exists (select from etl.run_workers w where w.run_id = run.run_id and w.pid = pg_backend_pid())
$$;
comment on function etl._has_worked(etl.runs) is 'Whether this session has executed a run, which another one may have ended since.';
revoke all on function etl._has_worked(etl.runs) from public;

-- Sessions that died left scopes running, or ended and not released. Whoever looks executes nothing itself: what bears its own
-- number it left behind in a CALL that was interrupted.
create or replace function etl._lost_scopes(run etl.runs) returns table (scope_index int, worker_pid int, is_running boolean)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  -- Its own snapshot, younger than the one that saw them at work: who was alive then and is gone now is gone.
  v_alive int[];
begin
  for scope_index, worker_pid, is_running in
    select s.scope_index, max(w.worker_pid), bool_or(w.status = 'running')
      from etl.run_scopes s
      join (select p.scope_index, p.worker_pid, p.status, p.attempt from etl.procedure_runs p where p.run_id = run.run_id
            union all
            select m.scope_index, m.worker_pid, m.status, 1 from etl.mv_refreshes m where m.run_id = run.run_id) w
        on w.scope_index = s.scope_index and w.attempt = s.attempt
     where s.run_id = run.run_id and not s.is_passed and w.worker_pid is not null
       and (w.status = 'running' or w.status = 'succeeded' and s.required_by || s.precedes <> '{}')
     group by s.scope_index
  loop
    v_alive := coalesce(v_alive, array_remove(etl._living_workers(run), pg_backend_pid()));
    if worker_pid <> all (v_alive) then return next; end if;
  end loop;
end $$;
comment on function etl._lost_scopes(etl.runs) is 'Scopes that a session has left behind: running, or ended and not released.';
revoke all on function etl._lost_scopes(etl.runs) from public;

create or replace function etl._is_running(run_id bigint, scope_index int) returns boolean
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select exists (select from etl.procedure_runs p where p.run_id = _is_running.run_id and p.scope_index = _is_running.scope_index and p.status = 'running')
      or exists (select from etl.mv_refreshes m where m.run_id = _is_running.run_id and m.scope_index = _is_running.scope_index and m.status = 'running')
$$;
comment on function etl._is_running(bigint, int) is 'Whether a scope has been taken and not ended.';
revoke all on function etl._is_running(bigint, int) from public;

-- What was running is recorded as lost, so that it is tried again. One scope at a time, each in a
-- transaction that locks no other scopes before: or sessions could wait for each other in a circle.
create or replace function etl._recover_lost_scope(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_lost record;
begin
  if not exists (select from etl._lost_scopes(run)) then return false; end if;
  perform from etl.runs r where r.run_id = run.run_id for update;
  select * into v_lost from etl._lost_scopes(run) l order by l.scope_index limit 1;
  if not v_lost.is_running then
    perform etl._release(run.run_id, array[v_lost.scope_index]);
  -- What a dead session did is final now: it may have ended the scope after it was seen at work.
  elsif etl._is_running(run.run_id, v_lost.scope_index) then
    perform etl._record_failure(run.run_id, v_lost.scope_index, etl._loss_of(v_lost.worker_pid));
  end if;
  return true;
end $$;
comment on function etl._recover_lost_scope(etl.runs) is 'Has a step of a worker that died tried again, by those that are alive; false when there is none.';
revoke all on function etl._recover_lost_scope(etl.runs) from public;

-- Nothing is running, nothing is ready, and nobody else is there to change that. While the run is locked, nobody joins it.
create or replace function etl._is_stuck(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if etl._living_workers(run) <> array[pg_backend_pid()] then return false; end if;
  perform from etl.runs r where r.run_id = run.run_id and r.status = 'running' for update;
  if not found then return false; end if;
  return etl._living_workers(run) = array[pg_backend_pid()]
    and exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.ended_at is null
                union all select from etl.mv_refreshes m where m.run_id = run.run_id and m.ended_at is null)
    and not exists (select from etl._lost_scopes(run))
    and not exists (select from etl.run_scopes s where s.run_id = run.run_id and s.ready_at > clock_timestamp())
    and (etl._next_scope(run, 0)).scope_index is null;
end $$;
comment on function etl._is_stuck(etl.runs) is 'Whether a run can never go on: only when the helpers of the engine were called out of turn.';
revoke all on function etl._is_stuck(etl.runs) from public;

-- When nothing is ready: the end of the run, or another session is at work on what is left.
create or replace function etl._end_or_wait(run etl.runs, is_idle boolean) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope etl.run_scopes;
begin
  if not exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.ended_at is null)
     and not exists (select from etl.mv_refreshes m where m.run_id = run.run_id and m.ended_at is null) then
    perform from etl.runs r where r.run_id = run.run_id and r.status = 'running' for update;
    if found then perform etl._finish_run(run); end if;
  -- Whoever has just ended a scope has none at work: the helpers were called by hand, and a step was passed by.
  elsif not is_idle and exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.status = 'running' and p.worker_pid = pg_backend_pid()) then
    perform etl._fail_not_owned(run.run_id);
  else
    if is_idle and not etl._recover_lost_scope(run) and etl._is_stuck(run) then perform etl._fail_not_owned(run.run_id); end if;
    v_scope.scope_index := 0;
  end if;
  return v_scope;
end $$;
comment on function etl._end_or_wait(etl.runs, boolean) is
  'Ends a run of which nothing is left, then null; scope 0 when there is something to wait for. is_idle: this session has just looked before, and freed nothing.';
revoke all on function etl._end_or_wait(etl.runs, boolean) from public;

-- done: what _execute_scope or _execute_refresh returned for the scope that this session has just committed, or null.
-- is_awaited: whether anything waits for that scope. Null when the run has ended; scope 0 when others execute what is left.
-- As a rule the next scope in order is ready, so a session alone tries it first.
create or replace function etl._claim(run_id bigint, done jsonb, is_awaited boolean) returns etl.run_scopes
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off
  set enable_sort = off set plan_cache_mode = force_generic_plan set jit = off as $$
declare
  v_found   record;
  v_run     etl.runs;
  v_ended   int := coalesce((done->>'scope_index')::int, 0);
  -- A slice was committed, and the next one of the same step follows.
  v_is_over boolean := not coalesce(done ? 'goes_on', false);
  v_is_idle boolean := done is null;
  v_is_skipped boolean;
  v_scope   etl.run_scopes;
  v_event   jsonb;
  v_is_set  boolean;
  v_is_worker boolean;
begin
  select r as run, exists (select from etl.run_workers w where w.run_id = r.run_id) as is_shared into v_found from etl.runs r where r.run_id = _claim.run_id;
  v_run := v_found.run;
  v_is_worker := coalesce(etl._is_owner(v_run), false) or coalesce(v_found.is_shared, false) and etl._is_helper(v_run);
  if not v_is_worker and not (v_run.ended_at is not null and etl._has_worked(v_run)) then perform etl._fail_not_owned(run_id); end if;
  for i in 0 .. coalesce(jsonb_array_length(done->'events'), 0) - 1 loop
    v_event := done->'events'->i;
    v_is_set := etl._announce(v_event);
    if v_event ? 'relations' then perform etl._record_observation(run_id, v_event); end if;
  end loop;
  -- Lines from blocks of routines that were rolled back and caught; here because another session has ended the run, else at the end.
  if not v_is_worker then
    perform etl._keep_logs(run_id);
    return null;
  end if;
  if is_awaited and v_is_over then v_is_set := etl._release(run_id, array[v_ended]); end if;
  if v_run.kind = 'backfill' and v_ended - v_run.counted_until >= 100 then perform etl._count_chunks(v_run, v_ended); end if;
  if v_run.cancel_requested_at is not null then
    v_is_skipped := etl._cancel_pending(run_id);
    if v_is_skipped is null then
      v_scope.scope_index := 0;
      return v_scope;
    end if;
    v_is_idle := v_is_idle and not v_is_skipped;
  end if;
  if not v_found.is_shared then
    select * into v_scope from etl.run_scopes s
     where s.run_id = _claim.run_id and s.scope_index = v_ended + v_is_over::int and s.kind = 'steps' and s.remaining_dependencies = 0;
  end if;
  if v_scope.scope_index is null or not etl._take_scope(v_run, v_scope) then v_scope := etl._take_next(v_run, v_ended); end if;
  if v_scope.scope_index is null then v_scope := etl._end_or_wait(v_run, v_is_idle); end if;
  if v_scope.scope_index is not null then
    v_is_set := set_config('synchronous_commit', 'off', true) is not null;
  else
    perform etl._keep_logs(run_id);
  end if;
  return v_scope;
end $$;
comment on function etl._claim(bigint, jsonb, boolean) is
  'Claims the next scope of a run for this session; null when there is none left and the run has been ended. Called by the engine only.';
revoke all on function etl._claim(bigint, jsonb, boolean) from public;
grant execute on function etl._claim(bigint, jsonb, boolean) to etl_operator;
