-- From a request to a plan, writing nothing: etl.plan_run shows what it returns, etl._create_run stores it.

-- Problems of the request itself: values that its form does not rule out (etl._check_request).
create or replace function etl._request_problems(request jsonb) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object('loc', jsonb_build_array(q.field), 'code', 'request.invalid', 'message', q.message)), '[]')
    from (values
      ('mode', case when request->>'mode' not in ('incremental', 'full')
                 then format('mode is incremental or full, not %s', request->>'mode') end),
      ('transaction_scope', case when request->>'transaction_scope' not in ('per_procedure', 'per_group')
                 then format('transaction_scope is per_procedure or per_group, not %s', request->>'transaction_scope') end)
    ) q(field, message)
   where q.message is not null
$$;
comment on function etl._request_problems(jsonb) is 'Problems of the scalar fields of a request.';
revoke all on function etl._request_problems(jsonb) from public;

-- Parameters of all selected procedures: {procedure_id: {name: value}}, and every problem found.
create or replace function etl._plan_parameters(selected int[], given jsonb, out parameters jsonb, out problems jsonb)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(p.procedure_id, c.parameters) filter (where c.parameters <> '{}'), '{}'),
         coalesce((select jsonb_agg(e.problem) from jsonb_path_query(jsonb_agg(c.problems order by p.name) filter (where c.problems is not null), '$[*][*]') e(problem)), '[]')
         || coalesce((select jsonb_agg(jsonb_build_object('loc', jsonb_build_array('params', k.name), 'code', 'params.unused',
              'message', format('params are given for %s, which the request does not select', k.name)) order by k.name)
            from jsonb_object_keys(given) k(name)
           where k.name not in (select s.name from etl.procedures s where s.procedure_id = any (selected))), '[]')
    from unnest(selected) u(id)
    join etl.procedures p on p.procedure_id = u.id
    cross join lateral etl._check_parameters(p.procedure_id, p.name, given->p.name) c
   where given ? p.name or exists (select from etl.parameters d where d.procedure_id = p.procedure_id)
$$;
comment on function etl._plan_parameters(int[], jsonb) is 'Validated parameters by procedure, and every problem found.';
revoke all on function etl._plan_parameters(int[], jsonb) from public;

-- The steps in order, in numbered scopes, with a barrier between dimensions and facts.
create or replace function etl._plan_steps(selected int[], request jsonb, parameters jsonb) returns etl.plan_item[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with ordered as (
    select o.*, dense_rank() over (order by o.phase, o.scope_level, o.scope_number)
                + dense_rank() over (order by o.phase) - 1 as scope_index,
           row_number() over (order by o.phase, o.scope_level, o.scope_number, o."position") as order_index
      from etl._order_procedures(selected, request->>'transaction_scope') o
  ), items as (
    select row(o.scope_index, 'steps', o.order_index, o.procedure_id, o.tx_scope, coalesce(request->>'mode', p.default_mode),
               coalesce(parameters->o.procedure_id::text, '{}'), null, null, null, null, null, null, null, o.scope_index, 0)::etl.plan_item as item
      from ordered o join etl.procedures p using (procedure_id)
    union all
    select row(max(o.scope_index) + 1, 'barrier', null, null, null, null, null, null, null, null, null, null, null, null,
               max(o.scope_index) + 1, 0)::etl.plan_item
      from ordered o
     where o.phase < (select max(phase) from ordered)
     group by o.phase
  )
  select array_agg(item order by (item).scope_index, (item).order_index) from items
$$;
comment on function etl._plan_steps(int[], jsonb, jsonb) is 'The steps of a plan in order, and the barriers between their phases.';
revoke all on function etl._plan_steps(int[], jsonb, jsonb) from public;

-- Procedures that share a watermark move it for each other: one of them alone, or each in a transaction of its own,
-- would take rows from the others that they have not read.
create or replace function etl._shared_watermark_problems(selected int[], transaction_scope text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object('loc', jsonb_build_array(q.loc), 'code', 'selection.splits_watermark',
           'message', format('%s share the watermark %s and run together, in one transaction', q.names, q.state_key)) order by q.state_key), '[]')
    from (select p.state_key, string_agg(p.name, ', ' order by p.name) as names,
                 case when bool_and(p.procedure_id = any (selected)) then 'transaction_scope' else 'procedures' end as loc
            from etl.procedures p
           where p.is_active and p.state_key in (select s.state_key from etl.procedures s where s.procedure_id = any (selected))
           group by p.state_key
          having count(*) > 1 and (not bool_and(p.procedure_id = any (selected)) or _shared_watermark_problems.transaction_scope = 'per_procedure')) q
$$;
comment on function etl._shared_watermark_problems(int[], text) is 'Problems of a request that would run procedures apart which share a watermark.';
revoke all on function etl._shared_watermark_problems(int[], text) from public;

-- Everything a request leads to. Raises PT404 for unknown names, PT422 for invalid values, PT403 for guardrails, PT400 for cycles.
create or replace function etl._plan(request jsonb, requester text default null, out pipeline_id int, out max_concurrency int, out items etl.plan_item[])
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline  etl.pipelines := etl._pipeline(request->>'pipeline');
  v_problems  jsonb := etl._request_problems(request);
  v_selection record;
  v_params    record;
begin
  v_selection := etl._select_procedures(v_pipeline.pipeline_id, request);
  v_problems := v_problems || v_selection.problems || etl._shared_watermark_problems(v_selection.selected, request->>'transaction_scope');
  v_params := etl._plan_parameters(v_selection.selected, coalesce(request->'params', '{}'));
  v_problems := v_problems || v_params.problems;
  if jsonb_typeof(request->'mv_refresh') = 'array' then
    v_problems := v_problems || coalesce(etl._unknown_names('mv_refresh', request->'mv_refresh',
      (select array_agg(t.name) from etl.refresh_targets t where t.pipeline_id = v_pipeline.pipeline_id)), '[]');
  end if;
  if v_problems <> '[]' then
    perform etl._fail(
      case when v_problems->0->>'code' like '%.unknown' then 'PT404' else 'PT422' end, v_problems->0->>'code',
      (select string_agg(p->>'message', '; ') from jsonb_array_elements(v_problems) p),
      'what there is: select * from etl.list_procedures()', jsonb_build_object('errors', v_problems));
  end if;
  items := etl._plan_steps(v_selection.selected, request, v_params.parameters);
  perform etl._check_full_refresh(items, request, coalesce(requester, etl._requesting_role()));
  items := etl._place_refreshes(v_pipeline.pipeline_id, items, request->'mv_refresh');
  pipeline_id := v_pipeline.pipeline_id;
  max_concurrency := coalesce((request->>'max_concurrency')::int, v_pipeline.max_concurrency);
end $$;
comment on function etl._plan(jsonb, text) is
  'The plan of a request: steps, barriers and refreshes, numbered in topological order. Writes nothing.';
revoke all on function etl._plan(jsonb, text) from public;
