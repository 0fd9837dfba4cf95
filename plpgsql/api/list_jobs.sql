-- The jobs that pg_cron should have for this database: data, so that pg_cron may live in another one. b2s sync-config compares
-- them with cron.job; without Python they are scheduled from here by hand (docs/clock.md).
--
-- One job asks what is due, whatever the schedules are: each schedule has a time zone of its own, and pg_cron one for all.
-- Each command is a single statement: anything else would run in one transaction, in which no run can commit.
create or replace function etl._pipeline_needs(config jsonb default null)
returns table (pipeline text, has_jobs boolean, workers int, seconds int, has_schedules boolean, has_timeouts boolean, has_ticks boolean)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select c.config->>'pipeline', coalesce(c.config#>>'{settings,clock,executor}', 'auto') <> 'worker',
         coalesce((c.config#>>'{settings,clock,workers}')::int, 1),
         (select min(etl._cron_seconds(s.value->>'cron')) from jsonb_each(c.config->'schedules') s), c.config->'schedules' <> '{}',
         jsonb_path_exists(c.config, '$.procedures.*.timeout_ms'), jsonb_path_exists(c.config, '$.procedures.*.watermark.strategy ? (@ != "timestamp")')
    from (select etl._catalog_config(l.name) as config from etl.pipelines l where l.name is distinct from _pipeline_needs.config->>'pipeline'
          union all
          select etl._normalise_config(_pipeline_needs.config) where _pipeline_needs.config is not null) c
   where c.config->'procedures' <> '{}'
$$;
comment on function etl._pipeline_needs(jsonb) is 'What each pipeline needs of a clock, as configured, or as it would be with a configuration that is not applied yet.';
revoke all on function etl._pipeline_needs(jsonb) from public;

create or replace function etl.list_jobs(config jsonb default null, has_seconds boolean default false)
returns table (jobname text, schedule text, command text, database text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with needs as materialized (
    select n.*, case when has_seconds and n.seconds is not null then format('%s seconds', n.seconds) else '* * * * *' end as tick from etl._pipeline_needs(config) n where n.has_jobs
  ), jobs(name, schedule, command) as (
    select 'clock', case when has_seconds and min(n.seconds) is not null then format('%s seconds', min(n.seconds)) else '* * * * *' end,
           'select * from etl.fire_schedules()' from needs n having bool_or(n.has_schedules)
    union all
    select format('worker %s %s', n.pipeline, w), n.tick, format('call etl.run_due(pipeline => %L)', n.pipeline)
      from needs n cross join generate_series(1, n.workers) w
    union all select 'reaper', '* * * * *', 'select etl.reap()' from needs having count(*) > 0
    union all select 'watchdog', case when has_seconds then '10 seconds' else '* * * * *' end, 'select etl.watchdog()' from needs n having bool_or(n.has_timeouts)
    union all select 'ticks', '* * * * *', 'select etl.tick_watermarks()' from needs n having bool_or(n.has_ticks)
    union all select 'purge', '17 3 * * *', 'call etl.purge()' from needs having count(*) > 0
    union all select 'details', '23 3 * * *', 'delete from cron.job_run_details where end_time < now() - interval ''14 days''' from needs
      having count(*) > 0 and exists (select from pg_catalog.pg_extension e where e.extname = 'pg_cron')
  )
  select case when octet_length(n.full_name) <= 63 then n.full_name else format('b2s %s %s', left(j.name, 10), left(md5(n.full_name), 8)) end,
         j.schedule, j.command, current_database()
    from jobs j cross join lateral (select format('b2s %s %s', current_database(), j.name) as full_name) n
   order by j.name
$$;
comment on function etl.list_jobs(jsonb, boolean) is
  'The pg_cron jobs of this database: clock, workers, reaper, watchdog, ticks and purge, as far as the pipelines need them and their clock.executor is not worker; '
  'and details, which keeps short what pg_cron notes of them, where it lives here. '
  'config: as if that configuration were applied. has_seconds: pg_cron is 1.5 or newer and may fire every few seconds.';
revoke all on function etl.list_jobs(jsonb, boolean) from public;
grant execute on function etl.list_jobs(jsonb, boolean) to etl_reader;
