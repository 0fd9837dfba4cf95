-- Counters that outlive history. A run that ends is counted in the transaction that gives it its final outcome, whichever way
-- it ends: a trigger sees to that. Until then what has ended of it is counted when somebody looks, from its own attempts and in
-- the same snapshot (etl.metrics_outcomes). So the sum is true at any moment, and executing a step costs nothing for it.
-- A backfill may have a hundred thousand chunks, too many to look at each time: it is counted as it goes on, a hundred at a time.

-- The rows of etl.metrics count by these: changing them takes a migration that begins anew.
create or replace function etl._bucket_bounds() returns float8[]
language sql immutable
return array[0.01, 0.05, 0.25, 1, 5, 15, 60, 300, 900, 3600, 14400]::float8[];
comment on function etl._bucket_bounds() is 'Upper bounds of the buckets of all durations, inclusive, seconds; the last bucket has none.';
revoke all on function etl._bucket_bounds() from public;
grant execute on function etl._bucket_bounds() to etl_reader;

-- width_bucket counts a bound itself to the bucket above it.
create or replace function etl._bucket(seconds float8) returns int
language sql immutable
return width_bucket(seconds, etl._bucket_bounds()) - (seconds = any (etl._bucket_bounds()))::int;
comment on function etl._bucket(float8) is 'Which bucket a duration is counted in, from 0.';
revoke all on function etl._bucket(float8) from public;
grant execute on function etl._bucket(float8) to etl_reader;

-- What some runs add to the counters: of a run that goes on, that which has ended. Each step gives one duration, to the status
-- with which it ended; its rows, and since when it is complete, to succeeded; attempts that were tried again, to retrying.
create or replace function etl._observations(run_ids bigint[], upto int)
returns table (family text, subject_id int, mode text, status text, observed bigint, seconds float8, row_count bigint, run_id bigint,
               ended_at timestamptz, success_at timestamptz, complete_at timestamptz)
language plpgsql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off set enable_bitmapscan = off set jit = off as $$
declare
  v_run etl.runs;
begin
  -- One after the other, with its number as a value: only so does the view begin with the attempts of that run, not with all there are.
  for v_run in select * from etl.runs r where r.run_id = any (run_ids) loop
    return query
    with steps as materialized (
      select * from etl.step_outcomes s where s.run_id = v_run.run_id and s.order_index > v_run.counted_until and s.order_index <= upto
    )
    select 'step', o.procedure_id, o.mode, case when o.duration_ms is null then 'skipped' else o.status end, 1::bigint, (o.duration_ms / 1000)::float8,
           case when o.status = 'succeeded' then o.rows_affected else 0 end, o.run_id, o.ended_at,
           case when o.status = 'succeeded' then o.success_at end, case when o.status = 'succeeded' then o.complete_at end
      from steps o where o.ended_at is not null and o.skip_reason is distinct from 'reused'
    union all
    select 'step', o.procedure_id, o.mode, 'succeeded', 0, null, o.rows_affected, o.run_id, null, o.success_at, o.complete_at
      from steps o where o.status <> 'succeeded' and (o.rows_affected > 0 or o.success_at is not null)
    union all
    select 'step', o.procedure_id, o.mode, 'retrying', o.retry_count, null, 0, o.run_id, null, null, null
      from steps o where o.retry_count > 0
    union all
    select 'refresh', m.refresh_target_id, '', case when m.started_at is null then 'skipped' else m.status::text end, 1, (m.duration_ms / 1000)::float8, 0,
           m.run_id, m.ended_at, null, null
      from etl.mv_refreshes m
     where m.run_id = v_run.run_id and m.ended_at is not null and m.skip_reason is distinct from 'reused';
    if v_run.ended_at is not null then
      return query select 'run', v_run.pipeline_id, v_run.kind::text, v_run.status::text, 1::bigint, (v_run.duration_ms / 1000)::float8, 0::bigint,
                          v_run.run_id, v_run.ended_at, null::timestamptz, null::timestamptz;
    end if;
  end loop;
end $$;
comment on function etl._observations(bigint[], int) is 'What some runs add to the counters, up to a step, one row for each step, refresh and run that has ended and was not counted.';
revoke all on function etl._observations(bigint[], int) from public;

create or replace function etl._outcomes(run_ids bigint[], upto int default 2147483647)
returns table (family text, subject_id int, mode text, status text, observed_count bigint, seconds_sum float8, rows_sum bigint, buckets bigint[],
               last_observed_at timestamptz, last_run_id bigint, last_seconds float8, last_success_at timestamptz, complete_at timestamptz)
