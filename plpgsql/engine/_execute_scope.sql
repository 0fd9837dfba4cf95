-- Executing one scope: ONE subtransaction holds its steps, their row counts, checks, watermarks and outcome.
-- The caller commits when this returns events, and rolls everything back when it returns a failure.

-- The steps in a range that this session has claimed and not yet executed, in order.
create or replace function etl._claimed_steps(run_id bigint, first_order_index int, last_order_index int) returns etl.procedure_runs[]
language plpgsql stable set enable_seqscan = off set enable_bitmapscan = off set plan_cache_mode = force_generic_plan as $$
begin
  return array(
    select p from etl.procedure_runs p
     where p.run_id = _claimed_steps.run_id and p.order_index between first_order_index and last_order_index
       and p.status = 'running' and p.worker_pid = pg_backend_pid()
       -- A scope is executed whole: whoever calls the helpers by hand cannot commit a part of a group.
       and exists (select from etl.run_scopes s where s.run_id = p.run_id and s.scope_index = p.scope_index
                      and (s.first_order_index, s.last_order_index) = (_claimed_steps.first_order_index, _claimed_steps.last_order_index))
     order by p.order_index);
end $$;
comment on function etl._claimed_steps(bigint, int, int) is 'The steps in a range that this session has claimed.';
revoke all on function etl._claimed_steps(bigint, int, int) from public;

-- The outcome of a step, written with its data. An index lookup even on a tiny table: a sequential scan here would
-- make serializable scopes that run side by side fail each other.
create or replace function etl._record_success(step etl.procedure_runs, step_started_at timestamptz, row_count bigint, changes jsonb, unmet_checks jsonb)
returns jsonb
language plpgsql volatile set enable_seqscan = off as $$
declare
  v_now   timestamptz := clock_timestamp();
  v_event jsonb;
begin
  update etl.procedure_runs p
     set status = case when step.window_until <> step.window_goal then 'advanced' else 'succeeded' end, started_at = step_started_at, ended_at = v_now,
         duration_ms = extract(epoch from v_now - step_started_at) * 1000, rows_affected = row_count,
         table_counts = changes, warnings = unmet_checks
   where p.run_id = step.run_id and p.order_index = step.order_index and p.attempt = step.attempt
  returning p.duration_ms, p.status into step.duration_ms, step.status;
  v_event := jsonb_build_object('event', 'step_' || step.status, 'run_id', step.run_id, 'order_index', step.order_index,
    'procedure', step.procedure_name, 'mode', step.mode, 'tx_scope', step.tx_scope, 'attempt', step.attempt,
    'rows_affected', row_count, 'duration_ms', step.duration_ms, 'table_counts', changes);
  if step.window_goal is not null then
    v_event := v_event || jsonb_build_object('slice_index', step.slice_index, 'window_until', step.window_until, 'window_goal', step.window_goal);
  end if;
  if unmet_checks is not null then
    v_event := v_event || jsonb_build_object('warning', (
      select string_agg(format('check %s found %s violation(s)', c->>'name', c->>'violations'), '; ') from jsonb_array_elements(unmet_checks) c));
  end if;
  return v_event;
end $$;
comment on function etl._record_success(etl.procedure_runs, timestamptz, bigint, jsonb, jsonb) is
  'Writes the outcome of a step in the transaction of its data; returns the event to announce after the commit.';
revoke all on function etl._record_success(etl.procedure_runs, timestamptz, bigint, jsonb, jsonb) from public;

-- What a step may set for itself, until the end of its transaction.
create or replace function etl._apply_settings(settings jsonb) returns void
language plpgsql volatile as $$
begin
  if settings ? 'time_zone' then perform pg_catalog.set_config('timezone', settings->>'time_zone', true); end if;
  if settings ? 'lock_timeout_ms' then perform pg_catalog.set_config('lock_timeout', settings->>'lock_timeout_ms', true); end if;
  if settings ? 'search_path' then
    perform pg_catalog.set_config('search_path', (
      select 'pg_catalog, ' || pg_catalog.string_agg(pg_catalog.quote_ident(s), ', ') || ', pg_temp'
        from pg_catalog.jsonb_array_elements_text(settings->'search_path') s), true);
  end if;
end $$;
comment on function etl._apply_settings(jsonb) is
  'Sets timezone, lock_timeout and search_path for a step. Pins no search_path itself, or what it sets would end with it.';
revoke all on function etl._apply_settings(jsonb) from public;
grant execute on function etl._apply_settings(jsonb) to etl_owner;

