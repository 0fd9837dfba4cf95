-- A run that did not get to its end, taken up again: what succeeded is kept, the rest is done with the same windows and parameters.

-- Whoever may run it may resume it; a full refresh keeps its guardrails.
create or replace function etl._resumable_run(wanted_run_id bigint) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = wanted_run_id;
  if not found then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', wanted_run_id), 'which there are: select * from etl.run_history');
  elsif v_run.kind = 'backfill' then
    perform etl._fail('PT422', 'run.not_resumable', format('run %s is a backfill', wanted_run_id), format('call etl.backfill(resume => %s)', wanted_run_id));
  elsif v_run.status = 'queued' then
    perform etl._fail('PT409', 'run.queued', format('run %s has not begun', wanted_run_id), format('call etl.work(run_id => %s)', wanted_run_id));
  end if;
  perform etl._acquire(v_run.pipeline_id);
  -- From here on it cannot be purged; it may have been while that was waited for.
  select * into v_run from etl.runs r where r.run_id = wanted_run_id for key share;
  if not found then
    perform etl._fail('PT404', 'run.unknown', format('run %s has just been purged', wanted_run_id), 'which there are: select * from etl.run_history');
  elsif v_run.status in ('succeeded', 'completed_with_warnings') then
    perform etl._fail('PT409', 'run.nothing_left', format('run %s has %s: nothing is left to do', wanted_run_id, replace(v_run.status, '_', ' ')),
      'start another run: call etl.start_run()');
  elsif not exists (select from etl.procedure_runs p where p.run_id = wanted_run_id) then
    perform etl._fail('PT409', 'run.nothing_left', format('run %s ended before it was planned', wanted_run_id), 'repeat the request: call etl.start_run()');
  end if;
  return v_run;
end $$;
comment on function etl._resumable_run(bigint) is
  'The run to resume; this session holds its lock then. Raises PT404 run.unknown, PT422 run.not_resumable, PT409 run.active, run.queued or run.nothing_left.';
revoke all on function etl._resumable_run(bigint) from public;

-- The last attempt of each step, how it ended, and the configuration as it is now. A row of the table itself: Postgres 15 crashes
-- where a function in SQL returns one of a subquery as that type.
create or replace function etl._steps_to_resume(parent etl.runs)
returns table (step etl.procedure_runs, procedure etl.procedures, is_done boolean, is_changed boolean)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select s, p, s.status = 'succeeded' or coalesce(s.skip_reason in ('no_data', 'reused'), false), etl._definition(p) is distinct from s.definition
    from etl.procedure_runs s
    left join etl.procedures p on p.procedure_id = s.procedure_id and p.is_active
   where s.run_id = parent.run_id
     and s.attempt = (select max(x.attempt) from etl.procedure_runs x where x.run_id = s.run_id and x.order_index = s.order_index)
   order by s.order_index
$$;
comment on function etl._steps_to_resume(etl.runs) is 'The steps of a run that is resumed, whether each is done, and whether its definition has changed since.';
revoke all on function etl._steps_to_resume(etl.runs) from public;

