-- Asks a run to stop.
--
-- Cooperative by design: only the session that walks the run may end its own transaction, so the scope in flight
-- finishes (or fails) first and everything after it is skipped. With force, the statement in flight is cancelled too.
-- The signal is sent while this transaction holds the run's row and sees it running, so it cannot hit a run that has ended.
create or replace function etl._request_cancel(run_id bigint, reason text) returns int
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = _request_cancel.run_id for update;
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
         cancel_reason = coalesce(r.cancel_reason, _request_cancel.reason)
   where r.run_id = _request_cancel.run_id;
  -- The row of the step in flight, held until this transaction ends: its outcome cannot be written before the signal
  -- is sent, so the signal hits the step and not the bookkeeping after it, which would end the CALL. skip locked: an
  -- outcome already written is about to be committed.
  perform from etl.procedure_runs p where p.run_id = _request_cancel.run_id and p.status = 'running'
   order by p.order_index desc limit 1 for update skip locked;
  if not found then
    perform from etl.mv_refreshes m where m.run_id = _request_cancel.run_id and m.status = 'running' limit 1 for update skip locked;
  end if;
  return case when found then v_run.worker_pid end;
end $$;
comment on function etl._request_cancel(bigint, text) is
  'Records that a run is to stop; returns the backend that executes a step of it now, else null. Raises what etl.cancel_run raises.';
revoke all on function etl._request_cancel(bigint, text) from public;
grant execute on function etl._request_cancel(bigint, text) to etl_operator;

-- Not security definer: a login may always cancel its own statements, whereas etl_owner may cancel those of others
-- only as a member of pg_signal_backend.
create or replace function etl.cancel_run(run_id bigint, reason text default null, force boolean default false) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pid int := etl._request_cancel(run_id, reason);
begin
  if not force or v_pid is null then return 'the step in flight is finished, what follows is skipped'; end if;
  begin
    perform pg_cancel_backend(v_pid);
  exception when insufficient_privilege then
    if not etl._signal_worker(run_id) then
      raise warning 'the statement in flight goes on: neither % nor etl_owner may cancel it', current_user
        using hint = 'grant pg_signal_backend to etl_owner; the statements of a superuser only a superuser may cancel';
      return 'the step in flight is finished, what follows is skipped';
    end if;
  end;
  return 'the statement in flight was cancelled, what follows is skipped';
end $$;
comment on function etl.cancel_run(bigint, text, boolean) is
  'Asks an active run to stop after its current scope; with force its statement is cancelled now. Operators cancel their own runs, admins any. '
  'Raises PT404 run.unknown, PT403 run.not_yours, PT409 run.ended or run.dead.';
revoke all on function etl.cancel_run(bigint, text, boolean) from public;
grant execute on function etl.cancel_run(bigint, text, boolean) to etl_operator;

create or replace function etl._signal_worker(run_id bigint) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_cancel_backend(etl._request_cancel(run_id, null));
  return true;
exception when insufficient_privilege then
  return false;
end $$;
comment on function etl._signal_worker(bigint) is 'Cancels the statement of a run as etl_owner, for whoever may cancel the run; false when etl_owner may not.';
revoke all on function etl._signal_worker(bigint) from public;
grant execute on function etl._signal_worker(bigint) to etl_operator;

-- An interrupted wait ends the run, like an interrupted step.
create or replace function etl._is_cancelled(run_id bigint, interruption text) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  if interruption is not null then perform etl._absorb_signal(); end if;
  v_run := etl._check_owner(run_id);
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
language sql stable set search_path = pg_catalog, pg_temp as $$
  select run.status = 'running' and exists (
    select from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.classid = 6435443 and l.objid = etl._lock_key(run)::oid and l.objsubid = 2 and l.granted
       and l.pid = run.worker_pid and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()))
$$;
comment on function etl._is_alive(etl.runs) is 'Whether the session that executes a run still holds its lock.';
revoke all on function etl._is_alive(etl.runs) from public;
grant execute on function etl._is_alive(etl.runs) to etl_reader;
