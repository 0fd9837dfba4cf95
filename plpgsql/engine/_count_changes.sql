-- Rows written per table, without the routine's help, from the server's own counters of this transaction.
--
-- Within one CALL these counters are not reset by COMMIT or ROLLBACK, so each step takes the difference to what
-- was seen before it. In a database of few tables all of them are looked at; else those this transaction holds a write
-- lock on (80 us, whatever their number). A relation that came into being after the baseline has a higher oid than any
-- before it, and makes the locks be looked at too.
create or replace function etl._change_baseline() returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables oid[] := array(select c.oid from pg_catalog.pg_class c
                           where c.relkind = 'r' and c.relpersistence <> 't' and c.oid >= 16384 and c.relnamespace <> 'etl'::regnamespace);
  v_is_few boolean := cardinality(v_tables) <= 24;
begin
  return (
    select coalesce(jsonb_object_agg(q.oid::text, jsonb_build_array(q.i, q.u, q.d)), '{}')
           || case when v_is_few then jsonb_build_object('last_oid', (select max(c.oid)::text from pg_catalog.pg_class c)) else '{}' end
      from (select t.oid, pg_stat_get_xact_tuples_inserted(t.oid) as i, pg_stat_get_xact_tuples_updated(t.oid) as u,
                   pg_stat_get_xact_tuples_deleted(t.oid) as d from unnest(v_tables) t(oid)) q
     where v_is_few or q.i + q.u + q.d > 0);
end $$;
comment on function etl._change_baseline() is
  'The counters of tables as they stand, by oid: [inserted, updated, deleted]; with last_oid when they are all the tables there are.';
revoke all on function etl._change_baseline() from public;
grant execute on function etl._change_baseline() to etl_operator;

create or replace function etl._count_changes(inout seen jsonb, out changes jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_tables oid[];
  v_table record;
  v_now   jsonb;
  v_old   jsonb;
  v_name  text;
begin
  changes := '{}';
  if seen->>'last_oid' = (select max(c.oid)::text from pg_catalog.pg_class c) then
    v_tables := array(select k.key::oid from jsonb_object_keys(seen) k(key) where k.key <> 'last_oid');
  else
    v_tables := array(
      select l.relation from pg_catalog.pg_locks l
       where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation >= 16384
         and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock'));
  end if;
  for v_table in
    select q.oid, q.i, q.u, q.d
      from (select t.oid, pg_stat_get_xact_tuples_inserted(t.oid) as i, pg_stat_get_xact_tuples_updated(t.oid) as u,
                   pg_stat_get_xact_tuples_deleted(t.oid) as d from unnest(v_tables) t(oid)) q
     where q.i + q.u + q.d > 0 or seen ? q.oid::text
  loop
    v_now := jsonb_build_array(v_table.i, v_table.u, v_table.d);
    v_old := coalesce(seen->v_table.oid::text, '[0, 0, 0]');
    continue when v_old = v_now;
    seen := seen || jsonb_build_object(v_table.oid::text, v_now);
    -- Neither the engine's own tables, nor temporary ones, nor one that the step itself has dropped.
    select format('%I.%I', n.nspname, c.relname) into v_name
      from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
     where c.oid = v_table.oid and c.relkind = 'r' and c.relpersistence <> 't' and n.nspname <> 'etl';
    continue when v_name is null;
    -- TRUNCATE takes back what the transaction had counted before it: then the count since is all there is.
    if v_table.i < (v_old->>0)::bigint or v_table.u < (v_old->>1)::bigint or v_table.d < (v_old->>2)::bigint then v_old := '[0, 0, 0]'; end if;
    changes := changes || jsonb_build_object(v_name, jsonb_build_object('inserted', v_table.i - (v_old->>0)::bigint,
      'updated', v_table.u - (v_old->>1)::bigint, 'deleted', v_table.d - (v_old->>2)::bigint));
  end loop;
end $$;
comment on function etl._count_changes(jsonb) is 'Rows inserted, updated and deleted per table since the counters given; and the counters now.';
revoke all on function etl._count_changes(jsonb) from public;
