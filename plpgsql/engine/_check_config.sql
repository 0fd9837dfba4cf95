-- Validates a configuration against the database. Raises PT422 config.invalid with every problem found.
create or replace function etl._check_graph(config jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_names  text[];
  v_phases int[];
  v_scopes int[];
  v_from   int[];
  v_to     int[];
begin
  select array_agg(q.name order by q.name), array_agg(q.phase order by q.name), array_agg(q.scope order by q.name)
    into v_names, v_phases, v_scopes
    from (select p->>'name' as name, case p->>'type' when 'fact' then 2 else 0 end as phase,
                 (dense_rank() over (order by case when p->>'transaction_scope' = 'per_group' then 'g' || (p->>'group') else 'p' || (p->>'name') end))::int as scope
            from jsonb_array_elements(config->'procedures') p) q;
  select array_agg(array_position(v_names, d.needs) order by array_position(v_names, d.needs)), array_agg(array_position(v_names, d.name) order by array_position(v_names, d.needs))
    into v_from, v_to
    from (select distinct p->>'name' as name, n.needs from jsonb_array_elements(config->'procedures') p
            cross join lateral jsonb_array_elements_text(p->'dependencies') n(needs)) d;
  perform etl._order_nodes(v_names, v_phases, v_scopes, v_from, v_to);
end $$;
comment on function etl._check_graph(jsonb) is 'Raises PT400 plan.cycle or plan.group_cycle when a configuration cannot be put in order.';
revoke all on function etl._check_graph(jsonb) from public;

create or replace function etl._check_config(config jsonb) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_problems jsonb := etl._relation_problems(config) || etl._helper_problems(config);
begin
  v_problems := v_problems || (
    select coalesce(jsonb_agg(e.problem), '[]')
      from jsonb_array_elements(config->'procedures') p
      cross join lateral jsonb_array_elements((etl._compile_call(p)).problems || etl._refresh_problems(p) || etl._watermark_problems(p)
        || coalesce((select jsonb_agg(etl._config_problem(jsonb_build_array('procedures', p->>'name', 'checks', c->>'name'), (etl._compile_check(c)).problem,
                       case when (etl._compile_check(c)).problem like 'role etl_owner may not read %'
                         then format('grant usage on schema %s to etl_owner; grant select on %s to etl_owner', split_part(c->>'table', '.', 1), c->>'table')
                         else 'correct the check' end)) from jsonb_array_elements(p->'checks') c where (etl._compile_check(c)).problem is not null), '[]')) e(problem));
  if v_problems <> '[]' then
    perform etl._fail('PT422', 'config.invalid', format('the configuration has %s problem(s); the first: %s', jsonb_array_length(v_problems), v_problems->0->>'message'),
      v_problems->0->>'hint', jsonb_build_object('errors', v_problems));
  end if;
  perform etl._check_graph(config);
end $$;
comment on function etl._check_config(jsonb) is 'Validates a configuration against the database. Raises PT422 config.invalid with every problem, PT400 for a cycle.';
revoke all on function etl._check_config(jsonb) from public;
