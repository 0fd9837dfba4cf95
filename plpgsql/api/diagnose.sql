-- What the database can know by itself about the health of its installation: one row per finding, or one that all is well.
-- A helper per subject, each with the columns of etl.diagnose.

create or replace function etl._diagnose_session() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select 'server', case when current_setting('server_version_num')::int >= 150000 then 'ok' else 'fail' end,
         'PostgreSQL ' || current_setting('server_version'), 'b2s needs PostgreSQL 15 or newer'
  union all
  select 'role', case when pg_has_role(etl._requesting_role(), 'etl_operator', 'usage') then 'ok' else 'warn' end,
         format('%s %s', etl._requesting_role(), coalesce('is a member of ' || (
           select string_agg(r, ', ') from unnest(array['etl_owner', 'etl_admin', 'etl_operator', 'etl_reader']) r where pg_has_role(etl._requesting_role(), r, 'usage')),
           'is a member of no role of b2s')),
         format('to run procedures: grant etl_operator to %I', etl._requesting_role())
  union all
  select s.name, case when s.is_harmless or s.value = '0' then 'ok' else 'warn' end,
         case when s.value = '0' then 'off' when s.is_harmless then s.value || ': a run is never idle in a transaction'
              else s.value || ' in this session: it ends a whole run, whatever its steps may take' end,
         format('for the role that runs: alter role %I set %s = 0', etl._requesting_role(), s.name)
    from (values ('statement_timeout', current_setting('statement_timeout'), false),
                 ('idle_in_transaction_session_timeout', current_setting('idle_in_transaction_session_timeout'), true)) s(name, value, is_harmless)
  union all
  select 'track_counts', case when current_setting('track_counts')::boolean then 'ok' else 'fail' end, current_setting('track_counts'),
         'rows per table cannot be counted without it: alter system set track_counts = on; select pg_reload_conf()'
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
   where p.is_active and x.concurrency <> 'false' and not etl._can_refresh_concurrently(etl._relation(t.name))
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
    join etl._config_drift() d on d.pipeline = l.name
  union all
  select 'full refresh', 'warn', format('frozen since %s by %s: %s', to_char(f.changed_at, 'YYYY-MM-DD HH24:MI'), f.changed_by, f.reason),
         'an admin lifts it: select etl.freeze_full_refresh(false, reason => ''...'')'
    from (select * from etl.full_refresh_freezes order by freeze_id desc limit 1) f where f.is_frozen
  union all
  select 'run', 'fail', format('run %s of %s is dead: its session (backend %s) is gone', h.run_id, h.pipeline, h.worker_pid),
         'b2s reap records it as abandoned, and so does the next run of the pipeline'
    from etl.run_history h where h.is_dead
  union all
  select 'run lock', 'fail', format('backend %s holds the lock under which runs of %s begin, and does nothing', k.pid, l.name),
         format('end that session: select pg_terminate_backend(%s)', k.pid)
    from pg_catalog.pg_locks k
    join etl.pipelines l on l.pipeline_id::oid = k.objid
   where k.locktype = 'advisory' and k.classid = 6435443 and k.objsubid = 2 and k.granted
     and k.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
     and not exists (select from pg_catalog.pg_locks t where t.pid = k.pid and t.locktype = 'virtualxid')
$$;
comment on function etl._diagnose_pipelines() is 'Findings about pipelines: configuration, freeze, dead runs, a lock that somebody sits on.';
revoke all on function etl._diagnose_pipelines() from public;

