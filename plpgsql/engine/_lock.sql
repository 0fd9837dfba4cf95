-- The run lock: advisory lock (6435443, pipeline_id), or (6435443, -run_id) for a backfill; hand over hand.
--
-- Who begins a run takes it exclusively, once: that succeeds only where nobody is at work. Who executes the run shares it.
-- It is held at transaction level while code runs, so that any error releases it, and at session level only across
-- a COMMIT or ROLLBACK, so that nobody slips in between. Whoever dies leaves no lock: a run in status 'running'
-- whose lock is free is dead now, not after a timeout. The one leak there is, a COMMIT that itself fails, is
-- healed by the same session's next start and named to everybody else's.
--
-- Both are expressions that the planner inlines: they stand around every COMMIT, where a statement each would cost 10 us.
-- Whoever calls them holds the lock already, so trying succeeds.
create or replace function etl._hold(lock_key int) returns boolean
language sql volatile
return pg_try_advisory_lock_shared(6435443, lock_key);
comment on function etl._hold(int) is 'Takes the run lock at session level too, just before a COMMIT or ROLLBACK.';
revoke all on function etl._hold(int) from public;
grant execute on function etl._hold(int) to etl_operator;

create or replace function etl._rehold(lock_key int) returns boolean
language sql volatile
return pg_try_advisory_xact_lock_shared(6435443, lock_key) and pg_advisory_unlock_shared(6435443, lock_key);
comment on function etl._rehold(int) is 'Takes the run lock at transaction level only, just after a COMMIT or ROLLBACK.';
revoke all on function etl._rehold(int) from public;
grant execute on function etl._rehold(int) to etl_operator;

create or replace function etl._lock_key(run etl.runs) returns int
language sql immutable
return case run.kind when 'backfill' then -(run.run_id % 2147483647)::int else run.pipeline_id end;
comment on function etl._lock_key(etl.runs) is 'The second key of the advisory lock of a run: its pipeline; for a backfill its own number, negative.';
revoke all on function etl._lock_key(etl.runs) from public;
grant execute on function etl._lock_key(etl.runs) to etl_reader;

-- Holds of our own at session level were left by an earlier CALL of this session that was interrupted, or whose COMMIT failed:
-- as long as they are there, its run passes for alive.
create or replace function etl._drop_holds(lock_key int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  while exists (select from pg_catalog.pg_locks l
                 where l.locktype = 'advisory' and l.pid = pg_backend_pid() and l.classid = 6435443
                   and l.objid = lock_key::oid and l.objsubid = 2 and l.granted) loop
    exit when not (pg_advisory_unlock_shared(6435443, lock_key) or pg_advisory_unlock(6435443, lock_key));
  end loop;
end $$;
comment on function etl._drop_holds(int) is 'Lets go of a run lock that an earlier CALL of this session has left behind.';
revoke all on function etl._drop_holds(int) from public;

create or replace function etl._acquire(pipeline_id int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_holder record;
begin
  perform etl._drop_holds(pipeline_id), etl._forget_logs();
  if not pg_try_advisory_xact_lock_shared(6435443, 0) then
    perform etl._fail('PT409', 'install.active', 'b2s is being upgraded in this database', 'try again in a moment');
  end if;
  if pg_try_advisory_xact_lock(6435443, pipeline_id) then return; end if;
  select l.pid, a.usename, a.application_name, r.run_id,
         exists (select from pg_catalog.pg_locks v where v.pid = l.pid and v.locktype = 'virtualxid') as is_busy
    into v_holder
    from pg_catalog.pg_locks l
    left join pg_catalog.pg_stat_activity a on a.pid = l.pid
    left join etl.runs r on r.pipeline_id = _acquire.pipeline_id and r.status = 'running' and r.kind = 'run'
   where l.locktype = 'advisory' and l.classid = 6435443 and l.objid = _acquire.pipeline_id::oid and l.objsubid = 2 and l.granted
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database());
  perform etl._fail('PT409', 'run.active',
    format('run %s of this pipeline is active', coalesce(v_holder.run_id::text, '(being started)')),
    case when v_holder.is_busy is false
      then format('backend %s holds the run lock but is idle: its CALL failed in COMMIT; end that session: select pg_terminate_backend(%s)',
                  v_holder.pid, v_holder.pid)
      else format('wait for it, or stop it: select etl.cancel_run(%s, reason => ''...'')', coalesce(v_holder.run_id::text, 'run_id'))
    end,
    jsonb_build_object('run_id', v_holder.run_id, 'pid', v_holder.pid, 'user', v_holder.usename,
                       'application_name', v_holder.application_name));
end $$;
comment on function etl._acquire(int) is
  'Takes the run lock of a pipeline for this transaction. Raises PT409 run.active, naming the run and the session that hold it.';
revoke all on function etl._acquire(int) from public;

create or replace function etl._fail_not_owned(run_id bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using errcode = '42501',
    message = format('this session does not execute run %s', run_id),
    detail = jsonb_build_object('code', 'run.not_owned')::text,
    hint = 'engine helpers are called by etl.start_run only: call etl.start_run(...)';
end $$;
comment on function etl._fail_not_owned(bigint) is 'Raises 42501 run.not_owned.';
revoke all on function etl._fail_not_owned(bigint) from public;

create or replace function etl._is_owner(run etl.runs) returns boolean
language sql volatile
return run.status = 'running' and run.worker_pid = pg_backend_pid() and pg_try_advisory_xact_lock_shared(6435443, etl._lock_key(run));
comment on function etl._is_owner(etl.runs) is 'Whether this very session took a run up and executes it: it is the recorded worker and holds the run lock.';
revoke all on function etl._is_owner(etl.runs) from public;

create or replace function etl._is_helper(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(run.status = 'running', false) and exists (select from etl.run_workers w where w.run_id = run.run_id and w.pid = pg_backend_pid())
     and pg_try_advisory_xact_lock_shared(6435443, etl._lock_key(run));
end $$;
comment on function etl._is_helper(etl.runs) is 'Whether this very session has joined a run that another one took up.';
revoke all on function etl._is_helper(etl.runs) from public;

-- Without a statistics view: whoever holds the run lock is alive.
create or replace function etl._living_workers(run etl.runs) returns int[]
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(distinct l.pid), '{}') from pg_catalog.pg_locks l
   where l.locktype = 'advisory' and l.classid = 6435443 and l.objid = etl._lock_key(run)::oid and l.objsubid = 2 and l.granted
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
     and (l.pid = run.worker_pid or l.pid in (select w.pid from etl.run_workers w where w.run_id = run.run_id))
$$;
comment on function etl._living_workers(etl.runs) is 'The backends that execute a run.';
revoke all on function etl._living_workers(etl.runs) from public;

create or replace function etl._check_owner(run_id bigint) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = _check_owner.run_id;
  if etl._is_owner(v_run) is not true and etl._is_helper(v_run) is not true then perform etl._fail_not_owned(run_id); end if;
  return v_run;
end $$;
comment on function etl._check_owner(bigint) is
  'The run, if this very session executes it: it holds the run lock and is the recorded worker. Else raises 42501.';
revoke all on function etl._check_owner(bigint) from public;
