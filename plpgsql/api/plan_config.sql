-- What applying a configuration would change, checked against the database, writing nothing.
create or replace function etl.plan_config(config jsonb) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_new     jsonb := etl._normalise_config(config);
  v_current jsonb := etl._catalog_config(config->>'pipeline');
  v_applied jsonb;
  v_changes jsonb;
begin
  perform etl._check_config(config);
  select v.config into v_applied from etl.config_versions v join etl.pipelines l using (pipeline_id)
   where l.name = plan_config.config->>'pipeline' order by v.version desc limit 1;
  -- A routine may have changed under an unchanged configuration.
  v_changes := etl._config_changes(v_current, v_new) || (
    select coalesce(jsonb_agg(jsonb_build_object('action', '~', 'kind', 'procedure', 'name', p.name, 'fields',
             jsonb_build_object('call', jsonb_build_array(p.call_sql, c.call_sql))) order by p.name), '[]')
      from jsonb_array_elements(plan_config.config->'procedures') x
      join etl.procedures p on p.name = x->>'name' and p.is_active
      join etl.pipelines l on l.pipeline_id = p.pipeline_id and l.name = plan_config.config->>'pipeline'
      cross join lateral etl._compile_call(x) c
     where v_current->'procedures'->p.name = v_new->'procedures'->p.name
       and (c.call_sql, c.rows_column) is distinct from (p.call_sql, p.rows_column));
  return jsonb_build_object('pipeline', config->'pipeline', 'base_digest', etl._digest(v_current), 'digest', etl._digest(v_new),
    'version', (select max(v.version) from etl.config_versions v join etl.pipelines l using (pipeline_id) where l.name = plan_config.config->>'pipeline'),
    'changes', v_changes,
    'drift', case when v_applied is null then '[]' else etl._config_changes(v_applied, v_current) end);
end $$;
comment on function etl.plan_config(jsonb) is
  'What etl.apply_config with this configuration would change, and how the catalog has drifted from what was last applied. Writes nothing. '
  'The query that is the source of a watermark is looked at for members of etl_admin only. '
  'Raises PT422 config.invalid with every problem, PT400 plan.cycle or plan.group_cycle.';
revoke all on function etl.plan_config(jsonb) from public;
grant execute on function etl.plan_config(jsonb) to etl_reader;