create or replace function etl._has_leading_index(relation oid, column_name text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  with tables as (
    select relation as oid, true as is_whole union all
    select t.relid, false from pg_partition_tree(relation) t where t.isleaf and t.relid <> relation
  ), served as (
    select t.is_whole, exists (
             select from pg_catalog.pg_index i join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
              where i.indrelid = t.oid and i.indisvalid and i.indpred is null and a.attname = column_name) as is_served
      from tables t
  )
  select coalesce(bool_or(s.is_served) filter (where s.is_whole), false) or coalesce(bool_and(s.is_served) filter (where not s.is_whole), false) from served s
$$;
comment on function etl._has_leading_index(oid, text) is 'Whether an index leads with a column, of a table or of all partitions it has.';
revoke all on function etl._has_leading_index(oid, text) from public;

-- What a strategy relies on, column by column.
create or replace function etl._diagnose_watermarks() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with watched as materialized (
    select p.name, p.watermark_strategy as strategy, c.*, format('%s: %s', p.name, c.source) as subject
      from etl.procedures p cross join lateral etl._watermark_columns(p) c
     where p.is_active
  )
  select 'upgrade', 'hint', format('%s reads by %s: %s', p.name, p.watermark_strategy,
           case p.watermark_strategy when 'timestamp' then 'its windows end where the oldest open transaction began'
                                     else 'its windows wait for whoever writes to the table, and updates are not seen' end), u.hint
    from etl.procedures p cross join lateral (select etl._upgrade_hint(p) as hint) u
   where p.is_active and u.hint is not null
  union all
  select 'watermark', 'warn', format('%s: %s is %s', w.name, w.table_name, case w.relkind
           when 'v' then 'a view: whoever writes to any table counts as its writer'
           when 'm' then 'a materialized view: rows appear with its refresh, however old their values are'
           else 'a foreign table: transactions that are open on its server are not seen' end),
         'name the column of the table that the rows are first written to; or set a delay that covers it'
    from watched w where w.relkind in ('v', 'm', 'f')
  union all
  select 'watermark', 'warn', format('%s is a timestamp without time zone: it means another moment in each session''s TimeZone', w.subject),
         format('alter table %s alter column %I type timestamptz (rewrites the table); or let everybody use one TimeZone', w.table_name, w.column_name)
    from watched w where w.type = 'timestamp without time zone'
  union all
  select 'watermark', 'warn', format('%s leads no index: each run reads the whole table', w.subject),
         case when w.column_name = 'etl_xid' then format('b2s watermark add-column %s', w.table_name)
              when w.relkind = 'p' then format('create index on %s (%I), at a time when writers may wait', w.table_name, w.column_name)
              else format('create index concurrently on %s (%I)', w.table_name, w.column_name) end
    from watched w where w.relkind in ('r', 'p', 'm') and not etl._has_leading_index(w.relation, w.column_name)
  union all
  select 'watermark', 'warn', format('%s may be null, and a row where it is would never be read', w.subject),
         format('alter table %s alter column %I set not null', w.table_name, w.column_name)
    from watched w where w.is_nullable and w.relkind in ('r', 'p')
$$;
comment on function etl._diagnose_watermarks() is 'Findings about the columns by which new rows are told.';
revoke all on function etl._diagnose_watermarks() from public;

-- The column of the xid strategy is only as good as what fills it.
create or replace function etl._diagnose_xid_columns() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with stamped as (
    select distinct w.source, w.table_name, w.column_name, m.oid as relation
      from etl.procedures p
      cross join lateral etl._watermark_columns(p) w
      cross join lateral unnest(etl._source_tables(array[w.source])) m(oid)
     where p.is_active and p.watermark_strategy = 'xid'
  ), found as materialized (
    select s.*, pg_stat_get_tuples_updated(s.relation) as updates,
           (select pg_get_expr(d.adbin, d.adrelid) from pg_catalog.pg_attribute a
              join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
             where a.attrelid = s.relation and a.attname = s.column_name) as default_sql,
           exists (select from pg_catalog.pg_subscription_rel r where r.srrelid = s.relation) as is_subscribed,
           -- A column of another name has a trigger function of its own, which cannot be told from others.
           (select max(case g.tgenabled when 'A' then 2 when 'O' then 1 else 0 end) from pg_catalog.pg_trigger g
             where g.tgrelid = s.relation and g.tgtype & 19 = 19 and (g.tgfoid = 'etl.touch_xid()'::regprocedure or s.column_name <> 'etl_xid')) as trigger_level
      from stamped s
  ), remedied as (
    select f.*, case when f.column_name = 'etl_xid' then format('b2s watermark add-column %s', f.table_name)
                     else 'give it what b2s watermark add-column --dry-run prints for etl_xid' end as remedy
      from found f
  )
  select 'watermark', 'warn', format('rows of %s are updated, but no trigger sets %s: updates are not seen', r.relation::regclass, r.column_name), r.remedy
    from remedied r where r.updates > 0 and coalesce(r.trigger_level, 0) = 0
  union all
  select 'watermark', 'warn', format('the trigger of %s that sets %s is not enabled always: rows that arrive by replication keep the value they bring',
           r.relation::regclass, r.column_name), r.remedy
    from remedied r where r.is_subscribed and r.trigger_level = 1
  union all
  select 'watermark', 'warn', format('%s of %s has no default pg_current_xact_id()', r.column_name, r.relation::regclass), r.remedy
    from remedied r where coalesce(r.default_sql not like '%pg_current_xact_id()%', true)
  union all
  select 'watermark', 'fail', format('the watermark of %s counts the transactions of another cluster: its windows are refused', s.state_key),
         format('b2s watermark rebase %s --reason ''...''', s.state_key)
    from etl.state s cross join pg_control_system() c
   where s.strategy = 'xid' and s.last_success_watermark is not null and exists (select from etl.procedures p where p.state_key = s.state_key and p.is_active)
     and (s.server_id <> c.system_identifier or pg_snapshot_xmax(s.last_success_watermark::pg_snapshot) > pg_snapshot_xmax(pg_current_snapshot()))
$$;
comment on function etl._diagnose_xid_columns() is 'Findings about the xid strategy: default and trigger of its columns, replication, watermarks of another cluster.';
revoke all on function etl._diagnose_xid_columns() from public;

-- What timestamps and ids wait for. xid waits for nobody.
create or replace function etl._diagnose_horizons(older_than interval default '1 minute')
returns table (check_name text, status text, detail text, remedy text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with waiting as materialized (
    select bool_or(p.watermark_strategy = 'timestamp') as by_timestamp, bool_or(p.watermark_strategy = 'id') as by_id
      from etl.procedures p where p.is_active
  ), writer as materialized (
    select w.pid from etl.procedures p cross join lateral etl._writers(etl._source_tables(p.watermark_sources)) w
     where p.is_active and p.watermark_strategy = 'id'
  )
  select 'pg_read_all_stats', 'fail', 'etl_engine cannot see when others began their transactions, so windows of timestamps are refused while there are any',
         'grant pg_read_all_stats to etl_engine'
    from waiting where by_timestamp and not pg_has_role('etl_engine', 'pg_read_all_stats', 'usage')
  union all
  select 'track_activities', 'warn', format('off %s: its transactions do not show when they began, and windows of timestamps are refused meanwhile', t.place), t.remedy
    from waiting cross join lateral (
      select 'in this session' as place, 'alter system set track_activities = on; select pg_reload_conf()' as remedy
       where not current_setting('track_activities')::boolean
      union all
      select concat_ws(' ', case when s.setrole <> 0 then 'for role ' || s.setrole::regrole end, 'in database ' || d.datname),
             format('alter %s reset track_activities', case
               when s.setrole = 0 then 'database ' || quote_ident(d.datname)
               else 'role ' || s.setrole::regrole || coalesce(' in database ' || quote_ident(d.datname), '') end)
        from pg_catalog.pg_db_role_setting s left join pg_catalog.pg_database d on d.oid = s.setdatabase
       where (s.setdatabase = 0 or d.datname = current_database()) and exists (
               select from unnest(s.setconfig) c where c ~ '^track_activities=(off|false|no|0)$')
    ) t where by_timestamp
  union all
  select 'horizon', 'warn', format('%s holds back the windows of %s', etl._describe_holder(a.pid), case when by_timestamp then 'timestamps' else 'ids' end),
         format('look at it: select * from pg_stat_activity where pid = %1$s; end it: select pg_terminate_backend(%1$s)', a.pid)
    from waiting cross join pg_stat_get_activity(null) a
   where a.datid = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()) and a.pid <> pg_backend_pid()
     and a.usesysid is not null and a.leader_pid is null and a.backend_type not in ('autovacuum worker', 'walsender') and a.xact_start < clock_timestamp() - older_than
     and (by_timestamp or by_id and a.pid in (select w.pid from writer w))
  union all
  select 'horizon', 'warn', format('transaction %s was prepared by %s at %s and holds back the windows of the tables it wrote to', x.gid, x.owner,
           to_char(x.prepared, 'YYYY-MM-DD HH24:MI:SS')), format('commit prepared %1$L, or rollback prepared %1$L', x.gid)
    from waiting cross join pg_catalog.pg_prepared_xacts x
   where x.database = current_database() and x.prepared < clock_timestamp() - older_than and (by_timestamp or by_id)
$$;
comment on function etl._diagnose_horizons(interval) is 'Findings about what holds windows of timestamps and ids back, or hides it.';
revoke all on function etl._diagnose_horizons(interval) from public;

-- Two writers may be meant, a log that all append to: no more than a hint.
create or replace function etl._diagnose_lineage() returns table (check_name text, status text, detail text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select distinct 'lineage', case f.severity when 'error' then 'warn' else 'hint' end, f.detail, f.remedy
    from etl._lineage_findings() f where f.severity in ('error', 'warning')
$$;
comment on function etl._diagnose_lineage() is 'Findings about reads and writes that are not as declared.';
revoke all on function etl._diagnose_lineage() from public;

create or replace function etl.diagnose() returns table (check_name text, status text, detail text, remedy text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  with found as materialized (
    select 1 as part, f.* from etl._diagnose_session() f
    union all
    select 1, f.* from etl._diagnose_engine() f
    union all
    select 2, f.* from etl._diagnose_pipelines() f
    union all
    select 3, f.* from etl._diagnose_procedures() f
    union all
    select 4, f.* from etl._diagnose_watermarks() f
    union all
    select 4, f.* from etl._diagnose_xid_columns() f
    union all
    select 4, f.* from etl._diagnose_horizons() f
    union all
    select 5, f.* from etl._diagnose_pg_cron() f
    union all
    select 5, f.* from etl._diagnose_clock() f
    union all
    select 5, f.* from etl._diagnose_lineage() f
  ), sound(part, check_name, detail) as (
    values (1, 'engine', 'as it was installed'), (2, 'run', 'no run is dead'), (2, 'run lock', 'held by living runs only'), (2, 'full refresh', 'not frozen'),
           (3, 'routine', 'all configured routines exist and fit'), (3, 'source', 'etl_owner may read every watermark column'),
           (3, 'materialized view', 'all can be refreshed while they are read'),
           (4, 'watermark', 'every source is as its strategy needs it'), (4, 'horizon', 'nobody holds a window back'),
           (5, 'schedule', 'none is late'), (5, 'queue', 'nothing waits for a worker'), (5, 'retention', 'nothing is kept that is no longer to be'),
           (5, 'lineage', 'nothing was seen to be read or written that is not declared')
  )
  select f.check_name, f.status, f.detail, case when f.status <> 'ok' then f.remedy end
    from (select * from found
          union all
          select s.part, s.check_name, 'ok', s.detail, null from sound s
           where not exists (select from found f where f.check_name = s.check_name)) f
   order by f.part, f.check_name, f.status, f.detail
$$;
comment on function etl.diagnose() is
  'What the database knows about the health of its installation: status ok, hint, warn or fail, and for all but the first a remedy. Changes nothing.';
revoke all on function etl.diagnose() from public;
grant execute on function etl.diagnose() to etl_reader;
