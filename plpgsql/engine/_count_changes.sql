-- Rows written per table, without the routine's help, from the server's own counters of this transaction.
--
-- Within one CALL these counters are not reset by COMMIT or ROLLBACK, so each step takes the difference to what
-- was seen before it. The tables looked at are those this transaction holds a write lock on, so that the cost
-- does not grow with the number of tables in the database.
create or replace function etl._change_baseline() returns jsonb
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(q.oid::text, jsonb_build_array(q.i, q.u, q.d)), '{}')
    from (select c.oid, pg_stat_get_xact_tuples_inserted(c.oid) as i, pg_stat_get_xact_tuples_updated(c.oid) as u,
                 pg_stat_get_xact_tuples_deleted(c.oid) as d
            from pg_catalog.pg_class c where c.relkind = 'r' and c.relnamespace <> 'etl'::regnamespace) q
   where q.i + q.u + q.d > 0
$$;
comment on function etl._change_baseline() is 'The counters of all tables as they stand, by oid: [inserted, updated, deleted].';
revoke all on function etl._change_baseline() from public;
grant execute on function etl._change_baseline() to etl_operator;

create or replace function etl._count_changes(inout seen jsonb, out changes jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_table record;
  v_old   jsonb;
begin
  changes := '{}';
  for v_table in
    select q.oid, q.oid::regclass::text as name, q.i, q.u, q.d
      from (select l.relation as oid, pg_stat_get_xact_tuples_inserted(l.relation) as i, pg_stat_get_xact_tuples_updated(l.relation) as u,
                   pg_stat_get_xact_tuples_deleted(l.relation) as d
              from pg_catalog.pg_locks l
             where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation >= 16384
               and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')) q
     where q.i + q.u + q.d > 0 or seen ? q.oid::text
  loop
    -- A temporary table is named without its schema here; one that the step itself dropped is gone.
    continue when v_table.name ~ '^(etl|pg_toast)\.'
      or (select c.relpersistence in ('p', 'u') from pg_catalog.pg_class c where c.oid = v_table.oid) is not true;
    v_old := coalesce(seen->v_table.oid::text, '[0, 0, 0]');
    -- TRUNCATE takes back what the transaction had counted before it: then the count since is all there is.
    if v_table.i < (v_old->>0)::bigint or v_table.u < (v_old->>1)::bigint or v_table.d < (v_old->>2)::bigint then v_old := '[0, 0, 0]'; end if;
    continue when v_old = jsonb_build_array(v_table.i, v_table.u, v_table.d);
    seen := seen || jsonb_build_object(v_table.oid::text, jsonb_build_array(v_table.i, v_table.u, v_table.d));
    changes := changes || jsonb_build_object(v_table.name, jsonb_build_object('inserted', v_table.i - (v_old->>0)::bigint,
      'updated', v_table.u - (v_old->>1)::bigint, 'deleted', v_table.d - (v_old->>2)::bigint));
  end loop;
end $$;
comment on function etl._count_changes(jsonb) is 'Rows inserted, updated and deleted per table since the counters given; and the counters now.';
revoke all on function etl._count_changes(jsonb) from public;
