-- Storing a plan as a run.

-- What waits for what among the scopes of a plan. Steps of one phase come before the next barrier and after the last one.
create or replace function etl._plan_edges(items etl.plan_item[])
returns table (from_scope int, to_scope int, is_required boolean)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_steps    int[] := (select array_agg(distinct i.scope_index) from unnest(items) i where i.kind = 'steps');
  v_barriers int[] := (select array_agg(i.scope_index) from unnest(items) i where i.kind = 'barrier');
begin
  return query
  select f.scope_index, t.scope_index, bool_or(e.is_required)
    from etl._selected_edges((select array_agg(i.procedure_id) from unnest(items) i where i.kind = 'steps')) e
    join unnest(items) f on f.procedure_id = e.from_id
    join unnest(items) t on t.procedure_id = e.to_id
   where f.scope_index <> t.scope_index
   group by f.scope_index, t.scope_index
  union all
  select s.scope_index, min(b.scope_index), false
    from unnest(v_barriers) b(scope_index) join unnest(v_steps) s(scope_index) on s.scope_index < b.scope_index
   group by s.scope_index
  union all
  select max(b.scope_index), s.scope_index, false
    from unnest(v_barriers) b(scope_index)
    join unnest(v_steps || array(select i.scope_index from unnest(items) i where i.refresh_after = 'run')) s(scope_index)
      on s.scope_index > b.scope_index
   group by s.scope_index
  union
  select s.scope_index, r.scope_index, false
    from unnest(items) r
    join unnest(items) s on s.order_index = any (r.feeders) or s.scope_index = any (r.depends_on)
   where r.kind = 'refresh' and (r.refresh_after <> 'run' or s.kind = 'refresh');
end $$;
comment on function etl._plan_edges(etl.plan_item[]) is 'Edges among the scopes of a plan: requirements, and mere order.';
revoke all on function etl._plan_edges(etl.plan_item[]) from public;

