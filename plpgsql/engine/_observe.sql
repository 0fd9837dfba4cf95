-- What a step read and wrote, from the locks that it held: nobody has to declare it, and dynamic SQL, triggers, helper
-- functions and views cannot hide it.
--
-- A look costs several scans of pg_locks, some hundred microseconds, as much as half a step. So only steps that are marked when their run is planned are
-- looked at: the first of a routine in a mode after it has changed, then one a day (etl.pipelines.observe_lineage). A step that is
-- not marked pays for one test of its settings. What was seen leaves the transaction of the data as a part of its event and is
-- recorded with the next claim: bookkeeping must not make a step fail, or wait for another one.
--
-- The locks of a transaction add up. In a group, a relation that an earlier step has locked in the same way shows no new lock; that this
-- step read it shows in the counters of scans of the table and its indexes, that it wrote it in the rows it changed.

-- {"oid:mode": scans so far} of everything that this transaction has locked.
create or replace function etl._lock_marks() returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
begin
  return (
    select jsonb_object_agg(l.relation || ':' || l.mode,
           coalesce(pg_stat_get_xact_numscans(l.relation), 0) + coalesce(pg_stat_get_xact_tuples_returned(l.relation), 0) + coalesce(pg_stat_get_xact_tuples_fetched(l.relation), 0))
    from pg_catalog.pg_locks l
   where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.granted and l.relation >= 16384);
end $$;
comment on function etl._lock_marks() is 'The relations this transaction has locked, by oid and mode, each with a counter that rises when it is read.';
revoke all on function etl._lock_marks() from public;
grant execute on function etl._lock_marks() to etl_owner;

-- PL/pgSQL, which keeps its plan: planning this anew for each step would cost several times what it does. Index lookups for what is
-- locked, not a scan of a catalog that may hold ten thousand tables.
-- before: the marks when the step began, null for the first of its transaction; after: those when its routine ended. changes: its rows per table.
create or replace function etl._observed_relations(before jsonb, after jsonb, changes jsonb) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set jit = off
  set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off as $$
begin
  return (
  with marks as (
    select split_part(m.key, ':', 1)::oid as oid, split_part(m.key, ':', 2) as mode, not coalesce(before ? m.key, false) as is_new,
           m.value::bigint > coalesce((before->>m.key)::bigint, 0) as is_scanned
      from jsonb_each_text(after) m
  ), held as (
    select m.oid, m.mode, m.is_new, m.is_scanned from marks m
    union all
    select i.indrelid, 'index', false, true from marks m join pg_catalog.pg_index i on i.indexrelid = m.oid where m.is_scanned
  ), touched as (
    select h.oid, c.relnamespace, c.relname, coalesce(pg_partition_root(h.oid)::oid, h.oid) as root,
           bool_or(h.is_new and h.mode = 'AccessShareLock')
             or before is not null and bool_or(h.is_scanned) and bool_or(h.mode = 'AccessShareLock') and not bool_or(h.is_new and h.mode = 'RowShareLock') as is_read,
           bool_or(h.is_new and h.mode = 'RowShareLock')
             or before is not null and bool_or(h.is_scanned) and bool_or(h.mode = 'RowShareLock') and not bool_or(h.mode = 'AccessShareLock') as is_referenced,
           bool_or(h.is_new and h.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')) as is_written,
           max((changes #>> array[format('%I.%I', n.nspname, c.relname), 'inserted'])::bigint
               + (changes #>> array[format('%I.%I', n.nspname, c.relname), 'updated'])::bigint
               + (changes #>> array[format('%I.%I', n.nspname, c.relname), 'deleted'])::bigint) as written_rows
      from held h
      join pg_catalog.pg_class c on c.oid = h.oid and c.relkind in ('r', 'p', 'v', 'm', 'f') and c.relpersistence <> 't'
      join pg_catalog.pg_namespace n on n.oid = c.relnamespace and n.nspname not in ('etl', 'pg_toast')
     group by h.oid, c.relnamespace, c.relname, n.nspname
  ), rooted as (
    select format('%I.%I', n.nspname, r.relname) as relation, bool_or(t.is_read) as is_read, bool_or(t.is_referenced) as is_referenced,
           bool_or(t.is_written or t.written_rows > 0) as is_written, coalesce(sum(t.written_rows), 0) as written_rows
      from touched t
      join pg_catalog.pg_class r on r.oid = t.root
      join pg_catalog.pg_namespace n on n.oid = r.relnamespace
     group by 1
  )
  select coalesce(jsonb_agg(jsonb_strip_nulls(jsonb_build_object('relation', r.relation, 'access', a.access,
           'rows', case when a.access = 'write' then r.written_rows end)) order by r.relation, a.access), '[]')
    from rooted r
    cross join lateral unnest(array[case when r.is_read then 'read' end, case when r.is_written then 'write' end,
                                    case when r.is_referenced and not r.is_read then 'reference' end]) a(access)
   where a.access is not null);
end $$;
comment on function etl._observed_relations(jsonb, jsonb, jsonb) is
  'What the step that has just been executed locked: [{"relation", "access": "read", "write" or "reference", "rows"}].';
revoke all on function etl._observed_relations(jsonb, jsonb, jsonb) from public;

-- With the claim that follows the commit of the step.
create or replace function etl._record_observation(run_id bigint, event jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step etl.procedure_runs;
begin
  select * into v_step from etl.procedure_runs p
   where p.run_id = _record_observation.run_id and p.order_index = (event->>'order_index')::int and p.attempt = (event->>'attempt')::int
     and p.worker_pid = pg_backend_pid() and p.status in ('succeeded', 'advanced');
  if not found then perform etl._fail_not_owned(run_id); end if;
  insert into etl.lineage_edges (procedure_id, relation, access, source, written_rows, definition, first_run_id, last_run_id)
  select v_step.procedure_id, r->>'relation', r->>'access', 'observed', (r->>'rows')::bigint, v_step.definition, v_step.run_id, v_step.run_id
    from jsonb_array_elements(event->'relations') r
   order by r->>'relation', r->>'access'
  on conflict on constraint lineage_edges_pkey do update
    set written_rows = excluded.written_rows, definition = excluded.definition, last_run_id = excluded.last_run_id, last_seen_at = clock_timestamp();
  insert into etl.lineage_scans (procedure_id, source, mode, definition, run_id)
  values (v_step.procedure_id, 'observed', v_step.mode, v_step.definition, v_step.run_id)
  on conflict on constraint lineage_scans_pkey do update
    set definition = excluded.definition, run_id = excluded.run_id, scanned_at = clock_timestamp();
end $$;
comment on function etl._record_observation(bigint, jsonb) is 'Stores what an observed step read and wrote, from its event.';
revoke all on function etl._record_observation(bigint, jsonb) from public;