language sql stable set search_path = pg_catalog, pg_temp set jit = off as $$
  select q.family, q.subject_id, q.mode, q.status, sum(q.observed)::bigint, coalesce(sum(q.seconds), 0), sum(q.row_count)::bigint,
         array[count(*) filter (where q.bucket = 0), count(*) filter (where q.bucket = 1), count(*) filter (where q.bucket = 2),
               count(*) filter (where q.bucket = 3), count(*) filter (where q.bucket = 4), count(*) filter (where q.bucket = 5),
               count(*) filter (where q.bucket = 6), count(*) filter (where q.bucket = 7), count(*) filter (where q.bucket = 8),
               count(*) filter (where q.bucket = 9), count(*) filter (where q.bucket = 10), count(*) filter (where q.bucket = 11)],
         max(q.ended_at) filter (where q.observed > 0), (max(q.newest))[1]::bigint, (max(q.newest))[2], max(q.success_at), max(q.complete_at)
    from (select o.*, etl._bucket(o.seconds) as bucket, case when o.observed > 0 then array[o.run_id, o.seconds] end as newest
            from etl._observations(run_ids, upto) o) q
   group by q.family, q.subject_id, q.mode, q.status
$$;
comment on function etl._outcomes(bigint[], int) is 'What some runs add to the counters, up to a step, in the form of etl.metrics.';
revoke all on function etl._outcomes(bigint[], int) from public;