create or replace function etl._insert_scopes(run_id bigint, items etl.plan_item[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
  with edges as materialized (
    select * from etl._plan_edges(items)
  ), outgoing as (
    select from_scope, array_agg(to_scope order by to_scope) filter (where is_required) as required_by,
           array_agg(to_scope order by to_scope) filter (where not is_required) as precedes
      from edges group by from_scope
  )
  insert into etl.run_scopes (run_id, scope_index, kind, isolation, first_order_index, last_order_index, required_by, precedes,
                              remaining_dependencies)
  select _insert_scopes.run_id, s.scope_index, s.kind, s.isolation, s.first_order_index, s.last_order_index,
         coalesce(o.required_by, '{}'), coalesce(o.precedes, '{}'), coalesce(w.waits_for, 0)
    from (select i.scope_index, i.kind, min(i.order_index) as first_order_index, max(i.order_index) as last_order_index,
                 case when bool_or(p.isolation = 'serializable') then 'serializable'
                      when bool_or(p.isolation = 'repeatable read') then 'repeatable read'
                      else 'read committed' end as isolation
            from unnest(items) i left join etl.procedures p using (procedure_id)
           group by i.scope_index, i.kind) s
    left join outgoing o on o.from_scope = s.scope_index
    left join (select e.to_scope, count(*) as waits_for from edges e group by e.to_scope) w on w.to_scope = s.scope_index
$$;
comment on function etl._insert_scopes(bigint, etl.plan_item[]) is 'Stores the scopes of a plan with their dependency counters.';
revoke all on function etl._insert_scopes(bigint, etl.plan_item[]) from public;

-- What each selected procedure depends on, whether the run includes it, and if not, how old it is.
create or replace function etl._dependency_snapshots(selected int[])
returns table (procedure_id int, dependencies jsonb)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select d.procedure_id, jsonb_agg(
           case when i.id is not null then jsonb_build_object('procedure', p.name, 'in_run', true)
                else jsonb_build_object('procedure', p.name, 'in_run', false, 'last_success_at', etl._last_success_at(p.procedure_id)) end
           order by p.name)
    from unnest(selected) s(id)
    join etl.dependencies d on d.procedure_id = s.id
    join etl.procedures p on p.procedure_id = d.depends_on_id
    left join unnest(selected) i(id) on i.id = d.depends_on_id
   group by d.procedure_id
$$;
comment on function etl._dependency_snapshots(int[]) is 'The dependencies of the selected procedures as they stand when a run is planned.';
revoke all on function etl._dependency_snapshots(int[]) from public;

-- Chunks of a backfill do not count, they read the past: the lock of their run has a negative key.
create or replace function etl._last_success_at(procedure_id int) returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
  select r.ended_at from etl.procedure_runs r
   where r.procedure_id = _last_success_at.procedure_id and r.status = 'succeeded' and r.lock_key > 0 order by r.run_id desc limit 1
$$;
comment on function etl._last_success_at(int) is 'When a procedure last succeeded in a run, backfills apart, or null.';
revoke all on function etl._last_success_at(int) from public;
grant execute on function etl._last_success_at(int) to etl_reader;

create or replace function etl._step_settings(procedure etl.procedures, search_path text[]) returns jsonb
language sql stable
return nullif(jsonb_strip_nulls(jsonb_build_object('timeout_ms', procedure.timeout_ms, 'lock_timeout_ms', procedure.lock_timeout_ms,
                                                   'time_zone', procedure.watermark_time_zone, 'search_path', nullif(search_path, '{}'),
                                                   'checks', nullif(procedure.checks, '[]'))), '{}');
comment on function etl._step_settings(etl.procedures, text[]) is 'What the steps of a procedure set for themselves, as it is configured now; null for nothing.';
revoke all on function etl._step_settings(etl.procedures, text[]) from public;

-- Bodies in the SQL standard's form are stored parsed; prosrc is empty then. Not to_regprocedure, which wants the right to use the schema.
create or replace function etl._definition(procedure etl.procedures) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp set quote_all_identifiers = off as $$
declare
  v_name name[] := parse_ident(procedure.routine_signature, false);
begin
  return md5(concat_ws(E'\n', procedure.call_sql, procedure.isolation, procedure.checks::text,
    (select coalesce(p.prosqlbody::text, p.prosrc) from pg_catalog.pg_proc p
      where p.proname = v_name[2] and p.oid::regprocedure::text = procedure.routine_signature)));
end $$;
comment on function etl._definition(etl.procedures) is 'Digest of a routine and of how it is called.';
revoke all on function etl._definition(etl.procedures) from public;
grant execute on function etl._definition(etl.procedures) to etl_reader;

-- Without nested loops: the server takes the items for a handful, whatever their number.
create or replace function etl._insert_steps(run_id bigint, items etl.plan_item[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_nestloop = off set jit = off as $$
begin
  insert into etl.procedure_runs (run_id, order_index, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode,
    tx_scope, isolation, parameters, dependencies, statement, rows_column, lock_key, settings, watermark_strategy, state_key, definition)
  select _insert_steps.run_id, i.order_index, i.scope_index, p.procedure_id, p.name, p.type, g.name, i.mode, i.tx_scope, s.isolation,
         i.parameters, coalesce(d.dependencies, '[]'), p.call_sql, p.rows_column, r.lock_key,
         case when l.observe_lineage = 'always' or l.observe_lineage = 'daily' and not exists (
                     -- Whether its locks were looked at within a day, as it is now.
                     select from etl.lineage_scans y
                      where y.procedure_id = p.procedure_id and y.source = 'observed' and y.mode = i.mode
                        and y.definition is not distinct from x.definition and y.scanned_at > clock_timestamp() - interval '1 day')
              then coalesce(etl._step_settings(p, l.search_path), '{}') || '{"observe": true}' else etl._step_settings(p, l.search_path) end,
         p.watermark_strategy, p.state_key, x.definition
    from unnest(items) i
    join etl.procedures p using (procedure_id)
    join etl.pipelines l using (pipeline_id)
    cross join lateral etl._definition(p) x(definition)
    join etl.run_scopes s on s.run_id = _insert_steps.run_id and s.scope_index = i.scope_index
    cross join lateral (select etl._lock_key(x) as lock_key from etl.runs x where x.run_id = _insert_steps.run_id) r
    left join etl.group_members m on m.procedure_id = p.procedure_id
    left join etl.groups g using (group_id)
    left join etl._dependency_snapshots((select array_agg(x.procedure_id) from unnest(items) x where x.kind = 'steps')) d
      on d.procedure_id = p.procedure_id
   where i.kind = 'steps'
   order by i.order_index;
  insert into etl.mv_refreshes (run_id, scope_index, refresh_target_id, mv_name, refresh_after, refresh_on, concurrency, feeders, depends_on)
  select _insert_steps.run_id, i.scope_index, i.refresh_target_id, i.mv_name, i.refresh_after, i.refresh_on, i.concurrency, i.feeders, i.depends_on
    from unnest(items) i
   where i.kind = 'refresh';
end $$;
comment on function etl._insert_steps(bigint, etl.plan_item[]) is 'Stores the steps and refreshes of a plan.';
revoke all on function etl._insert_steps(bigint, etl.plan_item[]) from public;

-- A run in status 'running' that no living session executes: what it did is recorded, what it did not is over. Its row is locked
-- before that is judged, and whoever joins a run locks its row too.
create or replace function etl._abandon_if_dead(run_id bigint) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run etl.runs;
begin
  select * into v_run from etl.runs r where r.run_id = _abandon_if_dead.run_id and r.status = 'running' for update;
  if not found or etl._living_workers(v_run) <> '{}' then return false; end if;
  update etl.procedure_runs p
     set status = 'abandoned', ended_at = clock_timestamp(), duration_ms = extract(epoch from clock_timestamp() - p.started_at) * 1000
   where p.run_id = v_run.run_id and p.ended_at is null;
  update etl.mv_refreshes m set status = 'abandoned', ended_at = clock_timestamp()
   where m.run_id = v_run.run_id and m.ended_at is null;
  update etl.runs r
     set status = 'abandoned', ended_at = clock_timestamp(), error_code = 'run.abandoned',
         error_message = format('the session that executed the run (backend %s) is gone: it was interrupted or ended, or the server stopped', v_run.worker_pid)
   where r.run_id = v_run.run_id;
  if v_run.kind = 'backfill' then
    raise warning 'backfill % was abandoned: its session is gone; what it committed stays, the rest was rolled back', v_run.run_id
      using hint = format('go on with what is left: call etl.backfill(resume => %s)', v_run.run_id);
  else
    raise warning 'run % was abandoned: its session is gone; what it committed stays, the rest was rolled back', v_run.run_id;
  end if;
  return true;
end $$;
comment on function etl._abandon_if_dead(bigint) is 'Marks a run or backfill whose sessions are all gone as abandoned; false when it is alive, or has ended.';
revoke all on function etl._abandon_if_dead(bigint) from public;

create or replace function etl._abandon_dead_runs(pipeline_id int) returns int
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select count(*) filter (where etl._abandon_if_dead(q.run_id))
    from (select r.run_id from etl.runs r
           where r.status = 'running' and (r.pipeline_id = _abandon_dead_runs.pipeline_id or _abandon_dead_runs.pipeline_id is null) order by r.run_id) q
$$;
comment on function etl._abandon_dead_runs(int) is 'Marks the dead runs and backfills of a pipeline, null: of all, as abandoned; returns how many.';
revoke all on function etl._abandon_dead_runs(int) from public;

create or replace function etl._insert_run(request jsonb, pipeline_id int, max_concurrency int, items etl.plan_item[], is_queued boolean) returns bigint
language sql volatile set search_path = pg_catalog, pg_temp as $$
  insert into etl.runs (pipeline_id, config_version_id, mode, as_of, parameters, request, idempotency_key, fingerprint, requested_by, subject,
    application_name, approved_by, reason, max_concurrency, step_count, started_at, status, worker_pid)
  select _insert_run.pipeline_id, (select max(v.config_version_id) from etl.config_versions v where v.pipeline_id = _insert_run.pipeline_id),
         request->>'mode', (request->>'as_of')::timestamptz,
         (select coalesce(jsonb_object_agg(p.name, i.parameters) filter (where i.parameters <> '{}'), '{}')
            from unnest(items) i join etl.procedures p using (procedure_id)),
         request, request->>'idempotency_key', etl._fingerprint(request), etl._requester(), etl._subject(), current_setting('application_name'),
         case when not etl._needs_approval(_insert_run.pipeline_id, request) then coalesce(request->>'approved_by', case when request->>'mode' = 'full' then etl._requester() end) end,
         request->>'reason',
         _insert_run.max_concurrency, (select count(*) from unnest(items) i where i.kind = 'steps'),
         case when not is_queued then clock_timestamp() end, case when is_queued then 'queued' else 'running' end,
         case when not is_queued then pg_backend_pid() end
  returning run_id
$$;
comment on function etl._insert_run(jsonb, int, int, etl.plan_item[], boolean) is 'Stores the row of a run; returns its number.';
revoke all on function etl._insert_run(jsonb, int, int, etl.plan_item[], boolean) from public;

-- Queued: only what was asked for. It is planned again when a worker takes it up.
create or replace function etl._create_run(request jsonb, pipeline_id int, max_concurrency int, items etl.plan_item[], is_queued boolean default false)
returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run_id bigint;
begin
  if request ? 'idempotency_key' and current_setting('transaction_isolation') <> 'read committed' then
    -- Such a transaction does not see the run that another one stored under this key after it began.
    begin
      v_run_id := etl._insert_run(request, pipeline_id, max_concurrency, items, is_queued);
    exception when unique_violation then
      perform etl._fail('40001', 'idempotency_key.concurrent', format('a run with the idempotency key %s was stored after this transaction had begun', request->>'idempotency_key'),
        'try again in a new transaction: it finds that run');
    end;
  else
    v_run_id := etl._insert_run(request, pipeline_id, max_concurrency, items, is_queued);
  end if;
  if is_queued then return v_run_id; end if;
  perform etl._insert_scopes(v_run_id, items);
  perform etl._insert_steps(v_run_id, items);
  return v_run_id;
end $$;
comment on function etl._create_run(jsonb, int, int, etl.plan_item[], boolean) is 'Stores a planned request as a run that this session executes, or that waits for a session.';
revoke all on function etl._create_run(jsonb, int, int, etl.plan_item[], boolean) from public;

create or replace function etl._fingerprint(request jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select encode(sha256(convert_to((request - 'idempotency_key')::text, 'UTF8')), 'hex')
$$;
comment on function etl._fingerprint(jsonb) is 'sha256 of a request without its idempotency key.';
revoke all on function etl._fingerprint(jsonb) from public;

-- Requests with the same key pass one at a time: the second one sees what the first committed.
create or replace function etl._known_run(request jsonb) returns etl.runs
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_known etl.runs;
begin
  if not request ? 'idempotency_key' then return null; end if;
  perform pg_advisory_xact_lock(hashtextextended('b2s idempotency key ' || (request->>'idempotency_key'), 0));
  select * into v_known from etl.runs r where r.idempotency_key = _known_run.request->>'idempotency_key';
  if not found then return null; end if;
  if v_known.fingerprint <> etl._fingerprint(request) then
    perform etl._fail('PT409', 'idempotency_key.reused',
      format('idempotency key %s belongs to run %s, which was asked for something else', v_known.idempotency_key, v_known.run_id),
      'use a new key for a new request', jsonb_build_object('run_id', v_known.run_id, 'request', v_known.request));
  end if;
  -- Who asks again because the session died learns that it did.
  perform etl._abandon_if_dead(v_known.run_id);
  return v_known;
end $$;
comment on function etl._known_run(jsonb) is 'The run that the idempotency key of a request already has, or null. Raises PT409 idempotency_key.reused.';
revoke all on function etl._known_run(jsonb) from public;

-- From a request to a run that this session owns, or to the run that the same idempotency key already has.
create or replace function etl._begin_run(request jsonb, out run_id bigint, out lock_key int, out status text, out is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_known etl.runs;
  v_plan  record;
begin
  perform etl._check_request(request);
  v_known := etl._known_run(request);
  if v_known.run_id is not null then
    run_id := v_known.run_id; status := etl._run_status(v_known.run_id); is_new := false;
    return;
  end if;
  v_plan := etl._plan(request);
  if etl._needs_approval(v_plan.pipeline_id, request) then perform etl._fail_unapproved(null); end if;
  perform etl._acquire(v_plan.pipeline_id);
  run_id := etl._create_run(request, v_plan.pipeline_id, v_plan.max_concurrency, v_plan.items); status := 'running'; is_new := true;
  lock_key := (select etl._lock_key(r) from etl.runs r where r.run_id = _begin_run.run_id);
end $$;
comment on function etl._begin_run(jsonb) is
  'Plans a request and stores it as a run owned by this session. Raises PT409 idempotency_key.reused or run.active.';
revoke all on function etl._begin_run(jsonb) from public;
grant execute on function etl._begin_run(jsonb) to etl_operator;
