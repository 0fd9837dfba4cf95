-- What a job of pg_cron calls as a worker: queue what is due, then execute what is queued, in one statement. The job that only
-- asks what is due may have its turn later; either of them alone is enough.
create or replace procedure etl.run_due(pipeline text default null, inout executed int default null)
language plpgsql as $$
declare
  v_atomic text;
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.run_due'); end if;
  perform etl.fire_schedules();
  commit;
  call etl.work(pipeline, null, executed);
end $$;
comment on procedure etl.run_due(text, int) is
  'Queues what is due by the clock (etl.fire_schedules) and then works (etl.work) until nothing is left; returns how many runs it executed. '
  'For a job of pg_cron, alone in it. CALL it alone, with autocommit on. Raises PT404 pipeline.unknown.';
revoke all on procedure etl.run_due(text, int) from public;
grant execute on procedure etl.run_due(text, int) to etl_operator;
