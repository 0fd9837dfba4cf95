-- History that has been kept for long enough leaves, in batches. What ended runs, attempts and watermark moves say cannot be
-- changed or deleted by anybody: the triggers of engine/_protect_history.sql let deletions by the role etl_retention alone pass.
-- Nobody is a member of it, it cannot log in, and etl._delete_runs and etl._delete_moves are all that it owns (install/finish.sql):
-- they go by the retention that is configured, and take no argument that could make it shorter.

-- The longest of all pipelines, where something is not a pipeline's own. Null: for ever.
create or replace function etl._kept_since(what text, pipeline_id int default null) returns timestamptz
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select case when bool_and(d.days <> 'forever') then clock_timestamp() - max(nullif(d.days, 'forever')::int) * interval '1 day' end
    from etl.pipelines l
    cross join lateral (select coalesce(l.retention->>what, case what when 'runs' then '400' when 'logs' then '90' when 'ticks' then '30' end) as days) d
   where l.pipeline_id = _kept_since.pipeline_id or _kept_since.pipeline_id is null
$$;
comment on function etl._kept_since(text, int) is 'The time before which runs, logs or ticks are no longer kept; null: all are.';
revoke all on function etl._kept_since(text, int) from public;
grant execute on function etl._kept_since(text, int) to etl_retention;

-- Tables of others, too: what has a foreign key to a run keeps it.
create or replace function etl._reference_sql() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(string_agg(
           case when has_column_privilege(k.conrelid, a.attname, 'select') and has_schema_privilege(c.relnamespace, 'usage')
                then format(' and not exists (select from %s x where x.%I = r.run_id)', k.conrelid::regclass, a.attname)
                else etl._fail('PT403', 'purge.not_readable', format('%s refers to runs, and etl_engine, which purges them, may not read it', k.conrelid::regclass),
                       format('grant usage on schema %s to etl_engine; grant select on %s to etl_engine', c.relnamespace::regnamespace, k.conrelid::regclass))::text end,
           '' order by k.conname, k.oid), '')
    from pg_catalog.pg_constraint k
    join pg_catalog.pg_class c on c.oid = k.conrelid
    join pg_catalog.pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
   where k.contype = 'f' and k.confrelid = 'etl.runs'::regclass and k.conparentid = 0
     and k.conrelid not in ('etl.run_workers'::regclass, 'etl.mv_refreshes'::regclass)
$$;
comment on function etl._reference_sql() is 'The condition that nothing refers to a run r: other runs, watermarks, and whatever else has a foreign key to it.';
revoke all on function etl._reference_sql() from public;

