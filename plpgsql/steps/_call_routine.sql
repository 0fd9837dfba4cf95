-- What a step runs that the team wrote: its routine, its checks, and the deferred constraints and triggers that these leave.
--
-- The routines of this folder belong to etl_owner, and are the only ones as which code of the team runs. Their owner may alter them, so a
-- hostile step may; it may not replace them, for want of the right to create anything in schema etl. Each says first who it runs as: made
-- a SECURITY INVOKER it would run the next step as etl_engine. That line names its operator in full, whatever search_path it was given.
create or replace function etl._call_routine(step etl.procedure_runs, is_last boolean, out row_count numeric, out unmet_checks jsonb, out lock_marks jsonb)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_timeout   text;
  v_time_zone text;
  v_result    record;
begin
  if current_user operator(pg_catalog.<>) 'etl_owner' then perform etl._fail_altered('etl._call_routine'); end if;
  if step.settings is not null then
    v_timeout := current_setting('lock_timeout');
    v_time_zone := current_setting('timezone');
    perform etl._apply_settings(step.settings);
  end if;
  -- A procedure without output returns no row to put anywhere.
  if step.rows_column is null then
    execute step.statement using step.mode, step.window_since, step.window_until, step.run_id, step.parameters;
  else
    execute step.statement into v_result using step.mode, step.window_since, step.window_until, step.run_id, step.parameters;
    row_count := (to_jsonb(v_result)->>step.rows_column)::numeric;
  end if;
  if step.settings is not null then
    perform set_config('search_path', 'pg_catalog, pg_temp', true), set_config('lock_timeout', v_timeout, true), set_config('timezone', v_time_zone, true);
    -- Before its checks: what they read is not the routine's.
    if step.settings ? 'observe' then lock_marks := etl._lock_marks(); end if;
    if step.settings ? 'checks' then unmet_checks := etl._unmet_checks(step.settings->'checks'); end if;
  end if;
  -- Triggers that wait for the end of the transaction would run as etl_engine there, or in the COMMIT as whoever called.
  if is_last then set constraints all immediate; end if;
end $$;
comment on function etl._call_routine(etl.procedure_runs, boolean) is
  'Runs the routine of a step and its checks as etl_owner; after the last step of a scope, deferred constraints too.';
revoke all on function etl._call_routine(etl.procedure_runs, boolean) from public;
grant execute on function etl._call_routine(etl.procedure_runs, boolean) to etl_engine;