-- A routine that says create temp table if not exists would otherwise use one that the caller has made, with triggers
-- of the caller's that run as the owner of the steps.
create or replace function etl._check_temporary_objects() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_names text := (select string_agg(c.relname, ', ' order by c.relname) from pg_catalog.pg_class c
                    where c.relnamespace = pg_my_temp_schema() and c.relkind <> 'i' and not pg_has_role(c.relowner, 'etl_owner', 'member')
                      and c.relowner <> 'etl_owner'::regrole);
begin
  if v_names is not null then
    perform etl._fail('PT409', 'session.temporary_objects', format('this session has temporary objects that steps could mistake for their own: %s', v_names),
      'drop them (discard temp), or start the run from another session');
  end if;
end $$;
comment on function etl._check_temporary_objects() is
  'Raises PT409 session.temporary_objects when the session has temporary objects of a role that is not a member of etl_owner.';
revoke all on function etl._check_temporary_objects() from public;

-- One step: settings, the routine, what it changed, checks, watermark, outcome. is_later: not the first step of its transaction;
-- first_seen: the counters of tables when that began.
create or replace function etl._execute_step(step etl.procedure_runs, is_later boolean, is_last boolean, first_seen bigint[], inout seen bigint[], out event jsonb)
language plpgsql volatile as $$
declare
  v_started_at timestamptz := clock_timestamp();
  v_set        text;
  v_called     record;
  v_rows       bigint;
  v_unmet      jsonb;
  v_counts     record;
  v_relations  jsonb;
begin
  -- Its window could not be fixed when it was claimed: that error is this step's.
  if step.sqlstate is not null then
    raise exception using errcode = step.sqlstate, message = step.error_message, detail = coalesce(step.error_detail, ''), hint = coalesce(step.error_hint, '');
  end if;
  -- A backfill of the same procedure must not read a row, wait for us to write its newer version, and write the older one over it.
  if step.window_until is not null then perform pg_advisory_xact_lock(6435445, step.procedure_id); end if;
  v_set := set_config('b2s.step', concat_ws(' ', step.run_id, step.order_index, step.attempt, step.procedure_name), true);
  if step.settings ? 'observe' and is_later then v_relations := etl._lock_marks(); end if;
  v_called := etl._call_routine(step, is_last);
  v_counts := etl._count_changes(seen, first_seen);
  seen := v_counts.seen;
  if step.settings ? 'observe' then v_relations := etl._observed_relations(v_relations, v_called.lock_marks, v_counts.changes); end if;
  v_rows := v_called.row_count;
  if v_rows is null then
    select coalesce(sum((t.value->>'inserted')::bigint + (t.value->>'updated')::bigint + (t.value->>'deleted')::bigint), 0)
      into v_rows from jsonb_each(v_counts.changes) t;
  end if;
  if v_called.unmet_checks is not null then v_unmet := etl._judge_checks(step.procedure_name, v_called.unmet_checks); end if;
  if step.watermark_strategy is not null then perform etl._advance_watermark(step, v_rows); end if;
  event := etl._record_success(step, v_started_at, v_rows, v_counts.changes, v_unmet);
  if v_relations is not null then event := event || jsonb_build_object('relations', v_relations); end if;
  if step.window_until <> step.window_goal then perform etl._add_slice(step, step.window_until, step.slice_index + 1); end if;
end $$;
comment on function etl._execute_step(etl.procedure_runs, boolean, boolean, bigint[], bigint[]) is 'Runs one step and writes its outcome, in the caller''s transaction.';
revoke all on function etl._execute_step(etl.procedure_runs, boolean, boolean, bigint[], bigint[]) from public;

-- A deadlock names the processes. A lock timeout names nobody: whoever holds a lock for writing, and had it before the step
-- began, may have been in the way.
create or replace function etl._lock_holders(detail text, since timestamptz) returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select jsonb_agg(jsonb_build_object('pid', q.pid, 'user', q.usename, 'application', q.application_name, 'since', q.xact_start) order by q.xact_start)
    from (select distinct a.pid, a.usename, a.application_name, a.xact_start
            from pg_catalog.pg_stat_activity a
           where a.pid <> pg_backend_pid() and a.datname = current_database()
             and case when detail ~ 'Process [0-9]+' then a.pid in (select m[1]::int from regexp_matches(detail, 'rocess ([0-9]+)', 'g') m)
                      else coalesce(a.xact_start < since + interval '1 minute', true) and exists (
                             select from pg_catalog.pg_locks l where l.pid = a.pid and l.granted and l.locktype = 'relation' and l.relation >= 16384
                                and l.mode in ('RowExclusiveLock', 'ShareUpdateExclusiveLock', 'ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')) end
           order by a.xact_start limit 5) q
