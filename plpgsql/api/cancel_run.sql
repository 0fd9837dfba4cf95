-- Asks a run to stop.
--
-- Cooperative by design: only the session that walks the run may end its own transaction, so the scope in flight
-- finishes (or fails) first and everything after it is skipped. With force, the statement in flight is cancelled too.
-- The signal is sent while this transaction holds the run's row and sees it running; the worker's next claim waits for
-- that row, so a signal cannot hit a run that has already ended.
create or replace function etl.cancel_run(run_id bigint, reason text default null, force boolean default false) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = cancel_run.run_id for update;
  if v_run.run_id is null then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', run_id), 'which there are: select * from etl.run_history');
  elsif v_run.requested_by <> etl._requester() and not pg_has_role(etl._requester(), 'etl_admin', 'usage') then
    perform etl._fail('PT403', 'run.not_yours', format('run %s was requested by %s; %s may cancel its own runs only', run_id, v_run.requested_by, etl._requester()),
      'ask whoever requested it, or a member of etl_admin');
  elsif v_run.ended_at is not null then
    perform etl._fail('PT409', 'run.ended', format('run %s has already ended: %s', run_id, v_run.status),
      format('see select etl.get_run(%s)', run_id), jsonb_build_object('status', v_run.status));
  end if;
  if not etl._is_alive(v_run) then
    perform etl._fail('PT409', 'run.dead', format('the session that executed run %s is gone', run_id),
      'nothing is left to cancel: the next etl.start_run records it as abandoned');
  end if;
  update etl.runs r
     set cancel_requested_at = coalesce(r.cancel_requested_at, clock_timestamp()), cancel_requested_by = coalesce(r.cancel_requested_by, etl._requester()),
         cancel_reason = coalesce(r.cancel_reason, cancel_run.reason)
   where r.run_id = cancel_run.run_id;
  if force then perform pg_cancel_backend(v_run.worker_pid); end if;
  return case when force then 'the statement in flight was cancelled, what follows is skipped'
              else 'the step in flight is finished, what follows is skipped' end;
end $$;
comment on function etl.cancel_run(bigint, text, boolean) is
  'Asks an active run to stop after its current scope; with force its statement is cancelled now. Operators cancel their own runs, admins any. '
  'Raises PT404 run.unknown, PT403 run.not_yours, PT409 run.ended or run.dead.';
revoke all on function etl.cancel_run(bigint, text, boolean) from public;
grant execute on function etl.cancel_run(bigint, text, boolean) to etl_operator;

create or replace function etl._is_alive(run etl.runs) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select run.status = 'running' and exists (
    select from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.classid = 6435443 and l.objid = run.pipeline_id::oid and l.objsubid = 2 and l.granted
       and l.pid = run.worker_pid and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()))
$$;
comment on function etl._is_alive(etl.runs) is 'Whether the session that executes a run still holds its lock.';
revoke all on function etl._is_alive(etl.runs) from public;
grant execute on function etl._is_alive(etl.runs) to etl_reader;
