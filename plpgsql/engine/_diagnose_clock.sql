-- The clock is judged by what it has left behind, whoever it is; the jobs of pg_cron are looked at by b2s doctor, as they are
-- shown to their owner only.
create or replace function etl._diagnose_clock() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with beat as (
    select (select h from etl.heartbeats h where h.name = 'clock') as clock, (select h from etl.heartbeats h where h.name = 'purge') as purge,
           exists (select from etl.schedules s where s.is_active) as has_schedules,
           (select max(v.applied_at) from etl.config_versions v) > clock_timestamp() - interval '3 minutes' as is_new
  )
  select 'clock', case when (b.clock).beat_at > clock_timestamp() - interval '3 minutes' then 'ok' when (b.clock).beat_at is null and b.is_new then 'warn' else 'fail' end,
         case when (b.clock).beat_at is not null then format('last asked what is due %s ago, by %s (%s)', date_trunc('second', clock_timestamp() - (b.clock).beat_at),
                                                   (b.clock).session_user_name, (b.clock).application_name)
              when b.is_new then 'nothing has asked yet what is due'
              else 'there are schedules, and nothing has ever asked what is due' end,
         'b2s worker --schedule; or pg_cron: b2s sync-config makes its jobs, b2s doctor shows what is wrong with them'
    from beat b where b.has_schedules
  union all
  select 'schedule', 'fail', format('no successful run of %s for the slot of %s, nor since; %s', h.schedule, to_char(h.late_since, 'YYYY-MM-DD HH24:MI OF'), case
             when h.next_at <= h.late_since and s.definition->>'mode' = 'full' then 'no clock whose role is a member of etl_admin has noticed it'
             when h.next_at <= h.late_since then 'no clock has noticed it'
             when h.last_outcome = 'submitted' then format('run %s %s', h.last_run_id, case h.last_status when 'queued' then 'is still queued' when 'running' then 'is still running' else h.last_status end)
             else format('the last slot was %s: %s', h.last_outcome, h.last_reason) end),
         case when h.last_run_id is not null then format('b2s show %s', h.last_run_id) else format('b2s schedules %s', h.schedule) end
    from etl.schedule_health h join etl.pipelines l on l.name = h.pipeline join etl.schedules s on s.pipeline_id = l.pipeline_id and s.name = h.schedule
   where h.is_late
  union all
  select 'schedule', 'fail', format('%s, a full refresh, is due since %s and left for a clock that may start it: %s, who last asked what is due, may not',
                                    s.name, to_char(s.next_at, 'YYYY-MM-DD HH24:MI OF'), (b.clock).session_user_name),
         format('grant etl_admin to %I, or let a member of etl_admin be the clock', (b.clock).session_user_name)
    from beat b join etl.schedules s on s.is_active and s.definition->>'mode' = 'full' and s.next_at < clock_timestamp() - interval '3 minutes'
   where (b.clock).beat_at > s.next_at and not etl._is_admin((b.clock).session_user_name)
  union all
  select 'queue', 'warn', format('run %s of %s has waited since %s and no run is active', r.run_id, l.name, to_char(r.submitted_at, 'YYYY-MM-DD HH24:MI OF')),
         'b2s worker executes what is queued; or a worker job of pg_cron: b2s sync-config'
    from etl.runs r join etl.pipelines l using (pipeline_id)
   where r.status = 'queued' and r.submitted_at < clock_timestamp() - interval '5 minutes'
     and not exists (select from etl.runs a where a.pipeline_id = r.pipeline_id and a.status = 'running')
     and r.run_id = (select min(q.run_id) from etl.runs q where q.pipeline_id = r.pipeline_id and q.status = 'queued')
  union all
  select 'retention', 'warn', format('run %s of %s, which ended %s, is no longer to be kept, but history was %s', r.run_id, l.name, to_char(r.ended_at, 'YYYY-MM-DD'),
           coalesce('last purged ' || to_char((b.purge).beat_at, 'YYYY-MM-DD'), 'never purged')), 'call etl.purge(); once a day: a job of pg_cron, b2s worker --schedule'
    from beat b cross join etl.pipelines l
    cross join lateral (select * from etl.runs q where q.pipeline_id = l.pipeline_id order by q.run_id limit 1) r
   where r.ended_at < etl._kept_since('runs', l.pipeline_id) - interval '2 days' and coalesce((b.purge).beat_at, '-infinity') < clock_timestamp() - interval '2 days'
$$;
comment on function etl._diagnose_clock() is 'Findings about schedules: whether a clock is alive, what is late, what waits for a worker, whether history is purged.';
revoke all on function etl._diagnose_clock() from public;

-- Only who may read all settings sees those of pg_cron: superusers, and members of pg_read_all_settings.
create or replace function etl._diagnose_pg_cron() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with found as materialized (
    select (select e.extversion from pg_catalog.pg_extension e where e.extname = 'pg_cron') as version,
           (select a.datname from pg_stat_get_activity(null) x join pg_catalog.pg_database a on a.oid = x.datid where x.application_name = 'pg_cron scheduler' limit 1) as scheduler,
           (select count(*) from etl.list_jobs() j where j.command like 'call etl.run_due%') as workers,
           (select s.setting::int from pg_catalog.pg_settings s where s.name ~ '^cron\.max_running_jobs$') as max_running,
           (select s.setting from pg_catalog.pg_settings s where s.name ~ '^cron\.use_background_workers$') as uses_workers
  )
  select 'pg_cron', case when f.version is not null and f.scheduler is null then 'fail' else 'ok' end,
         concat_ws(', ', case when f.version is not null then 'version ' || f.version else 'not installed in this database; only schedules need it' end,
                         case when f.scheduler is not null then 'its scheduler runs in database ' || f.scheduler when f.version is not null then 'but its scheduler does not run' end),
         'shared_preload_libraries = ''pg_cron'' and cron.database_name = this database, then restart the server'
    from found f
  union all
  select 'pg_cron', 'fail', format('version %s with cron.use_background_workers = on: one long job holds up all others', f.version),
         'cron.use_background_workers = off and restart the server, or pg_cron 1.5 or newer'
    from found f where f.uses_workers = 'on' and string_to_array(split_part(f.version, '-', 1), '.')::int[] < '{1,5}'
  union all
  select 'pg_cron', 'warn', format('%s worker jobs, each of which lasts as long as a run, and cron.max_running_jobs = %s: the clock may have to wait for them', f.workers, f.max_running),
         format('cron.max_running_jobs = %s and restart the server, or fewer workers under clock in transformations.yaml', f.workers + 6)
    from found f where f.max_running < f.workers + 5 and f.scheduler is not null
$$;
comment on function etl._diagnose_pg_cron() is 'Findings about pg_cron: its version, whether its scheduler runs, its settings as far as they can be seen.';
revoke all on function etl._diagnose_pg_cron() from public;