create or replace function etl._check_resume(parent etl.runs, changed_steps text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_gone    text[];
  v_changed text[];
  v_new     text[];
begin
  if changed_steps not in ('reuse', 'rerun') then
    perform etl._fail('PT422', 'request.invalid', format('changed_steps is reuse or rerun, not %s', changed_steps), 'changed_steps => ''reuse''');
  end if;
  select array_agg((s.step).procedure_name) filter (where not s.is_done and (s.procedure).procedure_id is null),
         array_agg((s.step).procedure_name) filter (where s.is_done and s.is_changed and (s.procedure).procedure_id is not null),
         array_agg((s.step).procedure_name) filter (where not s.is_done and s.is_changed)
    into v_gone, v_changed, v_new
    from etl._steps_to_resume(parent) s;
  if v_gone is not null then
    perform etl._fail('PT404', 'procedure.unknown', format('%s is left to do and no longer configured', array_to_string(v_gone, ', ')),
      'start another run: call etl.start_run()', jsonb_build_object('steps', v_gone));
  elsif v_changed is not null and changed_steps is null then
    perform etl._fail('PT409', 'run.definition_changed', format('%s succeeded in run %s and has changed since', array_to_string(v_changed, ', '), parent.run_id),
      'say what is to be done: changed_steps => ''reuse'' keeps what it did, ''rerun'' does it again with the same window', jsonb_build_object('steps', v_changed));
  end if;
  if v_new is not null then
    raise notice 'changed since run %, and run as it is now: %', parent.run_id, array_to_string(v_new, ', ');
  end if;
end $$;
comment on function etl._check_resume(etl.runs, text) is
  'Raises PT404 procedure.unknown and PT409 run.definition_changed; names steps that are run in another form than the one that did not succeed.';
revoke all on function etl._check_resume(etl.runs, text) from public;

-- A frozen window holds as long as the watermark stands where it began; else the step gets a new one. A succeeded step that is
-- done again reads its old window and leaves the watermark, which has passed it, alone.
create or replace function etl._insert_resumed(run etl.runs, parent etl.runs, changed_steps text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
begin
  insert into etl.procedure_runs (run_id, order_index, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode, tx_scope, isolation,
    parameters, dependencies, statement, rows_column, lock_key, settings, definition, watermark_strategy, state_key, window_since, window_until, window_goal,
    slice_index, status, skip_reason, ended_at)
  select run.run_id, (q.s).order_index, (q.s).scope_index, (q.s).procedure_id, (q.s).procedure_name, (q.s).procedure_type, (q.s).group_name, (q.s).mode,
         (q.s).tx_scope, (q.s).isolation, (q.s).parameters, (q.s).dependencies, coalesce((q.p).call_sql, (q.s).statement),
         case when (q.p).procedure_id is not null then (q.p).rows_column else (q.s).rows_column end, etl._lock_key(run),
         case when (q.p).procedure_id is not null then etl._step_settings(q.p, l.search_path) end, etl._definition(q.p),
         case when not q.is_again then (q.s).watermark_strategy end, case when not q.is_again then (q.s).state_key end,
         case when w.is_kept then (q.s).window_since end, case when w.is_kept then (q.s).window_until end, case when w.is_kept then (q.s).window_goal end,
         case when w.is_kept then (q.s).slice_index else 1 end,
         case when q.is_reused then 'skipped' else 'pending' end, case when q.is_reused then 'reused' end, case when q.is_reused then clock_timestamp() end
    from (select r.step as s, r.procedure as p, x.is_again, r.is_done and not x.is_again as is_reused
            from etl._steps_to_resume(parent) r
            cross join lateral (select r.is_done and r.is_changed and coalesce(changed_steps, '') = 'rerun' and (r.procedure).procedure_id is not null as is_again) x) q
    cross join etl.pipelines l
    left join etl.state t on t.state_key = (q.s).state_key
    cross join lateral (select q.is_again or q.is_reused or (q.s).mode = 'incremental' and (q.s).window_until is not null
                                 and t.last_success_watermark is not distinct from (q.s).window_since as is_kept) w
   where l.pipeline_id = run.pipeline_id;
  insert into etl.mv_refreshes (run_id, scope_index, refresh_target_id, mv_name, refresh_after, refresh_on, concurrency, feeders, depends_on, status,
    skip_reason, ended_at)
  select run.run_id, m.scope_index, m.refresh_target_id, m.mv_name, m.refresh_after, m.refresh_on, m.concurrency, m.feeders, m.depends_on,
         case when d.is_done then 'skipped' else 'pending' end, case when d.is_done then 'reused' end, case when d.is_done then clock_timestamp() end
    from etl.mv_refreshes m
    cross join lateral (select (m.status = 'succeeded' or coalesce(m.skip_reason = 'reused', false)) and not exists (
                                 select from etl.procedure_runs p where p.run_id = run.run_id and p.order_index = any (m.feeders) and p.status = 'pending') as is_done) d
   where m.run_id = parent.run_id;
end $$;
comment on function etl._insert_resumed(etl.runs, etl.runs, text) is 'Stores the steps and refreshes of a run that resumes another one.';
revoke all on function etl._insert_resumed(etl.runs, etl.runs, text) from public;

-- Scopes wait for those before them that are to be executed; a barrier is passed anew.
create or replace function etl._insert_resumed_scopes(run_id bigint, parent_run_id bigint) returns void
language sql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
  with scopes as materialized (
    select s.*, s.kind <> 'barrier'
                and not exists (select from etl.procedure_runs p where p.run_id = _insert_resumed_scopes.run_id and p.scope_index = s.scope_index and p.status = 'pending')
                and not exists (select from etl.mv_refreshes m where m.run_id = _insert_resumed_scopes.run_id and m.scope_index = s.scope_index and m.status = 'pending') as is_done
      from etl.run_scopes s where s.run_id = parent_run_id
  ), waits as (
    select f.scope_index, count(*) as waits_for from scopes s cross join lateral unnest(s.required_by || s.precedes) f(scope_index)
     where not s.is_done group by f.scope_index
  )
  insert into etl.run_scopes (run_id, scope_index, kind, isolation, first_order_index, last_order_index, required_by, precedes, remaining_dependencies)
  select _insert_resumed_scopes.run_id, s.scope_index, s.kind, s.isolation, s.first_order_index, s.last_order_index, s.required_by, s.precedes, coalesce(w.waits_for, 0)
    from scopes s left join waits w using (scope_index)
$$;
comment on function etl._insert_resumed_scopes(bigint, bigint) is 'Stores the scopes of a run that resumes another one, with what each still waits for.';
revoke all on function etl._insert_resumed_scopes(bigint, bigint) from public;

create or replace function etl._begin_resume(wanted_run_id bigint, changed_steps text, out run_id bigint, out lock_key int)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_parent   etl.runs := etl._resumable_run(wanted_run_id);
  v_run      etl.runs;
  v_approver text := v_parent.approved_by;
begin
  perform etl._check_full_refresh((select array_agg(row((s.step).scope_index, 'steps', (s.step).order_index, (s.step).procedure_id, null, (s.step).mode, null, null, null,
      null, null, null, null, null, null, null)::etl.plan_item) from etl._steps_to_resume(v_parent) s where not s.is_done), v_parent.request, etl._requesting_role());
  if etl._needs_approval(v_parent.pipeline_id, v_parent.request) then
    v_approver := etl._approver(v_parent, etl._person());
    if v_approver is null then perform etl._fail_unapproved(v_parent.run_id); end if;
  end if;
  perform etl._check_resume(v_parent, changed_steps);
  insert into etl.runs (pipeline_id, config_version_id, parent_run_id, mode, as_of, parameters, request, fingerprint, requested_by, subject, application_name, approved_by,
    reason, max_concurrency, step_count, started_at, status, worker_pid)
  values (v_parent.pipeline_id, (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = v_parent.pipeline_id), v_parent.run_id, v_parent.mode,
    v_parent.as_of, v_parent.parameters, v_parent.request - 'idempotency_key', v_parent.fingerprint, etl._requester(), etl._subject(), current_setting('application_name'),
    v_approver, v_parent.reason, v_parent.max_concurrency, v_parent.step_count, clock_timestamp(), 'running', pg_backend_pid())
  returning * into v_run;
  perform etl._insert_resumed(v_run, v_parent, changed_steps);
  perform etl._insert_resumed_scopes(v_run.run_id, v_parent.run_id);
  run_id := v_run.run_id; lock_key := etl._lock_key(v_run);
end $$;
comment on function etl._begin_resume(bigint, text) is 'Plans what is left of a run and stores it as a run that this session executes. Raises what etl.resume_run raises.';
revoke all on function etl._begin_resume(bigint, text) from public;
grant execute on function etl._begin_resume(bigint, text) to etl_operator;
