-- The end of a run: its status follows from its steps and refreshes.
create or replace function etl._finish_run(run etl.runs) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_steps  record;
  v_first  etl.procedure_runs;
  v_status text;
begin
  if exists (select from etl.procedure_runs p where p.run_id = run.run_id and p.ended_at is null)
     or exists (select from etl.mv_refreshes m where m.run_id = run.run_id and m.ended_at is null) then
    perform etl._fail_not_owned(run.run_id);
  end if;
  select count(*) filter (where p.status = 'succeeded') as succeeded, count(*) filter (where p.status = 'failed') as failed,
         count(*) filter (where p.status = 'cancelled' or p.skip_reason = 'cancelled') as cancelled,
         count(*) filter (where p.status = 'skipped') as skipped, count(p.warnings) as warned
    into v_steps
    from etl.procedure_runs p where p.run_id = run.run_id;
  select * into v_first from etl.procedure_runs p where p.run_id = run.run_id and p.status = 'failed' order by p.order_index limit 1;
  v_status := case
    when v_steps.cancelled > 0
      or exists (select from etl.mv_refreshes m where m.run_id = run.run_id and 'cancelled' in (m.status, m.skip_reason)) then 'cancelled'
    when v_steps.failed > 0 then 'failed'
    when v_steps.warned > 0
      or exists (select from etl.mv_refreshes m where m.run_id = run.run_id and (m.status = 'failed' or m.status = 'skipped' and m.skip_reason <> 'reused' or m.warning is not null))
      then 'completed_with_warnings'
    else 'succeeded' end;
  update etl.runs r
     set status = v_status, ended_at = clock_timestamp(), error_code = v_first.error_code,
         error_message = case when v_first.order_index is not null
           then format('%s: %s', v_first.procedure_name, v_first.error_message) end
   where r.run_id = run.run_id
  returning r.* into run;
  perform etl._announce(jsonb_strip_nulls(jsonb_build_object('event', 'run_' || v_status, 'run_id', run.run_id,
    'duration_ms', run.duration_ms, 'error_code', run.error_code, 'error_message', run.error_message,
    'steps', to_jsonb(v_steps))));
end $$;
comment on function etl._finish_run(etl.runs) is 'Gives a run its final status.';
revoke all on function etl._finish_run(etl.runs) from public;