-- How each procedure, and each schedule, last ended and last succeeded is shown however long ago that was: a schedule that is due
-- once a year is not late because its run was purged.
create or replace function etl._remembered_runs(pipeline_id int) returns bigint[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(array_agg(distinct q.run_id), '{}') from (
    select a.run_id
      from etl.procedures p
      cross join lateral (
        (select a.run_id from etl.procedure_runs a where a.procedure_id = p.procedure_id and a.lock_key > 0 order by a.run_id desc limit 1)
        union all
        (select a.run_id from etl.procedure_runs a
          where a.procedure_id = p.procedure_id and a.status = 'succeeded' and a.lock_key > 0 order by a.run_id desc limit 1)) a
     where p.pipeline_id = _remembered_runs.pipeline_id and p.is_active
    union all
    select r.run_id
      from etl.schedules s
      cross join lateral (
        (select h.run_id from etl.schedule_slots h where h.schedule_id = s.schedule_id order by h.slot_at desc limit 1)
        union all
        (select h.run_id from (select * from etl.schedule_slots x where x.schedule_id = s.schedule_id and x.run_id is not null order by x.slot_at desc limit 10000) h
          where etl._succeeded_at(h.run_id) is not null order by h.slot_at desc limit 1)) h
      cross join lateral etl._resumptions(h.run_id) r
     where s.pipeline_id = _remembered_runs.pipeline_id and s.is_active) q
$$;
comment on function etl._remembered_runs(int) is
  'The runs in which each procedure of a pipeline last ended and last succeeded, and those of the last slot, and the last successful one, of each schedule.';
revoke all on function etl._remembered_runs(int) from public;

-- Whole runs of one pipeline, the oldest first, until they have so many attempts together; one at least. What somebody is just
-- referring to, as whoever resumes a run does, is left for the next time. Their rows are held, so that nobody can from now on; and
-- looked at again, for who did after the first look and before that.
create or replace function etl._expired_runs(max_rows int) returns bigint[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline record;
  v_run      record;
  v_runs     bigint[] := '{}';
  v_count    int := 0;
begin
  for v_pipeline in select l.pipeline_id, etl._kept_since('runs', l.pipeline_id) as since from etl.pipelines l order by l.pipeline_id loop
    continue when v_pipeline.since is null;
    for v_run in execute
      'select r.run_id, r.step_count from etl.runs r where r.pipeline_id = $1 and r.ended_at < $2 and r.run_id <> all ($3)' || etl._reference_sql()
      || ' order by r.run_id for update of r skip locked' using v_pipeline.pipeline_id, v_pipeline.since, etl._remembered_runs(v_pipeline.pipeline_id)
    loop
      exit when v_count > 0 and v_count + v_run.step_count > max_rows;
      v_runs := v_runs || v_run.run_id;
      v_count := v_count + v_run.step_count + 1;
    end loop;
    exit when v_runs <> '{}';
  end loop;
  execute 'select coalesce(array_agg(r.run_id order by r.run_id), ''{}'') from etl.runs r where r.run_id = any ($1)' || etl._reference_sql() into v_runs using v_runs;
  return v_runs;
end $$;
comment on function etl._expired_runs(int) is 'Runs that are no longer kept and that nothing refers to, a batch of them; holds their rows.';
revoke all on function etl._expired_runs(int) from public;
grant execute on function etl._expired_runs(int) to etl_retention;

create or replace function etl._delete_runs(max_rows int, out runs int, out attempts int)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_runs bigint[] := etl._expired_runs(max_rows);
begin
  delete from etl.procedure_runs p where p.run_id = any (v_runs);
  get diagnostics attempts = row_count;
  delete from etl.run_scopes s where s.run_id = any (v_runs);
  delete from etl.run_workers w where w.run_id = any (v_runs);
  delete from etl.mv_refreshes m where m.run_id = any (v_runs);
  delete from etl.runs r where r.run_id = any (v_runs);
  get diagnostics runs = row_count;
end $$;
comment on function etl._delete_runs(int) is 'Deletes a batch of runs that are no longer kept, with their attempts, scopes and refreshes. Owned by etl_retention. Called by etl.purge.';
revoke all on function etl._delete_runs(int) from public;

-- What was done by hand is remembered for ever, and so is where each watermark came from last.
create or replace function etl._delete_moves(max_rows int) returns int
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_count int;
begin
  delete from etl.state_history h where h.state_history_id in (
    select o.state_history_id from etl.state_history o
     where o.changed_at < etl._kept_since('runs') and o.cause <> 'set'
       and exists (select from etl.state_history n where n.state_key = o.state_key and n.state_history_id > o.state_history_id)
     order by o.state_history_id limit max_rows);
  get diagnostics v_count = row_count;
  return v_count;
end $$;
comment on function etl._delete_moves(int) is 'Deletes a batch of watermark moves that are no longer kept. Owned by etl_retention. Called by etl.purge.';
revoke all on function etl._delete_moves(int) from public;

-- The newest tick of a key stays: as_of means it.
create or replace function etl._delete_ticks(max_rows int) returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_count int;
begin
  delete from etl.watermark_ticks t using (
    select o.state_key, o.ticked_at from etl.watermark_ticks o
     where o.ticked_at < etl._kept_since('ticks')
       and exists (select from etl.watermark_ticks n where n.state_key = o.state_key and n.ticked_at > o.ticked_at) limit max_rows) d
   where t.state_key = d.state_key and t.ticked_at = d.ticked_at;
  get diagnostics v_count = row_count;
  return v_count;
end $$;
comment on function etl._delete_ticks(int) is 'Deletes a batch of ticks that are no longer kept. Called by etl.purge.';
revoke all on function etl._delete_ticks(int) from public;

create or replace function etl._delete_slots(max_rows int) returns int
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_count int;
begin
  delete from etl.schedule_slots s using (
    select o.schedule_id, o.slot_at from etl.schedules c join etl.schedule_slots o using (schedule_id)
     where o.decided_at < etl._kept_since('runs', c.pipeline_id) and not exists (select from etl.runs r where r.run_id = o.run_id)
       and exists (select from etl.schedule_slots n where n.schedule_id = o.schedule_id and n.slot_at > o.slot_at) limit max_rows) d
   where s.schedule_id = d.schedule_id and s.slot_at = d.slot_at;
  get diagnostics v_count = row_count;
  return v_count;
end $$;
comment on function etl._delete_slots(int) is 'Deletes a batch of slots of schedules whose runs are gone. Called by etl.purge.';
revoke all on function etl._delete_slots(int) from public;

-- A month of logs is a table. To drop it takes a lock on all of them, for an instant: whoever writes logs just now, in a
-- transaction that may last, is not waited for, or all others would wait behind this.
create or replace function etl._drop_logs(out dropped text, out busy text)
language plpgsql volatile set search_path = pg_catalog, pg_temp set lock_timeout = '20ms' as $$
begin
  select c.oid::regclass::text into dropped
    from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
   where i.inhparent = 'etl.step_logs'::regclass and c.relname ~ '^step_logs_p\d{4}(0[1-9]|1[0-2])$'
     and (to_date(right(c.relname, 6), 'YYYYMM') + interval '1 month') at time zone 'UTC' <= etl._kept_since('logs')
   order by c.relname limit 1;
  if dropped is null then return; end if;
  begin
    execute format('drop table %s', dropped);
  exception when lock_not_available then
    busy := dropped; dropped := null;
  end;
end $$;
comment on function etl._drop_logs() is 'Drops the oldest month of logs that is no longer kept; busy: it is in use just now.';
revoke all on function etl._drop_logs() from public;
