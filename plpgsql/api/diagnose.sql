-- What the database can know by itself about the health of its installation: one row per finding, or one that all is well.
-- A helper per subject, each with the columns of etl.diagnose.

create or replace function etl._diagnose_session() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'server', case when current_setting('server_version_num')::int >= 150000 then 'ok' else 'fail' end,
         'PostgreSQL ' || current_setting('server_version'), 'b2s needs PostgreSQL 15 or newer'
  union all
  select 'role', case when pg_has_role(etl._requester(), 'etl_operator', 'usage') then 'ok' else 'warn' end,
         format('%s %s', etl._requester(), coalesce('is a member of ' || (
           select string_agg(r, ', ') from unnest(array['etl_owner', 'etl_admin', 'etl_operator', 'etl_reader']) r where pg_has_role(etl._requester(), r, 'usage')),
           'is a member of no role of b2s')),
         format('to run procedures: grant etl_operator to %I', etl._requester())
  union all
  select s.name, case when s.is_harmless or s.value = '0' then 'ok' else 'warn' end,
         case when s.value = '0' then 'off' when s.is_harmless then s.value || ': a run is never idle in a transaction'
              else s.value || ' in this session: it ends a whole run, whatever its steps may take' end,
         format('for the role that runs: alter role %I set %s = 0', etl._requester(), s.name)
    from (values ('statement_timeout', current_setting('statement_timeout'), false),
                 ('idle_in_transaction_session_timeout', current_setting('idle_in_transaction_session_timeout'), true)) s(name, value, is_harmless)
  union all
  select 'track_counts', case when current_setting('track_counts')::boolean then 'ok' else 'fail' end, current_setting('track_counts'),
         'rows per table cannot be counted without it: alter system set track_counts = on; select pg_reload_conf()'
  union all
  select 'pg_cron', 'ok', coalesce('version ' || (select e.extversion from pg_catalog.pg_extension e where e.extname = 'pg_cron'), 'not installed; only schedules need it'), null
$$;
comment on function etl._diagnose_session() is 'Findings about the server, the role and the settings of this session.';
revoke all on function etl._diagnose_session() from public;

-- A configured routine is compiled again, as if it were configured now.
create or replace function etl._diagnose_procedures() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with compiled as materialized (
    select p.name, p.call_sql, p.rows_column, c.call_sql as now_sql, c.rows_column as now_rows_column, c.problems, d.definition
      from etl.procedures p
      cross join lateral (select etl._catalog_procedure(p) as definition) d
      cross join lateral etl._compile_call(d.definition) c
     where p.is_active
  )
  select 'routine', 'fail', format('%s: %s', c.name, x->>'message'), x->>'hint'
    from compiled c cross join lateral jsonb_array_elements(c.problems) x
  union all
  select 'routine', 'fail', format('%s: the routine has changed since it was configured', c.name), 'b2s sync-config shows the change and applies it'
    from compiled c where c.problems = '[]' and (c.now_sql, c.now_rows_column) is distinct from (c.call_sql, c.rows_column)
  union all
  select 'source', 'fail', format('%s: %s', c.name, x->>'message'), x->>'hint'
    from compiled c cross join lateral jsonb_array_elements(etl._watermark_problems(c.definition)) x
  union all
  select 'materialized view', 'fail', format('%s: %s', c.name, x->>'message'), x->>'hint'
    from compiled c cross join lateral jsonb_array_elements(etl._refresh_problems(c.definition)) x
  union all
  select distinct 'materialized view', 'warn', format('%s cannot be refreshed concurrently: readers wait', t.name),
         'populate it once (refresh materialized view ...) and create a unique index on plain columns of all its rows'
    from etl.procedure_refresh_targets x
    join etl.refresh_targets t using (refresh_target_id)
    join etl.procedures p using (procedure_id)
   where p.is_active and x.concurrency <> 'false' and not etl._can_refresh_concurrently(to_regclass(t.name))
$$;
comment on function etl._diagnose_procedures() is 'Findings about the routines, sources and materialized views that are configured.';
revoke all on function etl._diagnose_procedures() from public;

create or replace function etl._diagnose_pipelines() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'pipeline', 'warn', 'no pipeline is configured', 'write transformations.yaml, then: b2s sync-config'
   where not exists (select from etl.procedures p where p.is_active)
  union all
  select 'pipeline', case when d.is_drifted then 'warn' else 'ok' end,
         format('%s, version %s of %s%s', l.name, v.version, to_char(v.applied_at, 'YYYY-MM-DD HH24:MI'),
                case when d.is_drifted then ', but the catalog was changed since by other means' else '' end),
         'b2s sync-config shows the drift and applies the file'
    from etl.pipelines l
    join lateral (select * from etl.config_versions c where c.pipeline_id = l.pipeline_id order by c.version desc limit 1) v on true
    cross join lateral (select v.config is distinct from etl._catalog_config(l.name) as is_drifted) d
  union all
  select 'full refresh', 'warn', format('frozen since %s by %s: %s', to_char(f.changed_at, 'YYYY-MM-DD HH24:MI'), f.changed_by, f.reason),
         'an admin lifts it: select etl.freeze_full_refresh(false, reason => ''...'')'
    from (select * from etl.full_refresh_freezes order by freeze_id desc limit 1) f where f.is_frozen
  union all
  select 'run', 'fail', format('run %s of %s is dead: its session (backend %s) is gone', h.run_id, h.pipeline, h.worker_pid),
         'the next run of the pipeline records it as abandoned: b2s run'
    from etl.run_history h where h.is_dead
  union all
  select 'run lock', 'fail', format('backend %s holds the run lock of %s but executes nothing', k.pid, l.name),
         format('its CALL failed in COMMIT; end that session: select pg_terminate_backend(%s)', k.pid)
    from pg_catalog.pg_locks k
    join etl.pipelines l on l.pipeline_id::oid = k.objid
   where k.locktype = 'advisory' and k.classid = 6435443 and k.objsubid = 2 and k.granted
     and k.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
     and not exists (select from pg_catalog.pg_locks t where t.pid = k.pid and t.locktype = 'virtualxid')
$$;
comment on function etl._diagnose_pipelines() is 'Findings about pipelines: configuration, freeze, dead runs, run locks nobody uses.';
revoke all on function etl._diagnose_pipelines() from public;

create or replace function etl.diagnose() returns table (check_name text, status text, detail text, remedy text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with found as materialized (
    select 1 as part, f.* from etl._diagnose_session() f
    union all
    select 2, f.* from etl._diagnose_pipelines() f
    union all
    select 3, f.* from etl._diagnose_procedures() f
  ), sound(part, check_name, detail) as (
    values (2, 'run', 'no run is dead'), (2, 'run lock', 'held by living runs only'), (2, 'full refresh', 'not frozen'),
           (3, 'routine', 'all configured routines exist and fit'), (3, 'source', 'etl_owner may read every watermark column'),
           (3, 'materialized view', 'all can be refreshed while they are read')
  )
  select f.check_name, f.status, f.detail, case when f.status <> 'ok' then f.remedy end
    from (select * from found
          union all
          select s.part, s.check_name, 'ok', s.detail, null from sound s
           where not exists (select from found f where f.check_name = s.check_name)) f
   order by f.part, f.check_name, f.status, f.detail
$$;
comment on function etl.diagnose() is
  'What the database knows about the health of its installation: status ok, warn or fail, and for the last two a remedy. Changes nothing.';
revoke all on function etl.diagnose() from public;
grant execute on function etl.diagnose() to etl_reader;
