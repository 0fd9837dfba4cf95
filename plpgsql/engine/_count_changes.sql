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
    select jsonb_build_object('last_oid', case when v_is_few then (select c.oid::bigint from pg_catalog.pg_class c order by c.oid desc limit 1) end,
             'tables', coalesce(jsonb_object_agg(q.oid::text, jsonb_build_array(etl._table_name(q.oid), q.i, q.u, q.d)), '{}'))
      from (select t.oid, pg_stat_get_xact_tuples_inserted(t.oid) as i, pg_stat_get_xact_tuples_updated(t.oid) as u,
                   pg_stat_get_xact_tuples_deleted(t.oid) as d from unnest(v_tables) t(oid)) q
     where v_is_few or q.i + q.u + q.d > 0);
end $$;
comment on function etl._change_baseline() is
  'The counters of tables as they stand, by oid: [name, inserted, updated, deleted]; with last_oid when these are all tables there are.';
revoke all on function etl._change_baseline() from public;
grant execute on function etl._change_baseline() to etl_operator, etl_owner;

-- Null for the engine's own tables, for temporary ones, and for one that the step itself has dropped.
create or replace function etl._table_name(relation oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select format('%I.%I', n.nspname, c.relname)
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where c.oid = relation and c.relkind = 'r' and c.relpersistence <> 't' and n.nspname <> 'etl'
$$;
comment on function etl._table_name(oid) is 'The qualified name of a table whose changes count, else null.';
revoke all on function etl._table_name(oid) from public;
grant execute on function etl._table_name(oid) to etl_operator, etl_owner;

-- The tables that this transaction holds a write lock on.
create or replace function etl._written_tables() returns oid[]
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(distinct l.relation), '{}') from pg_catalog.pg_locks l
   where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation >= 16384
     and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
$$;
comment on function etl._written_tables() is 'Relations on which this transaction holds a lock for writing.';
revoke all on function etl._written_tables() from public;
grant execute on function etl._written_tables() to etl_owner;

create or replace function etl._count_changes(inout seen jsonb, out changes jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan as $$
declare
  v_new jsonb;
begin
  if (seen->'last_oid')::text is distinct from (select c.oid::text from pg_catalog.pg_class c order by c.oid desc limit 1) then
    seen := jsonb_set(seen, '{tables}', (
      select coalesce(jsonb_object_agg(t.oid::text, jsonb_build_array(etl._table_name(t.oid), 0, 0, 0)), '{}')
        from unnest(etl._written_tables()) t(oid)) || (seen->'tables'));
  end if;
  -- TRUNCATE takes back what the transaction had counted before it, that is, what earlier steps of the group did: then
  -- the count since the scope began is the count since the TRUNCATE.
  select jsonb_object_agg(q.key, jsonb_build_array(q.name, q.i, q.u, q.d)),
         jsonb_object_agg(q.name, jsonb_build_object('inserted', q.i - (q.before->>1)::bigint, 'updated', q.u - (q.before->>2)::bigint,
                                                     'deleted', q.d - (q.before->>3)::bigint))
    into v_new, changes
    from (select k.key, k.value->>0 as name, c.i, c.u, c.d,
                 case when c.i < (k.value->>1)::bigint or c.u < (k.value->>2)::bigint or c.d < (k.value->>3)::bigint
                      then coalesce(seen->'start'->k.key, '[null, 0, 0, 0]') else k.value end as before
            from jsonb_each(seen->'tables') k,
                 lateral (select pg_stat_get_xact_tuples_inserted(k.key::oid) as i, pg_stat_get_xact_tuples_updated(k.key::oid) as u,
                                 pg_stat_get_xact_tuples_deleted(k.key::oid) as d) c
           where c.i + c.u + c.d > 0 and (c.i, c.u, c.d) <> ((k.value->>1)::bigint, (k.value->>2)::bigint, (k.value->>3)::bigint)) q
   where q.name is not null;
  if v_new is null then
    changes := '{}';
  else
    seen := jsonb_set(seen, '{tables}', (seen->'tables') || v_new);
  end if;
end $$;
comment on function etl._count_changes(jsonb) is 'Rows inserted, updated and deleted per table since the counters given; and the counters now.';
revoke all on function etl._count_changes(jsonb) from public;
grant execute on function etl._count_changes(jsonb) to etl_owner;
