-- Everything about a configuration that only the database can know. Each problem names its place in the document.

create or replace function etl._routine_problems(routine oid, procedure jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with arguments as (
    select a.*, case when a.is_input then etl._binding(a.name, procedure) end as binding from etl._routine_arguments(routine) a
  ), found(loc, message, hint) as (
    select array['routine'], format('argument %s of %s is passed by nothing and has no default', coalesce(nullif(a.name, ''), '#' || a.ordinal), routine::regprocedure),
           case when a.name = '' then 'name the argument: b2s passes arguments by name'
                else format('declare it as a param, map it under args, or give it a default; b2s itself passes p_mode, p_since, p_until and p_run_id') end
      from arguments a where a.is_input and not a.is_output and a.binding is null and a.default_sql is null
    union all
    select array['params', p->>'name'], format('%s has no argument for param %s', routine::regprocedure, p->>'name'),
           format('name an argument %s or p_%s, or map it: args: {%s: argument_name}', p->>'name', p->>'name', p->>'name')
      from jsonb_array_elements(procedure->'params') p
     where not exists (select from arguments a where a.binding = p->>'name')
    union all
    select array['args', g.key], format('%s has no argument %s', routine::regprocedure, g.value), 'correct the name under args'
      from jsonb_each_text(procedure->'args') g
     where not exists (select from arguments a where a.name = g.value and (g.key <> 'rows' or a.is_output))
    union all
    select array['watermark'], format('%s declares no window (p_since or p_until), so the watermark would move over rows it never read', routine::regprocedure),
           'declare p_since and p_until and use them, or remove the watermark'
     where jsonb_typeof(procedure->'watermark') = 'object' and not exists (select from arguments a where a.binding in ('p_since', 'p_until'))
    union all
    select array['routine'], format('argument %s of %s is of type %s; the %s strategy passes %s', a.name, routine::regprocedure, a.type,
             procedure#>>'{watermark,strategy}', w.types[1]),
           format('declare it as one of: %s', array_to_string(w.types, ', '))
      from arguments a
      join (values ('timestamp', array['timestamp with time zone', 'text']),
                   ('id', array['bigint', 'numeric', 'text']), ('xid', array['pg_snapshot', 'text'])) w(strategy, types)
        on w.strategy = procedure#>>'{watermark,strategy}'
     where a.binding in ('p_since', 'p_until') and a.type <> all (w.types)
    union all
    select array['routine'], format('role etl_owner, as which steps run, may not execute %s', routine::regprocedure),
           format('grant usage on schema %I to etl_owner; grant execute on routine %s to etl_owner', n.nspname, routine::regprocedure)
      from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
     where p.oid = routine and not (has_schema_privilege('etl_owner', n.oid, 'usage') and has_function_privilege('etl_owner', p.oid, 'execute'))
  )
  select coalesce(jsonb_agg(etl._config_problem(jsonb_build_array('procedures', procedure->>'name') || to_jsonb(f.loc), f.message, f.hint)), '[]')
    from found f
$$;
comment on function etl._routine_problems(oid, jsonb) is 'What makes a routine unusable as it is configured.';
revoke all on function etl._routine_problems(oid, jsonb) from public;

create or replace function etl._refresh_problems(procedure jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(etl._config_problem(jsonb_build_array('procedures', procedure->>'name', 'mv_refresh', m.name), q.message, q.hint)), '[]')
    from (select t->>'name' as name, etl._relation(t->>'name') as oid from jsonb_array_elements(procedure->'mv_refresh') t) m
    left join pg_catalog.pg_class c on c.oid = m.oid
    cross join lateral (select
      case when c.oid is null then format('materialized view %s does not exist', m.name)
           when c.relkind <> 'm' then format('%s is not a materialized view', m.name)
           when not (pg_has_role('etl_owner', c.relowner, 'usage')
                     or case when current_setting('server_version_num')::int >= 170000 then has_table_privilege('etl_owner', c.oid, 'maintain') else false end)
             then format('role etl_owner, as which refreshes run, does not own %s', m.name) end as message,
      case when c.oid is null then 'create it before you run b2s sync-config, or correct the name (schema.name)'
           when c.relkind <> 'm' then 'name a materialized view'
           else format('alter materialized view %s owner to etl_owner', m.name) end as hint) q
   where q.message is not null
$$;
comment on function etl._refresh_problems(jsonb) is 'What is wrong with the refresh targets of a configured procedure.';
revoke all on function etl._refresh_problems(jsonb) from public;

-- Rows of a foreign table or of a materialized view come to be seen long after they got their number.
create or replace function etl._column_source_problems(watermark jsonb) returns table (message text, hint text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select q.message, q.hint
    from (select s as source, parse_ident(s) as parts, etl._relation(format('%I.%I', (parse_ident(s))[1], (parse_ident(s))[2])) as oid
            from jsonb_array_elements_text(watermark->'source') s) s
    left join pg_catalog.pg_class c on c.oid = s.oid
    left join pg_catalog.pg_attribute a on a.attrelid = s.oid and a.attname = s.parts[3] and a.attnum > 0 and not a.attisdropped
    join (values ('timestamp', array['timestamp with time zone', 'timestamp without time zone']), ('id', array['smallint', 'integer', 'bigint']),
                 ('xid', array['xid8'])) w(strategy, types) on w.strategy = watermark->>'strategy'
    cross join lateral (select
      case when s.oid is null then format('table %s.%s does not exist', s.parts[1], s.parts[2])
           when a.attname is null then format('table %s.%s has no column %s', s.parts[1], s.parts[2], s.parts[3])
           when format_type(a.atttypid, null) <> all (w.types)
             then format('%s is of type %s, the %s strategy needs %s', s.source, format_type(a.atttypid, null), w.strategy, array_to_string(w.types, ' or '))
           when not (has_column_privilege('etl_owner', a.attrelid, a.attnum, 'select')
                     and has_schema_privilege('etl_owner', (parse_ident(s.source))[1], 'usage')) then format('role etl_owner may not read %s', s.source)
           when c.relkind in ('f', 'm') and not (w.strategy = 'timestamp' and coalesce((watermark->>'delay_ms')::int, 0) > 0)
             then format('%s.%s is a %s: its rows come to be seen after they were written, which the %s strategy cannot know', s.parts[1], s.parts[2],
                         case c.relkind when 'f' then 'foreign table' else 'materialized view' end, w.strategy)
           when c.relkind = 'v' and w.strategy = 'id' then format('%s.%s is a view: who writes to it cannot be told, which the id strategy needs', s.parts[1], s.parts[2])
      end as message,
      case when s.oid is null or a.attname is null or format_type(a.atttypid, null) <> all (w.types) then 'source is schema.table.column of the rows the routine reads'
           when c.relkind in ('f', 'm') then 'read the tables behind it; or strategy: timestamp with a delay longer than its rows can be late'
           when c.relkind = 'v' then 'name the table behind it'
           else format('grant usage on schema %I to etl_owner; grant select on %I.%I to etl_owner', s.parts[1], s.parts[1], s.parts[2]) end as hint) q
   where q.message is not null
$$;
comment on function etl._column_source_problems(jsonb) is 'What is wrong with the columns that are the source of a watermark.';
revoke all on function etl._column_source_problems(jsonb) from public;

create or replace function etl._id_source_problems(sources text[]) returns table (message text, hint text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with feeding as (
    select s.source, q.* from unnest(sources) s(source)
     cross join lateral etl._feeding_sequences(etl._source_tables(array[s.source]), (parse_ident(s.source))[3]) q
  )
  select distinct format('sequence %s (cache %s, increment %s) does not make ids in the order in which they are inserted: rows would be missed',
           f.oid::regclass, f.cache, f.increment),
         format('alter sequence %s cache 1; or use the xid strategy', f.oid::regclass)
    from feeding f where f.cache > 1 or f.increment < 0
  union all
  select 'ids of several tables are one order only when one sequence makes all of them', 'a procedure per table; or strategy: xid or timestamp'
   where cardinality(sources) > 1
     and (select count(distinct f.oid) <> 1 or count(distinct f.source) < cardinality(sources) from feeding f)
$$;
comment on function etl._id_source_problems(text[]) is 'What makes the ids of these columns no watermark.';
revoke all on function etl._id_source_problems(text[]) from public;

-- The query is planned and typed, not executed. It is what somebody wrote, read with the rights of etl_owner, and an error tells what
-- it has read: so only who could configure it is told. First it is looked at alone, as what closes a parenthesis here would be a
-- query of its own.
create or replace function etl._query_source_problem(watermark jsonb, out message text, out hint text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_type  text;
  v_types text[] := case watermark->>'strategy' when 'timestamp' then array['timestamp with time zone', 'timestamp without time zone', 'date']
                                                when 'id' then array['smallint', 'integer', 'bigint'] end;
begin
  hint := 'source is a column (schema.table.column), or one query that returns one value: the newest there is to read';
  if v_types is null then
    message := 'the xid strategy reads columns, a query has no meaning for it';
    return;
  end if;
  if not etl._is_admin(etl._requesting_role()) then return; end if;
  perform etl._check_source(watermark#>>'{source,0}');
  v_type := etl._read_source(format(E'select format_type(pg_typeof(q.value), null) from (select) r left join lateral (%s\n) q(value) on false', watermark#>>'{source,0}'));
  if v_type <> all (v_types) then
    message := format('the source query returns %s, the %s strategy needs %s', v_type, watermark->>'strategy', array_to_string(v_types, ' or '));
  end if;
exception when others then
  message := format('the source query fails: %s', sqlerrm);
end $$;
comment on function etl._query_source_problem(jsonb) is 'What is wrong with the query that is the source of a watermark, or null; whoever is no member of etl_admin is not told.';
revoke all on function etl._query_source_problem(jsonb) from public;

create or replace function etl._watermark_problems(procedure jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_watermark jsonb  := procedure->'watermark';
  v_sources   text[] := etl._text_array(v_watermark->'source');
  v_problems  jsonb;
begin
  if jsonb_typeof(v_watermark) is distinct from 'object' then return '[]'; end if;
  if etl._is_query(v_sources) then
    select jsonb_agg(etl._config_problem('[]', p.message, p.hint)) into v_problems from etl._query_source_problem(v_watermark) p where p.message is not null;
  else
    select jsonb_agg(etl._config_problem('[]', p.message, p.hint)) into v_problems from etl._column_source_problems(v_watermark) p;
    if v_problems is null and v_watermark->>'strategy' = 'id' then
      select jsonb_agg(etl._config_problem('[]', p.message, p.hint)) into v_problems from etl._id_source_problems(v_sources) p;
    end if;
  end if;
  return (select coalesce(jsonb_agg(p || jsonb_build_object('loc', jsonb_build_array('procedures', procedure->>'name', 'watermark', 'source'))), '[]')
            from jsonb_array_elements(v_problems) p);
end $$;
comment on function etl._watermark_problems(jsonb) is 'What is wrong with the watermark sources of a configured procedure.';
revoke all on function etl._watermark_problems(jsonb) from public;

-- Relations between procedures: a program that writes the document itself may not have checked them.
create or replace function etl._relation_problems(config jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with procedure as (
    select p->>'name' as name, p as definition from jsonb_array_elements(config->'procedures') p
  ), dependency as (
    select p.name, d as needs, p.definition, q.definition as needed from procedure p
      cross join lateral jsonb_array_elements_text(p.definition->'dependencies') d left join procedure q on q.name = d
  ), found(loc, message, hint) as (
    select jsonb_build_array('procedures', d.name, 'dependencies'), format('%s depends on %s, which is not in this pipeline', d.name, d.needs), 'correct the name, or add the procedure'
      from dependency d where d.needed is null
    union all
    select jsonb_build_array('procedures', d.name, 'dependencies'), format('dimension %s depends on fact %s', d.name, d.needs),
           'remove the dependency, or declare it: allow_fact_dependency: true'
      from dependency d where d.definition->>'type' = 'dimension' and d.needed->>'type' = 'fact' and d.definition->'allow_fact_dependency' <> 'true'
    union all
    select jsonb_build_array('procedures', min(p.name), 'name'), format('procedure %s is defined %s times', p.name, count(*)), 'names are unique in a pipeline'
      from procedure p group by p.name having count(*) > 1
    union all
    select jsonb_build_array('procedures', max(p.name), 'watermark', 'state_key'),
           format('state_key %s is shared by %s, which do not always run together', p.definition#>>'{watermark,state_key}', string_agg(p.name, ', ' order by p.name)),
           'give each its own state_key, or put them into one group with transaction_scope: per_group'
      from procedure p where jsonb_typeof(p.definition->'watermark') = 'object' group by p.definition#>>'{watermark,state_key}'
    having count(*) > 1 and (count(distinct p.definition->>'group') <> 1 or bool_or(p.definition->>'group' is null)
                             or bool_or(p.definition->>'transaction_scope' <> 'per_group'))
    union all
    select jsonb_build_array('procedures', max(p.name), 'watermark', 'state_key'),
           format('state_key %s has one window for %s, but their sources have no order in common', p.definition#>>'{watermark,state_key}', string_agg(p.name, ', ' order by p.name)),
           'give each its own state_key'
      from procedure p where p.definition#>>'{watermark,state_key}' is not null group by p.definition#>>'{watermark,state_key}'
    having count(distinct p.definition#>'{watermark,source}') > 1 and (min(p.definition#>>'{watermark,strategy}') = 'id'
                             or bool_or(etl._is_query(etl._text_array(p.definition#>'{watermark,source}'))))
    union all
    select jsonb_build_array('procedures', p.name, 'max_window'), 'max_window needs columns as source of the watermark: a query does not say where the rows are',
           'name the columns, or remove max_window'
      from procedure p
     where jsonb_typeof(p.definition->'max_window') in ('number', 'string') and etl._is_query(etl._text_array(p.definition#>'{watermark,source}'))
    union all
    select jsonb_build_array('procedures', p.name, 'watermark', 'state_key'),
           format('state_key %s already stands at %s, up to where %s has not read', t.state_key, t.last_success_watermark, p.name),
           'give it a state_key of its own, so that it begins at the beginning'
      from procedure p
      join etl.state t on t.state_key = p.definition#>>'{watermark,state_key}' and t.last_success_watermark is not null
     where not exists (select from etl.procedures q join etl.pipelines l using (pipeline_id)
                        where l.name = config->>'pipeline' and q.name = p.name and q.procedure_id = any (t.procedure_ids))
    union all
    select jsonb_build_array('procedures', p.name, 'watermark', 'state_key'),
           format('state_key %s belongs to procedure %s of pipeline %s', o.state_key, o.name, l.name), 'give it its own state_key'
      from procedure p
      join etl.procedures o on o.state_key = p.definition#>>'{watermark,state_key}' and o.is_active
      join etl.pipelines l using (pipeline_id)
     where l.name <> config->>'pipeline'
    union all
    select jsonb_build_array('procedures', p.name, 'watermark', 'state_key'),
           format('the watermark of state_key %s is of the %s strategy', s.state_key, s.strategy),
           'give the procedure a new state_key: it starts without a watermark'
      from procedure p
      join etl.state s on s.state_key = p.definition#>>'{watermark,state_key}'
     where s.last_success_watermark is not null and s.strategy <> p.definition#>>'{watermark,strategy}'
  )
  select coalesce(jsonb_agg(etl._config_problem(f.loc, f.message, f.hint)), '[]') from found f
$$;
comment on function etl._relation_problems(jsonb) is 'What is wrong with the relations between the procedures of a configuration.';
revoke all on function etl._relation_problems(jsonb) from public;

-- A day that never comes is found by looking for it.
create or replace function etl._schedule_time_problem(schedule jsonb, out field text, out message text, out hint text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  field := 'timezone'; hint := 'select name from pg_timezone_names lists what this server knows';
  begin
    message := case when schedule->>'timezone' is null then 'a schedule needs a time zone' end;
    perform clock_timestamp() at time zone (schedule->>'timezone');
  exception when invalid_parameter_value then
    message := format('the server does not know the time zone %s', schedule->>'timezone');
  end;
  if message is not null then return; end if;
  field := 'cron'; hint := 'minute, hour, day of month, month, day of week, such as 0 2 * * *; or 30 seconds';
  message := etl._cron_problem(schedule->>'cron');
  if message is null and etl._next_slot(schedule->>'cron', schedule->>'timezone', clock_timestamp()) = 'infinity' then
    message := format('%s names a day that never comes', schedule->>'cron');
    hint := 'correct the day of month, or the month';
  end if;
end $$;
comment on function etl._schedule_time_problem(jsonb) is 'What is wrong with when a schedule is due, or null.';
revoke all on function etl._schedule_time_problem(jsonb) from public;

create or replace function etl._clock_problems(config jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with found(loc, message, hint) as (
    select jsonb_build_array('schedules', s->>'name', p.field), p.message, p.hint
      from jsonb_array_elements(config->'schedules') s cross join lateral etl._schedule_time_problem(s) p where p.message is not null
    union all
    select jsonb_build_array('schedules', s->>'name', 'reason'), format('the schedule %s refreshes fully and gives no reason', s->>'name'),
           'a full refresh needs a reason, which is kept with each run: add reason: ...'
      from jsonb_array_elements(config->'schedules') s where s->>'mode' = 'full' and coalesce(btrim(s->>'reason'), '') = ''
    union all
    select jsonb_build_array('retention', r.key), format('%s cannot be kept for %s days', r.key, r.value), 'a whole number of days from 1 on, or forever'
      from jsonb_each(etl._setting(config->'retention')) r where r.value <> '"forever"' and not jsonb_path_exists(r.value, '$ ? (@ >= 1 && @ <= 36500 && @ == @.floor())')
    union all
    select jsonb_build_array('clock', 'workers'), format('%s is not a number of workers', config#>>'{clock,workers}'), 'a whole number from 0 to 64'
     where config#>'{clock,workers}' is not null and not jsonb_path_exists(config, '$.clock.workers ? (@ >= 0 && @ <= 64 && @ == @.floor())')
  )
  select coalesce(jsonb_agg(etl._config_problem(f.loc, f.message, f.hint)), '[]') from found f
$$;
comment on function etl._clock_problems(jsonb) is 'What is wrong with the schedules, the clock and the retention of a configuration.';
revoke all on function etl._clock_problems(jsonb) from public;
