-- Windows and watermarks.

-- The exclusive upper end of what may be read now, as text in the strategy's type.
create or replace function etl._upper_bound(strategy text, sources text[], delay_ms int, as_of timestamptz) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_source text[];
  v_max    bigint;
begin
  case strategy
    when 'timestamp' then
      return to_jsonb(least(clock_timestamp() - delay_ms * interval '1 ms', as_of)) #>> '{}';
    when 'xid' then
      return pg_current_snapshot()::text;
    when 'id' then
      v_source := parse_ident(sources[1]);
      execute format('select max(%I) from %I.%I', v_source[3], v_source[1], v_source[2]) into v_max;
      return coalesce(v_max + 1, 0)::text;
  end case;
end $$;
comment on function etl._upper_bound(text, text[], int, timestamptz) is
  'Exclusive end of the window that may be read now: a timestamptz, bigint or pg_snapshot as text.';
revoke all on function etl._upper_bound(text, text[], int, timestamptz) from public;

-- Whether the first bound lies after the second one.
create or replace function etl._is_after(strategy text, bound text, other text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case strategy when 'timestamp' then bound::timestamptz > other::timestamptz
                       when 'id' then bound::bigint > other::bigint
                       else pg_snapshot_xmax(bound::pg_snapshot) > pg_snapshot_xmax(other::pg_snapshot) end
$$;
comment on function etl._is_after(text, text, text) is 'Whether one watermark of a strategy lies after another.';
revoke all on function etl._is_after(text, text, text) from public;

create or replace function etl._fix_window(run etl.runs, order_index int, attempt int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step      etl.procedure_runs;
  v_procedure etl.procedures;
  v_since     text;
  v_until     text;
  v_sqlstate  text; v_message text; v_detail text; v_hint text;
begin
  select * into strict v_step from etl.procedure_runs p
   where p.run_id = run.run_id and p.order_index = _fix_window.order_index and p.attempt = _fix_window.attempt;
  v_since := (select s.last_success_watermark from etl.state s where s.state_key = v_step.state_key);
  select * into v_procedure from etl.procedures p where p.procedure_id = v_step.procedure_id;
  -- Steps that share a watermark share its window.
  select p.window_until into v_until from etl.procedure_runs p
   where p.run_id = v_step.run_id and p.scope_index = v_step.scope_index and p.state_key = v_step.state_key and p.window_until is not null
   limit 1;
  -- A source that cannot be read fails this step, in its scope (etl._execute_step), and not the run.
  begin
    v_until := coalesce(v_until, etl._upper_bound(v_step.watermark_strategy, v_procedure.watermark_sources, v_procedure.delay_ms, run.as_of));
    if etl._is_after(v_step.watermark_strategy, v_since, v_until) then v_until := v_since; end if;
  exception when query_canceled or assert_failure or others then
    get stacked diagnostics v_sqlstate = returned_sqlstate, v_message = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
    if v_sqlstate = '57014' then perform etl._absorb_signal(); end if;
    update etl.procedure_runs p
       set sqlstate = v_sqlstate, error_message = v_message, error_detail = v_detail, error_hint = v_hint
     where p.run_id = v_step.run_id and p.order_index = v_step.order_index and p.attempt = v_step.attempt;
    return;
  end;
  update etl.procedure_runs p
     set window_since = case when v_step.mode = 'incremental' then v_since end, window_until = v_until
   where p.run_id = v_step.run_id and p.order_index = v_step.order_index and p.attempt = v_step.attempt;
end $$;
comment on function etl._fix_window(etl.runs, int, int) is
  'Fixes the window of a step, in the transaction before the one that reads it. An as_of before the watermark gives an empty window.';
revoke all on function etl._fix_window(etl.runs, int, int) from public;

-- Moves the watermark in the transaction that wrote the data. It must still stand where the window began.
create or replace function etl._advance_watermark(step etl.procedure_runs, row_count bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
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
