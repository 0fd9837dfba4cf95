-- Takes up a run that failed, was cancelled, or died. Thin, like etl.start_run: it ends transactions.
create or replace procedure etl.resume_run(
  run_id bigint, changed_steps text default null, inout new_run_id bigint default null, inout status text default null)
language plpgsql as $$
declare
  v_run    record;
  v_atomic text;
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.resume_run'); end if;
  commit; set transaction isolation level read committed;
  select * into v_run from etl._begin_resume(run_id, changed_steps);
  call etl._walk(v_run.run_id, v_run.lock_key, wants_helpers => true);
  new_run_id := v_run.run_id;
  status := etl._run_status(v_run.run_id);
end $$;
comment on procedure etl.resume_run(bigint, text, bigint, text) is
  'Runs what is left of a run that failed, was cancelled or was abandoned, as a new run with the same as_of, windows and params; what succeeded is reused. '
  'A window is taken anew when its watermark has moved since. changed_steps: reuse or rerun, for steps that succeeded and whose definition has changed since. '
  'Returns new_run_id and the final status. CALL it alone, with autocommit on. Raises PT403, PT404 or PT409 with {"code": ...} in DETAIL before anything is done.';
revoke all on procedure etl.resume_run(bigint, text, bigint, text) from public;
grant execute on procedure etl.resume_run(bigint, text, bigint, text) to etl_operator;
