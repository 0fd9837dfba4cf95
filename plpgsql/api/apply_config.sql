-- Applies a configuration, whole, in the caller's transaction: the only way into the catalog tables.
create or replace function etl.apply_config(
  config jsonb, base_digest text default null, author text default null, git_revision text default null, source text default null) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan        jsonb;
  v_pipeline_id int;
  v_version     int;
begin
  -- One at a time, of whatever pipeline: a state_key belongs to one of them.
  perform pg_advisory_xact_lock(hashtextextended('b2s configuration', 0));
  v_plan := etl.plan_config(config);
  if base_digest is not null and base_digest is distinct from coalesce(v_plan->>'base_digest', '') then
    perform etl._fail('PT409', 'config.stale', 'the configuration in the database has changed since this plan was made',
      'plan again: b2s sync-config --dry-run', jsonb_build_object('base_digest', base_digest, 'digest', v_plan->'base_digest'));
  end if;
  if v_plan->'changes' = '[]' and v_plan->'drift' = '[]' then return v_plan; end if;
  v_pipeline_id := etl._store_pipeline(config);
  update etl.procedures p set is_active = false, state_key = null, watermark_strategy = null
   where p.pipeline_id = v_pipeline_id and p.is_active and p.name not in (select x->>'name' from jsonb_array_elements(apply_config.config->'procedures') x);
  perform etl._store_procedure(v_pipeline_id, p) from jsonb_array_elements(apply_config.config->'procedures') p;
  perform etl._store_links(v_pipeline_id, config);
  insert into etl.config_versions (pipeline_id, version, digest, config, changes, source, git_revision, author, requested_by)
  select v_pipeline_id, coalesce(max(v.version), 0) + 1, v_plan->>'digest', etl._normalise_config(apply_config.config), v_plan->'changes', apply_config.source,
         apply_config.git_revision, coalesce(apply_config.author, etl._requester()), etl._requester()
    from etl.config_versions v where v.pipeline_id = v_pipeline_id
  returning version into v_version;
  return v_plan || jsonb_build_object('version', v_version);
end $$;
comment on function etl.apply_config(jsonb, text, text, text, text) is
  'Applies a configuration whole and records it as a new version; returns the plan. base_digest: the digest the plan was made against, '
  'an empty string for none. Procedures that are gone are deactivated. Admins only. Raises PT422 config.invalid, PT400 plan.cycle, PT409 config.stale.';
revoke all on function etl.apply_config(jsonb, text, text, text, text) from public;
grant execute on function etl.apply_config(jsonb, text, text, text, text) to etl_admin;
