-- Windows and watermarks. A window is half open, [since, until), and is fixed before the transaction that reads it begins.

-- One reader's snapshots follow each other: the later one sees all that the earlier one saw.
create or replace function etl._is_after(strategy text, bound text, other text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case strategy
    when 'timestamp' then bound::timestamptz > other::timestamptz
    when 'id' then bound::bigint > other::bigint
    else pg_snapshot_xmax(bound::pg_snapshot) > pg_snapshot_xmax(other::pg_snapshot)
      or exists (select from pg_snapshot_xip(other::pg_snapshot) x where pg_visible_in_snapshot(x, bound::pg_snapshot)) end
$$;
comment on function etl._is_after(text, text, text) is 'Whether one watermark of a strategy lies after another.';
revoke all on function etl._is_after(text, text, text) from public;

-- Transactions are numbered per cluster: those that a watermark from another one counts are not ours.
create or replace function etl._check_snapshot(state etl.state) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_server_id bigint := (select c.system_identifier from pg_catalog.pg_control_system() c);
begin
  if state.server_id <> v_server_id or pg_snapshot_xmax(state.last_success_watermark::pg_snapshot) > pg_snapshot_xmax(pg_current_snapshot()) then
    perform etl._fail('PT409', 'watermark.foreign',
      format('the watermark of %s counts the transactions of another cluster: the database was restored or upgraded since', state.state_key),
      format('select etl.rebase_watermark(%L, reason => ''...'')', state.state_key),
      jsonb_build_object('watermark', state.last_success_watermark, 'server_id', state.server_id, 'this_server_id', v_server_id));
  end if;
end $$;
comment on function etl._check_snapshot(etl.state) is 'Raises PT409 watermark.foreign when a watermark of the xid strategy was taken in another cluster.';
revoke all on function etl._check_snapshot(etl.state) from public;

-- For ids and snapshots a moment of the past means the newest bound that was noted by then.
create or replace function etl._bound_as_of(state_key text, as_of timestamptz) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select t.bound from etl.watermark_ticks t
   where t.state_key = _bound_as_of.state_key and t.ticked_at <= as_of order by t.ticked_at desc limit 1
$$;
comment on function etl._bound_as_of(text, timestamptz) is 'What was safe to read at a moment of the past, or null when nothing was noted by then.';
revoke all on function etl._bound_as_of(text, timestamptz) from public;

-- The window that a step would get now. Writes nothing; etl._fix_window and etl._show_plan share it.
create or replace function etl._window(procedure etl.procedures, mode text, as_of timestamptz, wait_ms int, run_id bigint default null,
  out since text, out until text, out bound text, out held_back_by text, out fence jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_state etl.state;
  v_upper record;
begin
  select * into v_state from etl.state s where s.state_key = procedure.state_key;
  since := v_state.last_success_watermark;
  if procedure.watermark_strategy = 'xid' and since is not null then perform etl._check_snapshot(v_state); end if;
  v_upper := etl._upper_bound(procedure.watermark_strategy, procedure.state_key, procedure.watermark_sources, procedure.delay_ms, wait_ms, run_id);
  bound := v_upper.bound; held_back_by := v_upper.held_back_by; fence := v_upper.fence;
  until := bound;
  if as_of < clock_timestamp() then
    if procedure.watermark_strategy = 'timestamp' then
      until := to_jsonb(least(bound::timestamptz, as_of)) #>> '{}';
    else
      until := coalesce(etl._bound_as_of(procedure.state_key, as_of), since);
      if until is null then
        perform etl._fail('PT422', 'watermark.no_tick', format('what was safe to read at %s was not noted for %s', as_of, procedure.state_key),
          'leave out as_of; from now on every run notes it, and so does etl.tick_watermarks()');
      end if;
    end if;
  end if;
  if etl._is_after(procedure.watermark_strategy, since, until) then until := since; end if;
  if mode = 'full' then since := null; end if;
end $$;
comment on function etl._window(etl.procedures, text, timestamptz, int, bigint) is
  'The window of a step, what is safe to read, and what holds that back. An as_of at or before the watermark gives an empty window. Waits at most wait_ms. '
  'run_id: a run for whose steps a bound of a moment ago will do.';
revoke all on function etl._window(etl.procedures, text, timestamptz, int, bigint) from public;

-- Tables that an earlier step of this run has written are read up to that step's rows: this waits out the margin, a second.
create or replace function etl._await_margin(run_id bigint, procedure etl.procedures) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_wait interval := (
    select max(p.ended_at) + interval '1 second' + procedure.delay_ms * interval '1 ms' - clock_timestamp()
      from etl.dependencies d
      join etl.procedure_runs p on p.procedure_id = d.depends_on_id and p.run_id = _await_margin.run_id and p.status = 'succeeded'
     where d.procedure_id = procedure.procedure_id
       and p.table_counts ?| array(select format('%I.%I', i[1], i[2]) from (select parse_ident(s) from unnest(procedure.watermark_sources) s) x(i)));
begin
  if v_wait between interval '0' and interval '2 seconds' then perform pg_sleep_for(v_wait); end if;
  return v_wait is not null;
end $$;
comment on function etl._await_margin(bigint, etl.procedures) is
  'Waits until what earlier steps of the run wrote into the sources of a procedure is safe to read; false when none did.';
revoke all on function etl._await_margin(bigint, etl.procedures) from public;

-- Whether any row of the sources lies in a window; with a query as source, whether the window has any length.
create or replace function etl._has_rows(procedure etl.procedures, since text, until text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = on set enable_bitmapscan = on set enable_sort = on as $$
declare
  v_type   text := case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'pg_snapshot' end;
  v_zone   text := current_setting('timezone');
  v_exists boolean;
begin
  if etl._is_query(procedure.watermark_sources) then return since is distinct from until; end if;
  perform set_config('timezone', coalesce(procedure.watermark_time_zone, v_zone), true);
  v_exists := etl._read_source((
    select 'select ' || string_agg(format(
             case when procedure.watermark_strategy = 'xid' then 'exists (select from %2$I.%3$I where etl.arrived(%1$I, $1::pg_snapshot, $2::pg_snapshot))'
                  when since is null then 'exists (select from %2$I.%3$I where %1$I < $2::%4$s)'
                  else 'exists (select from %2$I.%3$I where %1$I >= $1::%4$s and %1$I < $2::%4$s)' end, i[3], i[1], i[2], v_type), ' or ')
      from (select parse_ident(s) from unnest(procedure.watermark_sources) s) x(i)), since, until);
  perform set_config('timezone', v_zone, true);
  return v_exists;
end $$;
comment on function etl._has_rows(etl.procedures, text, text) is 'Whether a window holds any row of the sources.';
revoke all on function etl._has_rows(etl.procedures, text, text) from public;

create or replace function etl._fix_window(run etl.runs, order_index int, attempt int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step      etl.procedure_runs;
  v_procedure etl.procedures;
  v_window    record;
  v_shared    text;
  v_since     text;
  v_is_fed    boolean;
  v_sqlstate  text; v_message text; v_detail text; v_hint text;
begin
  select * into strict v_step from etl.procedure_runs p
   where p.run_id = run.run_id and p.order_index = _fix_window.order_index and p.attempt = _fix_window.attempt;
  select * into v_procedure from etl.procedures p where p.procedure_id = v_step.procedure_id;
  -- A source that cannot be read fails this step, in its scope (etl._execute_step), and not the run.
  begin
    if v_step.window_goal is not null then
      perform etl._set_window(v_step, v_procedure, v_step.window_since, v_step.window_goal, null);
      return;
    end if;
    -- Steps that share a watermark share its window.
    select p.window_until into v_shared from etl.procedure_runs p
     where p.run_id = v_step.run_id and p.scope_index = v_step.scope_index and p.state_key = v_step.state_key and p.window_until is not null
     limit 1;
    if v_shared is not null then
      v_since := (select s.last_success_watermark from etl.state s where s.state_key = v_step.state_key and v_step.mode = 'incremental');
      perform etl._set_window(v_step, v_procedure, v_since, v_shared, null);
      return;
    end if;
    v_is_fed := v_step.watermark_strategy = 'timestamp' and not etl._is_query(v_procedure.watermark_sources) and etl._await_margin(run.run_id, v_procedure);
    v_window := etl._window(v_procedure, v_step.mode, run.as_of, 1000, case when not v_is_fed then run.run_id end);
    perform etl._set_window(v_step, v_procedure, v_window.since, v_window.until, v_window.held_back_by);
    perform etl._note_bound(v_step, v_window.bound, v_window.fence);
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    update etl.procedure_runs p
       set sqlstate = v_sqlstate, error_message = v_message, error_detail = v_detail, error_hint = v_hint
     where p.run_id = v_step.run_id and p.order_index = v_step.order_index and p.attempt = v_step.attempt;
  end;
end $$;
comment on function etl._fix_window(etl.runs, int, int) is 'Fixes the window of a step, in the transaction before the one that reads it.';
revoke all on function etl._fix_window(etl.runs, int, int) from public;

-- Writes down a window: its first slice only, where it is longer than max_window. A step without rows to read is skipped if
-- it is configured so; its watermark stays, and the next window begins where this one would have begun.
create or replace function etl._set_window(step etl.procedure_runs, procedure etl.procedures, since text, goal text, held_back_by text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_scope etl.run_scopes;
  v_until text := goal;
begin
  if step.mode = 'incremental' and procedure.max_window is not null then
    select * into v_scope from etl.run_scopes s where s.run_id = step.run_id and s.scope_index = step.scope_index;
    if v_scope.first_order_index = v_scope.last_order_index then v_until := etl._slice_end(procedure, since, goal, v_scope.slice_width); end if;
  end if;
  update etl.procedure_runs p
     set window_since = since, window_until = v_until, held_back_by = _set_window.held_back_by,
         window_goal = case when v_until <> goal or step.window_goal is not null then goal end
   where p.run_id = step.run_id and p.order_index = step.order_index and p.attempt = step.attempt;
  if procedure.on_empty = 'skip' and step.mode = 'incremental' and step.slice_index = 1 and not etl._has_rows(procedure, since, goal) then
    update etl.procedure_runs p
       set status = 'skipped', skip_reason = 'no_data', started_at = null, worker_pid = null, ended_at = clock_timestamp()
     where p.run_id = step.run_id and p.order_index = step.order_index and p.attempt = step.attempt;
  end if;
end $$;
comment on function etl._set_window(etl.procedure_runs, etl.procedures, text, text, text) is
  'Stores the window of a step, or its first slice; skips a step that has nothing to read and is configured to be skipped then.';
revoke all on function etl._set_window(etl.procedure_runs, etl.procedures, text, text, text) from public;

create or replace function etl._note_bound(step etl.procedure_runs, bound text, fence jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if step.watermark_strategy = 'timestamp' then return; end if;
  insert into etl.watermark_ticks (state_key, bound) values (step.state_key, _note_bound.bound) on conflict do nothing;
  if step.watermark_strategy = 'id' then
    insert into etl.state (state_key, strategy, fence) values (step.state_key, 'id', _note_bound.fence)
    on conflict (state_key) do update set fence = excluded.fence where state.fence is distinct from excluded.fence;
  end if;
end $$;
comment on function etl._note_bound(etl.procedure_runs, text, jsonb) is
  'Notes when what was safe to read, for as_of; and, for ids, which writers have to end before more of it is.';
revoke all on function etl._note_bound(etl.procedure_runs, text, jsonb) from public;

-- Moves the watermark in the transaction that wrote the data. It must still stand where the window began. By index even in a tiny
-- table: a sequential scan would make serializable scopes that run side by side fail each other.
create or replace function etl._advance_watermark(step etl.procedure_runs, row_count bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off as $$
declare
  v_state etl.state;
begin
  insert into etl.state (state_key, strategy) values (step.state_key, step.watermark_strategy) on conflict do nothing;
  select * into v_state from etl.state s where s.state_key = step.state_key for update;
  if step.mode = 'incremental' and v_state.last_success_watermark is distinct from step.window_since
     and not (v_state.last_run_id = step.run_id and v_state.last_success_watermark = step.window_until) then
    perform etl._fail('PT409', 'watermark.moved',
      format('the watermark of %s moved from %s to %s while the step ran', step.state_key,
             coalesce(step.window_since, '(none)'), coalesce(v_state.last_success_watermark, '(none)')),
      'start another run: it begins at the new watermark');
  end if;
  update etl.state s
     set last_success_watermark = step.window_until, strategy = step.watermark_strategy, last_run_id = step.run_id,
         procedure_ids = case when step.procedure_id = any (s.procedure_ids) then s.procedure_ids else s.procedure_ids || step.procedure_id end,
         server_id = case when step.watermark_strategy = 'xid' then (select c.system_identifier from pg_catalog.pg_control_system() c) end,
         last_run_at = clock_timestamp(), last_rowcount = row_count
   where s.state_key = step.state_key;
  if v_state.last_success_watermark is distinct from step.window_until then
    insert into etl.state_history (state_key, old_watermark, new_watermark, run_id, cause, changed_by)
    values (step.state_key, v_state.last_success_watermark, step.window_until, step.run_id, step.mode,
            (select r.requested_by from etl.runs r where r.run_id = step.run_id));
  end if;
end $$;
comment on function etl._advance_watermark(etl.procedure_runs, bigint) is
  'Moves the watermark of a step to the end of its window. Raises PT409 watermark.moved if somebody else moved it.';
revoke all on function etl._advance_watermark(etl.procedure_runs, bigint) from public;
