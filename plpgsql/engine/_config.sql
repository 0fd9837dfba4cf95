-- Settings that may be missing from a configuration, or empty: then their defaults hold, and nothing is compared.
create or replace function etl._setting(setting jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select nullif(nullif(setting, 'null'), '{}')
$$;
comment on function etl._setting(jsonb) is 'An object of settings, or null when it says nothing.';
revoke all on function etl._setting(jsonb) from public;

-- A configuration in the form in which two of them are compared: parts by name, lists without an order of their own sorted,
-- settings that came with a later release left out where they have their default: what was applied before keeps its digest.
create or replace function etl._normalise_config(config jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('pipeline', config->'pipeline',
    'settings', jsonb_strip_nulls(jsonb_build_object('description', config->'description', 'max_concurrency', config->'max_concurrency', 'search_path', config->'search_path',
      'helper_server', config->'helper_server', 'clock', etl._setting(config->'clock'), 'retention', etl._setting(config->'retention'),
      'approvals', nullif(config->>'approvals', 'none'), 'observe_lineage', nullif(config->>'observe_lineage', 'daily'))),
    'groups', (select coalesce(jsonb_object_agg(g->>'name', jsonb_strip_nulls(g)), '{}') from jsonb_array_elements(config->'groups') g),
    'schedules', (select coalesce(jsonb_object_agg(s->>'name', jsonb_strip_nulls(s)), '{}') from jsonb_array_elements(config->'schedules') s),
    'procedures', (select coalesce(jsonb_object_agg(p->>'name', jsonb_strip_nulls(p || jsonb_build_object(
        'dependencies', (select coalesce(jsonb_agg(d order by d), '[]') from jsonb_array_elements_text(p->'dependencies') d),
        'tags', (select coalesce(jsonb_agg(t order by t), '[]') from jsonb_array_elements_text(p->'tags') t),
        'watermark', case jsonb_typeof(p->'watermark') when 'object' then '{"delay_ms": 0, "on_empty": "run"}' || jsonb_strip_nulls(p->'watermark') end,
        'mv_refresh', (select coalesce(jsonb_agg(m || jsonb_build_object('concurrently', m->>'concurrently') order by m->>'name'), '[]')
                         from jsonb_array_elements(p->'mv_refresh') m)))), '{}')
      from jsonb_array_elements(config->'procedures') p))
$$;
comment on function etl._normalise_config(jsonb) is 'A configuration with its parts by name, for comparison.';
revoke all on function etl._normalise_config(jsonb) from public;

create or replace function etl._digest(config jsonb) returns text
language sql immutable strict set search_path = pg_catalog, pg_temp as $$
  select encode(sha256(convert_to(config::text, 'UTF8')), 'hex')
$$;
comment on function etl._digest(jsonb) is 'sha256 of a configuration in normal form.';
revoke all on function etl._digest(jsonb) from public;

-- The configuration that the catalog tables hold, in normal form; null when the pipeline is not there.
create or replace function etl._catalog_procedure(p etl.procedures) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_strip_nulls(jsonb_build_object('name', p.name, 'type', p.type, 'description', p.description, 'routine', p.routine,
    'default_mode', p.default_mode, 'allow_full_refresh', p.allow_full_refresh, 'allow_fact_dependency', p.allow_fact_dependency,
    'transaction_scope', p.transaction_scope, 'isolation', p.isolation, 'args', p.args, 'timeout_ms', p.timeout_ms,
    'lock_timeout_ms', p.lock_timeout_ms, 'on_failure', p.on_failure, 'max_window', p.max_window, 'freshness_ms', p.freshness_ms,
    'retries', jsonb_build_object('attempts', p.max_attempts, 'backoff_ms', p.backoff_ms, 'max_backoff_ms', p.max_backoff_ms),
    'checks', (select coalesce(jsonb_agg(c - 'sql' order by n), '[]') from jsonb_array_elements(p.checks) with ordinality x(c, n)),
    'watermark', case when p.state_key is not null then jsonb_build_object('strategy', p.watermark_strategy,
      'source', p.watermark_sources, 'state_key', p.state_key, 'delay_ms', p.delay_ms,
      'on_empty', p.on_empty) end,
    'group', (select g.name from etl.group_members m join etl.groups g using (group_id) where m.procedure_id = p.procedure_id),
    'tags', (select coalesce(jsonb_agg(t.name order by t.name), '[]') from etl.procedure_tags x join etl.tags t using (tag_id)
              where x.procedure_id = p.procedure_id),
    'dependencies', (select coalesce(jsonb_agg(q.name order by q.name), '[]') from etl.dependencies d
                       join etl.procedures q on q.procedure_id = d.depends_on_id where d.procedure_id = p.procedure_id),
    'params', (select coalesce(jsonb_agg(d.declaration order by d.ordinal), '[]') from etl.parameters d where d.procedure_id = p.procedure_id),
    'mv_refresh', (select coalesce(jsonb_agg(jsonb_build_object('name', t.name, 'after', x.refresh_after, 'on', x.refresh_on,
                       'concurrently', x.concurrency) order by t.name), '[]')
                     from etl.procedure_refresh_targets x join etl.refresh_targets t using (refresh_target_id)
                    where x.procedure_id = p.procedure_id)))
$$;
comment on function etl._catalog_procedure(etl.procedures) is 'A procedure as the catalog tables hold it, in normal form.';
revoke all on function etl._catalog_procedure(etl.procedures) from public;

create or replace function etl._catalog_config(pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('pipeline', l.name,
    'settings', jsonb_strip_nulls(jsonb_build_object('description', l.description, 'max_concurrency', l.max_concurrency, 'search_path', l.search_path,
      'helper_server', l.helper_server, 'clock', nullif(l.clock, '{}'), 'retention', nullif(l.retention, '{}'),
      'approvals', nullif(l.approvals, 'none'), 'observe_lineage', nullif(l.observe_lineage, 'daily'))),
    'groups', (select coalesce(jsonb_object_agg(g.name, jsonb_strip_nulls(jsonb_build_object('name', g.name, 'description', g.description))), '{}')
                 from etl.groups g where g.pipeline_id = l.pipeline_id and g.is_active),
    'schedules', (select coalesce(jsonb_object_agg(s.name, s.definition), '{}') from etl.schedules s where s.pipeline_id = l.pipeline_id and s.is_active),
    'procedures', (select coalesce(jsonb_object_agg(p.name, etl._catalog_procedure(p)), '{}') from etl.procedures p
                    where p.pipeline_id = l.pipeline_id and p.is_active))
    from etl.pipelines l where l.name = pipeline
$$;
comment on function etl._catalog_config(text) is 'The configuration that the catalog tables hold, in normal form, or null.';
revoke all on function etl._catalog_config(text) from public;

create or replace function etl._config_drift() returns table (pipeline text, is_drifted boolean)
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off as $$
  select l.name, v.config is distinct from etl._catalog_config(l.name)
    from etl.pipelines l
    join lateral (select c.config from etl.config_versions c where c.pipeline_id = l.pipeline_id order by c.version desc limit 1) v on true
$$;
comment on function etl._config_drift() is 'Whether the catalog of each pipeline was changed by other means since it was last configured. A quarter of a millisecond for each procedure.';
revoke all on function etl._config_drift() from public;
grant execute on function etl._config_drift() to etl_reader;

-- What turns one configuration into another: + added, ~ changed (with the fields), - removed.
create or replace function etl._part_changes(kind text, old jsonb, new jsonb) returns setof jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('action', case when o.value is null then '+' when n.value is null then '-' else '~' end,
           'kind', kind, 'name', coalesce(n.key, o.key),
           'fields', case when o.value is not null and n.value is not null then (
             select jsonb_object_agg(coalesce(a.key, b.key), jsonb_build_array(a.value, b.value))
               from jsonb_each(o.value) a full join jsonb_each(n.value) b on a.key = b.key
              where a.value is distinct from b.value) else '{}' end)
    from jsonb_each(coalesce(old, '{}')) o full join jsonb_each(new) n on n.key = o.key
   where o.value is distinct from n.value
   order by coalesce(n.key, o.key)
$$;
comment on function etl._part_changes(text, jsonb, jsonb) is 'What changes between two sets of named parts of a configuration.';
revoke all on function etl._part_changes(text, jsonb, jsonb) from public;

create or replace function etl._config_changes(old jsonb, new jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(c), '[]') from (
    select etl._part_changes('pipeline', case when old is not null then jsonb_build_object(old->>'pipeline', old->'settings') end,
                             jsonb_build_object(new->>'pipeline', new->'settings')) as c
    union all select etl._part_changes('group', old->'groups', new->'groups')
    union all select etl._part_changes('procedure', old->'procedures', new->'procedures')
    union all select etl._part_changes('schedule', old->'schedules', new->'schedules')) q
$$;
comment on function etl._config_changes(jsonb, jsonb) is
  'The changes from one configuration to another: [{"action": "+", "~" or "-", "kind", "name", "fields": {field: [old, new]}}].';
revoke all on function etl._config_changes(jsonb, jsonb) from public;
