-- Asks a run to stop.
--
-- Cooperative by design: only the session that walks the run may end its own transaction, so the scope in flight
-- finishes (or fails) first and everything after it is skipped. With force, the statement in flight is cancelled too.
-- The signal is sent while this transaction holds the run's row and sees it running, so it cannot hit a run that has ended.
create or replace function etl._request_cancel(run_id bigint, reason text) returns int[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run  etl.runs;
  v_pids int[];
begin
  select * into v_run from etl.runs r where r.run_id = _request_cancel.run_id for update;
  if v_run.run_id is null then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', run_id), 'which there are: select * from etl.run_history');
  -- A subject that a front end names may have the name of a role.
  elsif (v_run.requested_by <> etl._requester() or (v_run.subject is null) <> (etl._subject() is null)) and not etl._is_admin(etl._requesting_role()) then
    perform etl._fail('PT403', 'run.not_yours', format('run %s was requested by %s; %s may cancel its own runs only', run_id, v_run.requested_by, etl._requester()),
      'ask whoever requested it, or a member of etl_admin');
  elsif v_run.ended_at is not null then
    perform etl._fail('PT409', 'run.ended', format('run %s has already ended: %s', run_id, v_run.status),
      format('see select etl.get_run(%s)', run_id), jsonb_build_object('status', v_run.status));
  end if;
  if v_run.status = 'queued' then
    update etl.runs r
       set status = 'cancelled', ended_at = clock_timestamp(), cancel_requested_at = clock_timestamp(), cancel_requested_by = etl._requester(),
           cancel_reason = _request_cancel.reason
     where r.run_id = _request_cancel.run_id;
    return null;
  elsif not etl._is_alive(v_run) then
    perform etl._fail('PT409', 'run.dead', format('the session that executed run %s is gone', run_id),
      'nothing is left to cancel: select etl.reap() records it as abandoned');
  end if;
  update etl.runs r
     set cancel_requested_at = coalesce(r.cancel_requested_at, clock_timestamp()), cancel_requested_by = coalesce(r.cancel_requested_by, etl._requester()),
         cancel_reason = coalesce(r.cancel_reason, _request_cancel.reason)
   where r.run_id = _request_cancel.run_id;
  -- The rows of the steps in flight, held until this transaction ends: no outcome can be written before the signal is
  -- sent, so the signal hits the step and not the bookkeeping after it, which would end the CALL. skip locked: an
  -- outcome already written is about to be committed.
  with steps as (
    select p.worker_pid from etl.procedure_runs p where p.run_id = _request_cancel.run_id and p.status = 'running' for update skip locked
  ), refreshes as (
    select m.worker_pid from etl.mv_refreshes m where m.run_id = _request_cancel.run_id and m.status = 'running' for update skip locked
  )
  select coalesce(array_agg(distinct q.worker_pid), '{}') into v_pids from (select * from steps union all select * from refreshes) q;
  return v_pids;
end $$;
comment on function etl._request_cancel(bigint, text) is
  'Records that a run is to stop; returns the backends that execute steps of it now; null when it was queued, and has ended. Raises what etl.cancel_run raises.';
revoke all on function etl._request_cancel(bigint, text) from public;
grant execute on function etl._request_cancel(bigint, text) to etl_operator;

-- Not security definer: a login may always cancel its own statements, whereas etl_engine may cancel those of others
-- only as a member of pg_signal_backend.
create or replace function etl.cancel_run(run_id bigint, reason text default null, force boolean default false) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pids  int[] := etl._request_cancel(run_id, reason);
  v_pid   int;
  v_count int := 0;
begin
  if v_pids is null then return 'it was queued, and is not run'; end if;
  if not force or v_pids = '{}' then return 'the step in flight is finished, what follows is skipped'; end if;
  foreach v_pid in array v_pids loop
    if etl._cancel_statement(v_pid) then
      v_count := v_count + 1;
    else
      raise warning 'the statement in flight goes on: neither % nor etl_engine may cancel it', current_user
        using hint = 'grant pg_signal_backend to etl_engine; the statements of a superuser only a superuser may cancel';
    end if;
  end loop;
  if v_count = 0 then return 'the step in flight is finished, what follows is skipped'; end if;
  return 'the statement in flight was cancelled, what follows is skipped';
end $$;
comment on function etl.cancel_run(bigint, text, boolean) is
  'Asks an active run to stop after its current scope; with force its statement is cancelled now. Operators cancel their own runs, admins any. '
  'Raises PT404 run.unknown, PT403 run.not_yours, PT409 run.ended or run.dead.';
revoke all on function etl.cancel_run(bigint, text, boolean) from public;
grant execute on function etl.cancel_run(bigint, text, boolean) to etl_operator;

-- Only what somebody entitled to has asked to stop, or what is beyond its timeout.
create or replace function etl._signal_as_engine(pid int) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from etl.runs r
                  where r.status = 'running'
                    and (exists (select from etl.procedure_runs p where p.run_id = r.run_id and p.status = 'running' and p.worker_pid = _signal_as_engine.pid
                                    and (p.timed_out_at is not null or r.cancel_requested_at is not null))
                         or r.cancel_requested_at is not null and exists (
                              select from etl.mv_refreshes m where m.run_id = r.run_id and m.status = 'running' and m.worker_pid = _signal_as_engine.pid))) then
    return false;
  end if;
  return pg_cancel_backend(pid);
exception when insufficient_privilege then
  return false;
end $$;
comment on function etl._signal_as_engine(int) is
  'Cancels the statement of a step as etl_engine when its run was asked to stop or its timeout has passed; false when that is not so, or etl_engine may not.';
revoke all on function etl._signal_as_engine(int) from public;
grant execute on function etl._signal_as_engine(int) to etl_operator;

create or replace function etl._cancel_statement(pid int) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return pg_cancel_backend(pid);
exception when insufficient_privilege then
  return etl._signal_as_engine(pid);
end $$;
comment on function etl._cancel_statement(int) is 'Cancels the statement of a backend, as the caller, else as etl_engine; false when neither may.';
revoke all on function etl._cancel_statement(int) from public;
grant execute on function etl._cancel_statement(int) to etl_operator;

-- An interrupted wait ends the run, like an interrupted step.
create or replace function etl._is_cancelled(run_id bigint, interruption text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  if interruption is not null then perform etl._absorb_signal(); end if;
  select * into v_run from etl.runs r where r.run_id = _is_cancelled.run_id;
  -- Another worker may have ended the run while this one waited: then there is nothing to wait for.
  if v_run.ended_at is not null and etl._has_worked(v_run) then return true; end if;
  if etl._is_owner(v_run) is not true and etl._is_helper(v_run) is not true then perform etl._fail_not_owned(run_id); end if;
  if v_run.cancel_requested_at is null and interruption is not null then
    perform etl._note_interruption(run_id, interruption);
  end if;
  return v_run.cancel_requested_at is not null or interruption is not null;
end $$;
comment on function etl._is_cancelled(bigint, text) is
  'Whether a run that waits for its next attempt is to stop; interruption: the error that ended the wait, or null. Called by the engine only.';
revoke all on function etl._is_cancelled(bigint, text) from public;
grant execute on function etl._is_cancelled(bigint, text) to etl_operator;

create or replace function etl._is_alive(run etl.runs) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select run.status = 'running' and etl._living_workers(run) <> '{}'
$$;
comment on function etl._is_alive(etl.runs) is 'Whether any session that executes a run still holds its lock.';
revoke all on function etl._is_alive(etl.runs) from public;
grant execute on function etl._is_alive(etl.runs) to etl_reader;
