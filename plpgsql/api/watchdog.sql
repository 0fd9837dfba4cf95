-- Timeouts of steps. A session cannot time out its own statement inside a CALL, so somebody else does, once a second or so.
--
-- The rows of the step are held until this transaction ends: its outcome cannot be written before the signal is sent, so the
-- signal hits the step and not the bookkeeping after it. skip locked: an outcome already written is about to be committed.
create or replace function etl._time_out_steps() returns int[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_scope record;
  v_pids  int[] := '{}';
begin
  for v_scope in
    select p.run_id, p.scope_index, p.worker_pid
      from etl.procedure_runs p join etl.runs r using (run_id)
     where r.status = 'running' and p.status = 'running'
     group by p.run_id, p.scope_index, p.worker_pid
    having bool_and(p.settings ? 'timeout_ms') and bool_and(p.timed_out_at is null)
       and min(p.started_at) + sum((p.settings->>'timeout_ms')::bigint) * interval '1 ms' < clock_timestamp()
  loop
    perform from etl.procedure_runs p
      where p.run_id = v_scope.run_id and p.scope_index = v_scope.scope_index and p.status = 'running' for update skip locked;
    continue when not found;
    update etl.procedure_runs p set timed_out_at = clock_timestamp()
     where p.run_id = v_scope.run_id and p.scope_index = v_scope.scope_index and p.status = 'running';
    v_pids := v_pids || v_scope.worker_pid;
  end loop;
  return v_pids;
end $$;
comment on function etl._time_out_steps() is
  'Marks steps whose timeout has passed, and returns the backends that execute them; a group, which is one transaction, has the sum of its timeouts.';
revoke all on function etl._time_out_steps() from public;
grant execute on function etl._time_out_steps() to etl_operator;

-- A statement that nobody here may cancel goes on, and may be cancelled by the next one who looks. Only what this very transaction
-- has marked: whose signal was sent stays marked.
create or replace function etl._withdraw_timeout(pid int) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  update etl.procedure_runs p set timed_out_at = null
    from etl.runs r
   where r.status = 'running' and p.run_id = r.run_id and p.status = 'running' and p.worker_pid = _withdraw_timeout.pid
     and p.timed_out_at is not null and p.xmin = pg_current_xact_id_if_assigned()::xid
$$;
comment on function etl._withdraw_timeout(int) is 'Takes back the mark that etl._time_out_steps has set in this transaction on the steps of a backend.';
revoke all on function etl._withdraw_timeout(int) from public;
grant execute on function etl._withdraw_timeout(int) to etl_operator;

create or replace function etl.watchdog() returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pid   int;
  v_count int := 0;
begin
  foreach v_pid in array etl._time_out_steps() loop
    if etl._cancel_statement(v_pid) then
      v_count := v_count + 1;
    else
      perform etl._withdraw_timeout(v_pid);
      raise warning 'the timeout of the step of backend % has passed, but neither % nor etl_owner may cancel it', v_pid, current_user
        using hint = 'grant pg_signal_backend to etl_owner; the statements of a superuser only a superuser may cancel';
    end if;
  end loop;
  return v_count;
end $$;
comment on function etl.watchdog() is
  'Cancels the statements of steps whose timeout has passed; returns how many. To be called once a second or so: b2s run and b2s worker do, or a clock.';
revoke all on function etl.watchdog() from public;
grant execute on function etl.watchdog() to etl_operator;
