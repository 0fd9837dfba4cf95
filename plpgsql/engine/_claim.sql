-- Claiming the next scope of a run. Runs in a transaction of its own, committed asynchronously: a crash that loses it
-- loses nothing, and the window it fixes is older than the snapshot in which the data will be read.

-- A scope that ended frees those that wait for it.
create or replace function etl._release(run_id bigint, scope_index int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  v_freed int[];
begin
  select s.required_by || s.precedes into v_freed from etl.run_scopes s
   where s.run_id = _release.run_id and s.scope_index = _release.scope_index;
  if v_freed <> '{}' then
    update etl.run_scopes s set remaining_dependencies = s.remaining_dependencies - 1
     where s.run_id = _release.run_id and s.scope_index = any (v_freed);
  end if;
end $$;
comment on function etl._release(bigint, int) is 'Counts an ended scope down in the scopes that wait for it.';
revoke all on function etl._release(bigint, int) from public;

-- Ends scopes that will not run: their steps and refreshes are skipped, what waits for them is freed.
create or replace function etl._skip_scopes(run_id bigint, scopes int[], reason text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  v_scope int;
begin
  update etl.procedure_runs p set status = 'skipped', skip_reason = reason, ended_at = clock_timestamp()
    from etl.run_scopes s
   where s.run_id = _skip_scopes.run_id and s.scope_index = any (scopes)
     and p.run_id = s.run_id and p.order_index between s.first_order_index and s.last_order_index and p.status = 'pending';
  update etl.mv_refreshes m set status = 'skipped', skip_reason = reason, ended_at = clock_timestamp()
   where m.run_id = _skip_scopes.run_id and m.scope_index = any (scopes) and m.status = 'pending';
  update etl.run_scopes s set status = 'ended' where s.run_id = _skip_scopes.run_id and s.scope_index = any (scopes);
  foreach v_scope in array coalesce(scopes, '{}') loop
    perform etl._release(run_id, v_scope);
  end loop;
end $$;
comment on function etl._skip_scopes(bigint, int[], text) is 'Skips scopes that were not started, with a reason, and frees what waits for them.';
revoke all on function etl._skip_scopes(bigint, int[], text) from public;

create or replace function etl._skip_pending(run_id bigint, reason text) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select etl._skip_scopes(_skip_pending.run_id, array_agg(s.scope_index), _skip_pending.reason)
    from etl.run_scopes s where s.run_id = _skip_pending.run_id and s.status = 'pending' and s.kind <> 'barrier'
$$;
comment on function etl._skip_pending(bigint, text) is 'Skips everything of a run that was not started.';
revoke all on function etl._skip_pending(bigint, text) from public;

-- Takes the first scope after the one given that waits for nothing; from the start when there is none after it.
-- A barrier has nothing to run: taking it ends it.
create or replace function etl._take_scope(run_id bigint, after_scope int) returns etl.run_scopes
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  v_scope etl.run_scopes;
begin
  update etl.run_scopes t
     set status = case t.kind when 'barrier' then 'ended' else 'running' end, worker_pid = pg_backend_pid()
   where t.run_id = _take_scope.run_id and t.scope_index = (
     select s.scope_index from etl.run_scopes s
      where s.run_id = _take_scope.run_id and s.scope_index > after_scope and s.status = 'pending' and s.remaining_dependencies = 0
      order by s.scope_index limit 1 for update skip locked)
  returning t.* into v_scope;
  if v_scope.scope_index is null and after_scope > 0 then return etl._take_scope(run_id, 0); end if;
  return v_scope;
end $$;
comment on function etl._take_scope(bigint, int) is 'Claims the next scope that is ready, or returns null.';
revoke all on function etl._take_scope(bigint, int) from public;

-- Why a refresh must not happen, or null.
create or replace function etl._refresh_skip_reason(run_id bigint, scope_index int) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'upstream_failed'
    from etl.mv_refreshes m
   where m.run_id = _refresh_skip_reason.run_id and m.scope_index = _refresh_skip_reason.scope_index
     and (m.refresh_on = 'success' and exists (
            select from unnest(m.feeders) f(order_index)
             where not exists (select from etl.procedure_runs p
                                where p.run_id = m.run_id and p.order_index = f.order_index and p.status = 'succeeded'))
          or exists (select from etl.mv_refreshes d
                      where d.run_id = m.run_id and d.scope_index = any (m.depends_on) and d.status <> 'succeeded'))
$$;
comment on function etl._refresh_skip_reason(bigint, int) is 'upstream_failed when a refresh must be skipped, else null.';
revoke all on function etl._refresh_skip_reason(bigint, int) from public;

create or replace function etl._start_scope(run etl.runs, scope etl.run_scopes) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  v_step etl.procedure_runs;
begin
  if scope.kind = 'refresh' then
    update etl.mv_refreshes m set status = 'running', started_at = clock_timestamp()
     where m.run_id = run.run_id and m.scope_index = scope.scope_index;
    return;
  end if;
  for v_step in
    update etl.procedure_runs p set status = 'running', started_at = clock_timestamp()
     where p.run_id = run.run_id and p.order_index between scope.first_order_index and scope.last_order_index
       and p.attempt = scope.attempt
    returning p.*
  loop
    if v_step.watermark_strategy is not null and v_step.window_until is null then
      perform etl._fix_window(v_step, run.as_of);
    end if;
    if current_setting('b2s.progress', true) = 'json' then
      perform etl._announce(jsonb_build_array(etl._step_event('step_started', v_step)));
    end if;
  end loop;
  if v_step.order_index is null then
    raise exception 'scope % of run % has no step to run', scope.scope_index, run.run_id;
  end if;
  perform set_config('application_name', format('b2s run %s %s', run.run_id, v_step.procedure_name), false);
end $$;
comment on function etl._start_scope(etl.runs, etl.run_scopes) is 'Marks the steps of a claimed scope running and fixes their windows.';
revoke all on function etl._start_scope(etl.runs, etl.run_scopes) from public;

-- ended_scope: the scope whose data this session has just committed; events: what to tell about it.
-- action: run (scope_index, kind and isolation say what) or done.
create or replace function etl._claim(run_id bigint, ended_scope int, events jsonb,
  out action text, out scope_index int, out kind text, out isolation text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run    etl.runs := etl._check_owner(run_id);
  v_scope  etl.run_scopes;
  v_reason text;
begin
  if events <> '[]' then perform etl._announce(events); end if;
  if ended_scope is not null then perform etl._release(run_id, ended_scope); end if;
  if v_run.cancel_requested_at is not null then perform etl._skip_pending(run_id, 'cancelled'); end if;
  loop
    v_scope := etl._take_scope(run_id, coalesce(ended_scope, 0));
    if v_scope.scope_index is null then
      perform etl._finish_run(v_run);
      action := 'done';
      return;
    end if;
    if v_scope.kind = 'barrier' then
      perform etl._release(run_id, v_scope.scope_index);
      continue;
    end if;
    if v_scope.kind = 'refresh' then
      v_reason := etl._refresh_skip_reason(run_id, v_scope.scope_index);
      if v_reason is not null then
        perform etl._skip_scopes(run_id, array[v_scope.scope_index], v_reason);
        continue;
      end if;
    end if;
    exit;
  end loop;
  perform etl._start_scope(v_run, v_scope);
  perform set_config('synchronous_commit', 'off', true);
  action := 'run'; scope_index := v_scope.scope_index; kind := v_scope.kind; isolation := v_scope.isolation;
end $$;
comment on function etl._claim(bigint, int, jsonb) is
  'Claims the next scope of a run for this session, or ends the run when none is left. Called by the engine only.';
revoke all on function etl._claim(bigint, int, jsonb) from public;
grant execute on function etl._claim(bigint, int, jsonb) to etl_operator;