create or replace function etl._live_outcomes()
returns table (family text, subject_id int, mode text, status text, observed_count bigint, seconds_sum float8, rows_sum bigint, buckets bigint[],
               last_observed_at timestamptz, last_run_id bigint, last_seconds float8, last_success_at timestamptz, complete_at timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off as $$
  select o.* from (select array_agg(r.run_id) as run_ids from etl.runs r where r.status = 'running' and r.kind = 'run') a cross join lateral etl._outcomes(a.run_ids) o
   where a.run_ids is not null
$$;
comment on function etl._live_outcomes() is 'What has ended of the runs that go on, backfills apart, in the form of etl.metrics.';
revoke all on function etl._live_outcomes() from public;
grant execute on function etl._live_outcomes() to etl_reader;

-- The slot is this transaction's alone until it ends. With more transactions at once than there are slots, one waits.
create or replace function etl._count_runs(run_ids bigint[], upto int default 2147483647) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set jit = off as $$
declare
  v_slot int := 0;
begin
  while v_slot < 31 and not pg_try_advisory_xact_lock(6435447, v_slot) loop v_slot := v_slot + 1; end loop;
  if v_slot = 31 then perform pg_advisory_xact_lock(6435447, v_slot); end if;
  insert into etl.metrics as m (family, subject_id, mode, status, slot, observed_count, seconds_sum, rows_sum, buckets, last_observed_at, last_run_id,
    last_seconds, last_success_at, complete_at)
  select o.family, o.subject_id, o.mode, o.status, v_slot, o.observed_count, o.seconds_sum, o.rows_sum, o.buckets, o.last_observed_at, o.last_run_id,
         o.last_seconds, o.last_success_at, o.complete_at
    from etl._outcomes(run_ids, upto) o
  on conflict on constraint metrics_pkey do update
    set observed_count = m.observed_count + excluded.observed_count, seconds_sum = m.seconds_sum + excluded.seconds_sum,
        rows_sum = m.rows_sum + excluded.rows_sum, buckets = array[
          m.buckets[1] + excluded.buckets[1], m.buckets[2] + excluded.buckets[2], m.buckets[3] + excluded.buckets[3], m.buckets[4] + excluded.buckets[4],
          m.buckets[5] + excluded.buckets[5], m.buckets[6] + excluded.buckets[6], m.buckets[7] + excluded.buckets[7], m.buckets[8] + excluded.buckets[8],
          m.buckets[9] + excluded.buckets[9], m.buckets[10] + excluded.buckets[10], m.buckets[11] + excluded.buckets[11], m.buckets[12] + excluded.buckets[12]],
        last_observed_at = greatest(m.last_observed_at, excluded.last_observed_at),
        last_run_id = coalesce(excluded.last_run_id, m.last_run_id), last_seconds = coalesce(excluded.last_seconds, m.last_seconds),
        last_success_at = greatest(m.last_success_at, excluded.last_success_at), complete_at = greatest(m.complete_at, excluded.complete_at);
end $$;
comment on function etl._count_runs(bigint[], int) is 'Adds runs that have ended, or a part of one, to the counters; each must be counted once.';
revoke all on function etl._count_runs(bigint[], int) from public;

-- Chunks are executed one after the other, so all up to the one that has just ended have ended.
create or replace function etl._count_chunks(run etl.runs, upto int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._count_runs(array[run.run_id], upto);
  update etl.runs r set counted_until = upto where r.run_id = run.run_id;
end $$;
comment on function etl._count_chunks(etl.runs, int) is 'Adds the chunks of a backfill that goes on to the counters, up to one that has ended.';
revoke all on function etl._count_chunks(etl.runs, int) from public;

-- A run ends once: from then on it cannot be changed (engine/_protect_history.sql).
create or replace function etl._count_ended_run() returns trigger
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._count_runs(array[new.run_id]), etl._make_log_partition(clock_timestamp() + interval '1 month', false);
  return null;
end $$;
comment on function etl._count_ended_run() is 'Trigger: counts a run in the transaction that ends it, and sees to it that next month has a partition for log lines.';
revoke all on function etl._count_ended_run() from public;

create or replace trigger an_ended_run_is_counted after update on etl.runs
  for each row when (old.ended_at is null and new.ended_at is not null) execute function etl._count_ended_run();

-- After an upgrade from a release that did not count: what its history holds, a thousand runs at a time.
create or replace function etl._count_history() returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_runs bigint[];
begin
  if exists (select from etl.metrics) then return; end if;
  for v_runs in
    select array_agg(q.run_id) from (select r.run_id, row_number() over (order by r.run_id) as n from etl.runs r where r.ended_at is not null) q
     group by (q.n - 1) / 1000 order by min(q.run_id)
  loop
    perform etl._count_runs(v_runs);
  end loop;
end $$;
comment on function etl._count_history() is 'Counts all runs that have ended when none was counted yet. Called by each install.';
revoke all on function etl._count_history() from public;

-- Counters of runs that have ended and of what has ended of those that go on; label sets that have not occurred are there as zero,
-- so that a first failure is an increase. Procedures of one name in two pipelines are one: the labels have no pipeline.
-- Hashed and never sorted: comparing names by the rules of a language costs more than everything else.
create or replace function etl._counted_outcomes()
returns table (family text, subject text, mode text, status text, observed_count bigint, seconds_sum float8, rows_sum bigint, buckets bigint[],
               created_at timestamptz, last_observed_at timestamptz, last_run_id bigint, last_seconds float8)
language sql stable security definer set search_path = pg_catalog, pg_temp set enable_sort = off set enable_mergejoin = off set jit = off as $$
  with counted as (
    select m.family, m.subject_id, m.mode, m.status, m.observed_count, m.seconds_sum, m.rows_sum, m.buckets, m.created_at, m.last_observed_at,
           m.last_run_id, m.last_seconds
      from etl.metrics m
    union all
    select o.family, o.subject_id, o.mode, o.status, o.observed_count, o.seconds_sum, o.rows_sum, o.buckets, null, o.last_observed_at,
           o.last_run_id, o.last_seconds
      from etl._live_outcomes() o
  ), subject as (
    select 'step' as family, p.procedure_id as subject_id, p.name, s.status, m.mode
      from etl.procedures p
      cross join lateral unnest(array['incremental', case when p.allow_full_refresh or p.default_mode = 'full' then 'full' end]) m(mode)
      cross join unnest('{succeeded,failed}'::text[]) s(status)
     where p.is_active and m.mode is not null
    union all
    select 'refresh', t.refresh_target_id, t.name, s.status, ''
      from etl.refresh_targets t cross join unnest('{succeeded,failed}'::text[]) s(status)
     where exists (select from etl.procedure_refresh_targets x join etl.procedures p using (procedure_id) where x.refresh_target_id = t.refresh_target_id and p.is_active)
    union all
    select 'run', l.pipeline_id, l.name, s.status, 'run'
      from etl.pipelines l cross join unnest('{succeeded,completed_with_warnings,failed,cancelled,abandoned}'::text[]) s(status)
  )
  select q.family, q.name, q.mode, q.status, sum(q.observed_count)::bigint, sum(q.seconds_sum), sum(q.rows_sum)::bigint,
         array[sum(q.buckets[1]), sum(q.buckets[2]), sum(q.buckets[3]), sum(q.buckets[4]), sum(q.buckets[5]), sum(q.buckets[6]), sum(q.buckets[7]),
               sum(q.buckets[8]), sum(q.buckets[9]), sum(q.buckets[10]), sum(q.buckets[11]), sum(q.buckets[12])]::bigint[],
         min(q.created_at), max(q.last_observed_at), (max(q.newest))[1]::bigint, (max(q.newest))[2]
    from (select c.family, n.name, c.mode, c.status, c.observed_count, c.seconds_sum, c.rows_sum, c.buckets, c.created_at, c.last_observed_at,
                 case when c.last_run_id is not null then array[c.last_run_id, c.last_seconds] end as newest
            from counted c join (select distinct u.family, u.subject_id, u.name from subject u) n using (family, subject_id)
          union all
          select u.family, u.name, u.mode, u.status, 0, 0, 0, array_fill(0::bigint, array[12]), null, null, null from subject u) q
   group by q.family, q.name, q.mode, q.status
$$;
comment on function etl._counted_outcomes() is 'The rows of etl.metrics_outcomes.';
revoke all on function etl._counted_outcomes() from public;
grant execute on function etl._counted_outcomes() to etl_reader;
