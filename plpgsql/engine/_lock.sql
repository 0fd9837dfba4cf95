-- Two advisory locks.
--
-- (6435443, pipeline_id): who begins a run, takes one from the queue or resumes one holds it, exclusively, until that is
-- committed. (6435443, 0): shared by them, exclusive for who installs.
--
-- (6435444, run_id), or (6435444, -run_id) for a backfill, is the run lock: every session that executes the run shares it, hand
-- over hand. It is held at transaction level while code runs, so that any error releases it, and at session level only
-- across a COMMIT or ROLLBACK, so that there is no gap. Whoever dies leaves no lock: a run in status 'running' whose lock
-- nobody holds is dead now, not after a timeout. A COMMIT that fails, or a cancel that arrives during one, leaves the lock
-- with a session that has stopped executing: it counts for nothing (etl._living_workers), and goes with the session's
-- next call or its end.
--
-- Both are expressions that the planner inlines: they stand around every COMMIT, where a statement each would cost 10 us.
-- Whoever calls them holds the lock already, so trying succeeds.
create or replace function etl._hold(lock_key int) returns boolean
language sql volatile
return pg_try_advisory_lock_shared(6435444, lock_key);
comment on function etl._hold(int) is 'Takes the run lock at session level too, just before a COMMIT or ROLLBACK.';
revoke all on function etl._hold(int) from public;
grant execute on function etl._hold(int) to etl_operator;

create or replace function etl._rehold(lock_key int) returns boolean
language sql volatile
return pg_try_advisory_xact_lock_shared(6435444, lock_key) and pg_advisory_unlock_shared(6435444, lock_key);
comment on function etl._rehold(int) is 'Takes the run lock at transaction level only, just after a COMMIT or ROLLBACK.';
revoke all on function etl._rehold(int) from public;
grant execute on function etl._rehold(int) to etl_operator;

create or replace function etl._lock_key(run etl.runs) returns int
language sql immutable
return case run.kind when 'backfill' then -1 else 1 end * (run.run_id % 2147483647)::int;
comment on function etl._lock_key(etl.runs) is 'The second key of the advisory lock of a run: its number, negative for a backfill.';
revoke all on function etl._lock_key(etl.runs) from public;
grant execute on function etl._lock_key(etl.runs) to etl_reader;

-- Called first thing by what begins to execute: no lock of this session can belong to a run yet.
create or replace function etl._drop_holds() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_key oid;
begin
  for v_key in
    select l.objid from pg_catalog.pg_locks l
     where l.locktype = 'advisory' and l.pid = pg_backend_pid() and l.classid = 6435444 and l.objsubid = 2
       and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
  loop
    while pg_advisory_unlock_shared(6435444, v_key::int8::bit(32)::int) loop null; end loop;
  end loop;
end $$;
comment on function etl._drop_holds() is 'Lets go of run locks that an earlier, interrupted CALL of this session has left behind.';
revoke all on function etl._drop_holds() from public;

create or replace function etl._acquire(pipeline_id int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run    etl.runs;
  v_holder record;
begin
  perform etl._drop_holds();
  if not pg_try_advisory_xact_lock_shared(6435443, 0) then
    perform etl._fail('PT409', 'install.active', 'b2s is being upgraded in this database', 'try again in a moment');
  end if;
  if pg_try_advisory_xact_lock(6435443, pipeline_id) then
    perform etl._abandon_dead_runs(pipeline_id);
    select * into v_run from etl.runs r where r.pipeline_id = _acquire.pipeline_id and r.status = 'running' and r.kind = 'run';
    if not found then return; end if;
  end if;
  select l.pid, a.usename, a.application_name into v_holder
    from pg_catalog.pg_locks l
    left join pg_catalog.pg_stat_activity a on a.pid = l.pid
   where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
     and (l.classid, l.objid) = (case when v_run.run_id is null then 6435443 else 6435444 end::oid, coalesce(etl._lock_key(v_run), pipeline_id)::oid)
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
   order by l.pid <> v_run.worker_pid limit 1;
  perform etl._fail('PT409', 'run.active',
    format('run %s of this pipeline is active', coalesce(v_run.run_id::text, '(being started)')),
    format('wait for it, or stop it: select etl.cancel_run(%s, reason => ''...'')', coalesce(v_run.run_id::text, 'run_id')),
    jsonb_build_object('run_id', v_run.run_id, 'pid', v_holder.pid, 'user', v_holder.usename,
                       'application_name', v_holder.application_name));
end $$;
comment on function etl._acquire(int) is
  'Makes this transaction the only one that may begin a run of a pipeline, and records its dead runs as abandoned. '
  'Raises PT409 run.active, naming the run and a session that executes it.';
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
return run.status = 'running' and run.worker_pid = pg_backend_pid() and pg_try_advisory_xact_lock_shared(6435444, etl._lock_key(run));
comment on function etl._is_owner(etl.runs) is 'Whether this very session took a run up and executes it: it is the recorded worker and holds the run lock.';
revoke all on function etl._is_owner(etl.runs) from public;

create or replace function etl._is_helper(run etl.runs) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(run.status = 'running', false) and exists (select from etl.run_workers w where w.run_id = run.run_id and w.pid = pg_backend_pid())
     and pg_try_advisory_xact_lock_shared(6435444, etl._lock_key(run));
end $$;
comment on function etl._is_helper(etl.runs) is 'Whether this very session has joined a run that another one took up.';
revoke all on function etl._is_helper(etl.runs) from public;

-- Whoever holds the run lock, and is still inside the CALL that took the run up: a session shows one moment of beginning for a CALL,
-- however long that lasts. What the server does not show, as to a role without pg_read_all_stats, the lock alone decides.
create or replace function etl._living_workers(run etl.runs) returns int[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_stat_clear_snapshot();
  return array(
    select distinct w.pid
      from (select run.worker_pid as pid, run.started_at as since
            union all select h.pid, h.joined_at from etl.run_workers h where h.run_id = run.run_id) w
      join pg_catalog.pg_locks l on l.pid = w.pid and l.locktype = 'advisory' and l.classid = 6435444 and l.objid = etl._lock_key(run)::oid
       and l.objsubid = 2 and l.granted and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
      left join lateral pg_catalog.pg_stat_get_activity(w.pid) a on true
     where a.state is null or a.state = 'disabled' or a.state = 'active' and a.query_start <= w.since);
end $$;
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
