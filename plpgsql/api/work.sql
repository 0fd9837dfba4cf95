-- Be a worker: help the active run of a pipeline, or take up the runs that wait, until nothing is left.
--
-- Thin, like etl.start_run, and for the same reason: it ends transactions.
create or replace procedure etl.work(pipeline text default null, run_id bigint default null, inout executed int default null)
language plpgsql as $$
declare
  v_run    record;
  v_atomic text;
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.work'); end if;
  executed := 0;
  loop
    commit; set transaction isolation level read committed, read write;
    select * into v_run from etl._enlist(pipeline, run_id);
    exit when v_run.run_id is null;
    call etl._walk(v_run.run_id, v_run.lock_key, v_run.pause_ms);
    executed := pg_catalog.int4pl(executed, 1);
  end loop;
end $$;
comment on procedure etl.work(text, bigint, int) is
  'Makes this session a worker: it helps the active run (as long as that has fewer sessions than max_concurrency), or takes up the oldest queued one, until '
  'nothing is left; returns how many runs it executed. run_id: that run only. CALL it alone, with autocommit on. Raises PT404 run.unknown or pipeline.unknown.';
revoke all on procedure etl.work(text, bigint, int) from public;
grant execute on procedure etl.work(text, bigint, int) to etl_operator;