$$;
comment on function etl._lock_holders(text, timestamptz) is 'Sessions that a step may have waited for: those a deadlock names, else up to five that hold locks for writing.';
revoke all on function etl._lock_holders(text, timestamptz) from public;

-- Types and relations of the temporary schema come before all others, whatever the search_path. What a step leaves there under a
-- name of the server's own, whoever uses this session next would take for that, and run as himself what is behind it.
create or replace function etl._check_temporary_names() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_names text := (
    select string_agg(q.name, ', ' order by q.name)
      from (select t.typname::text as name from pg_catalog.pg_type t
             where t.typnamespace = pg_my_temp_schema() and exists (select from pg_catalog.pg_type b where b.typnamespace = 'pg_catalog'::regnamespace and b.typname = t.typname)
            union
            select c.relname from pg_catalog.pg_class c
             where c.relnamespace = pg_my_temp_schema() and exists (select from pg_catalog.pg_class b where b.relnamespace = 'pg_catalog'::regnamespace and b.relname = c.relname)) q);
begin
  if v_names is not null then
    perform etl._fail('PT409', 'session.temporary_names', format('the step leaves temporary objects under names of the server''s own: %s', v_names),
      'give them other names');
  end if;
end $$;
comment on function etl._check_temporary_names() is
  'Raises PT409 session.temporary_names when the session has temporary types or relations that hide those of pg_catalog.';
revoke all on function etl._check_temporary_names() from public;

-- seen: table counters before this scope, and after it. result: {events}, with goes_on when another slice follows, or {failure}.
create or replace function etl._execute_scope(run_id bigint, first_order_index int, last_order_index int, inout seen bigint[], out result jsonb)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_steps   etl.procedure_runs[] := etl._claimed_steps(run_id, first_order_index, last_order_index);
  v_step    etl.procedure_runs;
  v_done    record;
  v_first   bigint[] := seen;
  v_set     text;
  v_events  jsonb := '[]';
  v_sqlstate text; v_message text; v_detail text; v_hint text; v_context text;
begin
  -- They are claimed by a backend of this number; that it is this very session, the run lock tells.
  if v_steps = '{}' or not pg_try_advisory_xact_lock_shared(6435444, v_steps[1].lock_key) then perform etl._fail_not_owned(run_id); end if;
  if pg_current_xact_id_if_assigned() is not null and not coalesce(v_steps[1].settings ? 'is_rehearsed', false) then perform etl._check_nothing_deferred('etl.start_run'); end if;
  v_set := set_config('application_name', format('b2s run %s %s', run_id, v_steps[1].procedure_name), true);
  begin
    if pg_my_temp_schema() <> 0 then perform etl._check_temporary_objects(); end if;
    foreach v_step in array v_steps loop
      v_done := etl._execute_step(v_step, v_step.order_index > first_order_index, v_step.order_index = last_order_index, v_first, seen);
      seen := v_done.seen;
      v_events := v_events || v_done.event;
    end loop;
    if pg_my_temp_schema() <> 0 then perform etl._check_temporary_names(); end if;
    if current_setting('b2s.log_lines', true) <> '' then perform etl._keep_logs(run_id); end if;
    if current_setting('transaction_isolation') = 'serializable' then perform from etl.serialization_probe; end if;
    result := jsonb_build_object('scope_index', v_step.scope_index, 'events', v_events)
      || case when v_step.window_until <> v_step.window_goal then '{"goes_on": true}'::jsonb else '{}' end;
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail,
      v_hint = pg_exception_hint, v_context = pg_exception_context;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    result := jsonb_build_object('failure', etl._failure(v_sqlstate, v_message, v_detail, v_hint, v_context, v_step.order_index)
      || case when v_sqlstate in ('40P01', '55P03') then jsonb_build_object('blocked_by', etl._lock_holders(v_detail, v_steps[1].started_at)) else '{}' end);
  end;
end $$;
comment on function etl._execute_scope(bigint, int, int, bigint[]) is
  'Executes a claimed scope inside one subtransaction; returns {events} to commit or {failure} to roll back, and the counters of tables. Called by the engine only.';
revoke all on function etl._execute_scope(bigint, int, int, bigint[]) from public;
grant execute on function etl._execute_scope(bigint, int, int, bigint[]) to etl_operator;
