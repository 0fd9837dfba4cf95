-- Rows written per table, without the routine's help, from the server's own counters of this transaction.
--
-- Within one CALL these counters are not reset by COMMIT or ROLLBACK, so each step takes the difference to what
-- was seen before it. In a database of few tables all of them are looked at; else those this transaction holds a write
-- lock on (50 us, whatever their number). A relation that came into being after the baseline has a higher oid than any
-- before it, and makes the locks be looked at too.
--
-- What was seen is one flat array, which plain memory copies take through the engine however many tables a run writes:
-- {newest oid of the database, or 0 where there are many tables; then for each table -oid, inserted, updated, deleted}. Counters are never
-- negative, so that a table is found by its negative oid.
create or replace function etl._change_baseline() returns bigint[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables oid[] := array(select c.oid from pg_catalog.pg_class c
                           where c.relkind = 'r' and c.relpersistence <> 't' and c.oid >= 16384 and c.relnamespace <> 'etl'::regnamespace);
  v_is_few boolean := cardinality(v_tables) <= 24;
begin
  return case when v_is_few then (select c.oid::bigint from pg_catalog.pg_class c order by c.oid desc limit 1) else 0 end || coalesce((
    select array_agg(n order by q.oid, k.ordinality)
      from (select t.oid, pg_stat_get_xact_tuples_inserted(t.oid) as i, pg_stat_get_xact_tuples_updated(t.oid) as u,
                   pg_stat_get_xact_tuples_deleted(t.oid) as d from unnest(v_tables) t(oid)) q
      cross join lateral unnest(array[-q.oid::bigint, q.i, q.u, q.d]) with ordinality k(n, ordinality)
     where v_is_few or q.i + q.u + q.d > 0), '{}');
end $$;
comment on function etl._change_baseline() is 'The counters of tables as they stand: {newest oid or 0, -oid, inserted, updated, deleted, -oid, ...}.';
revoke all on function etl._change_baseline() from public;
grant execute on function etl._change_baseline() to etl_operator, etl_owner;

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

-- TRUNCATE takes back what the transaction had counted before it, that is, what earlier steps of the group did: then
-- the count since the scope began is the count since the TRUNCATE. first: what was seen when the scope began.
create or replace function etl._count_changes(inout seen bigint[], first bigint[], out changes jsonb)
language plpgsql volatile as $$
declare
  v_is_few boolean := seen[1] <> 0 and seen[1] = (select c.oid::bigint from pg_catalog.pg_class c order by c.oid desc limit 1);
  v_tables oid[];
  v_table  oid;
  v_name   text;
  v_at     int;
  v_first  int;
  i bigint; u bigint; d bigint;
  v_before bigint[];
begin
  changes := '{}';
  if not v_is_few then v_tables := etl._written_tables(); end if;
  for n in 1 .. case when v_is_few then (cardinality(seen) - 1) / 4 else cardinality(v_tables) end loop
    v_table := case when v_is_few then -seen[4 * n - 2] else v_tables[n] end;
    v_at := case when v_is_few then 4 * n - 2 else array_position(seen, -v_table::bigint) end;
    i := pg_stat_get_xact_tuples_inserted(v_table); u := pg_stat_get_xact_tuples_updated(v_table); d := pg_stat_get_xact_tuples_deleted(v_table);
    continue when i = coalesce(seen[v_at + 1], 0) and u = coalesce(seen[v_at + 2], 0) and d = coalesce(seen[v_at + 3], 0);
    -- What was seen before is a table whose changes count, unless the step has dropped it. Of what was not, the engine's own tables do not
    -- count, nor temporary ones, nor what is no table, and are not kept.
    if v_is_few then v_name := nullif(v_table::regclass::text, v_table::text);
    else v_name := (select format('%I.%I', s.nspname, c.relname) from pg_catalog.pg_class c join pg_catalog.pg_namespace s on s.oid = c.relnamespace
                     where c.oid = v_table and c.relkind = 'r' and c.relpersistence <> 't' and s.nspname <> 'etl'); end if;
    continue when v_name is null;
    if v_at is null then
      v_at := cardinality(seen) + 1;
      seen := seen || array[-v_table::bigint, 0, 0, 0];
    end if;
    v_before := seen[v_at + 1:v_at + 3];
    if i < v_before[1] or u < v_before[2] or d < v_before[3] then
      v_first := array_position(first, -v_table::bigint);
      v_before := coalesce(first[v_first + 1:v_first + 3], '{0,0,0}');
    end if;
    seen[v_at + 1] := i; seen[v_at + 2] := u; seen[v_at + 3] := d;
    changes := changes || jsonb_build_object(v_name, jsonb_build_object('inserted', i - v_before[1], 'updated', u - v_before[2], 'deleted', d - v_before[3]));
  end loop;
end $$;
comment on function etl._count_changes(bigint[], bigint[]) is 'Rows inserted, updated and deleted per table since the counters given; and the counters now.';
revoke all on function etl._count_changes(bigint[], bigint[]) from public;
grant execute on function etl._count_changes(bigint[], bigint[]) to etl_owner;
