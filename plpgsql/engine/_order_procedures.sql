-- What must come before what among the selected procedures. A path through procedures that are not selected is an
-- order but not a requirement: what lies between is not run.
create or replace function etl._selected_edges(selected int[])
returns table (from_id int, to_id int, is_required boolean)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive reach(consumer, source, is_direct) as (
    select d.procedure_id, d.depends_on_id, true
      from unnest(selected) s(id) join etl.dependencies d on d.procedure_id = s.id
    union
    select r.consumer, d.depends_on_id, false
      from reach r
      join etl.procedures p on p.procedure_id = r.source and p.is_active
      join etl.dependencies d on d.procedure_id = r.source
     where not exists (select from unnest(selected) s(id) where s.id = r.source)
  )
  select r.source, r.consumer, bool_or(r.is_direct)
    from reach r join unnest(selected) s(id) on s.id = r.source
   where r.source <> r.consumer
   group by r.source, r.consumer
$$;
comment on function etl._selected_edges(int[]) is 'Edges among the selected procedures, direct (required) or through others (order only).';
revoke all on function etl._selected_edges(int[]) from public;

-- Raises the error for a cycle. Procedures alone: the YAML is wrong. Scopes: the grouping is.
create or replace function etl._fail_cycle(names text[], is_contracted boolean) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if is_contracted then
    perform etl._fail('PT400', 'plan.group_cycle',
      format('the groups that run as one transaction depend on each other in a circle: %s', array_to_string(names, ' -> ')),
      'move a procedure of the circle out of its group, or give the group transaction_scope: per_procedure',
      jsonb_build_object('cycle', names));
  end if;
  perform etl._fail('PT400', 'plan.cycle', format('dependencies form a cycle: %s', array_to_string(names, ' -> ')),
    'remove one of these dependencies', jsonb_build_object('cycle', names));
end $$;
comment on function etl._fail_cycle(text[], boolean) is 'Raises PT400 plan.cycle or plan.group_cycle, naming the whole cycle.';
revoke all on function etl._fail_cycle(text[], boolean) from public;

-- Topological order of numbered nodes and of the scopes they form. Sorted by (phase, scope_level, scope_number, position)
-- the result is the order of execution for one worker.
create or replace function etl._order_nodes(names text[], phases int[], scopes int[], edge_from int[], edge_to int[])
returns table (n int, scope_number int, phase int, scope_level int, "position" int)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_order    record := etl._graph_order(phases, edge_from, edge_to);
  v_contract record;
begin
  if array_position(v_order.levels, null) is not null then
    perform etl._fail_cycle((select array_agg(names[c.n] order by c.i)
      from unnest(etl._graph_cycle(v_order.levels, edge_from, edge_to)) with ordinality c(n, i)), false);
  end if;
  if (select count(distinct s) from unnest(scopes) s) = cardinality(names) then
    return query select g.n, g.n, v_order.phase_of[g.n], v_order.levels[g.n], 1 from generate_series(1, cardinality(names)) g(n);
    return;
  end if;
  v_contract := etl._contract_scopes(scopes, phases, edge_from, edge_to, names);
  return query
    select g.n, v_contract.number_of[g.n], v_contract.phase_of[v_contract.number_of[g.n]], v_contract.levels[v_contract.number_of[g.n]],
           (row_number() over (partition by v_contract.number_of[g.n] order by v_order.phase_of[g.n], v_order.levels[g.n], g.n))::int
      from generate_series(1, cardinality(names)) g(n);
end $$;
comment on function etl._order_nodes(text[], int[], int[], int[], int[]) is
  'Order of execution of a graph, dimensions before facts, scopes together. Raises PT400 plan.cycle or plan.group_cycle.';
revoke all on function etl._order_nodes(text[], int[], int[], int[], int[]) from public;

create or replace function etl._order_procedures(selected int[], transaction_scope text)
returns table (procedure_id int, tx_scope text, scope_number int, phase int, scope_level int, "position" int)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_ids    int[];
  v_names  text[];
  v_phases int[];
  v_scopes int[];
  v_from   int[];
  v_to     int[];
begin
  select array_agg(q.procedure_id order by q.name), array_agg(q.name order by q.name), array_agg(q.phase order by q.name),
         array_agg(q.scope order by q.name)
    into v_ids, v_names, v_phases, v_scopes
    from (select p.procedure_id, p.name, case p.type when 'fact' then 2 else 0 end as phase,
                 coalesce(case when coalesce(_order_procedures.transaction_scope, p.transaction_scope) = 'per_group' then -m.group_id end,
                          p.procedure_id) as scope
            from unnest(selected) s(id)
            join etl.procedures p on p.procedure_id = s.id
            left join etl.group_members m on m.procedure_id = p.procedure_id) q;
  select array_agg(f.n order by f.n, t.n), array_agg(t.n order by f.n, t.n)
    into v_from, v_to
    from etl._selected_edges(selected) e
    join unnest(v_ids) with ordinality f(id, n) on f.id = e.from_id
    join unnest(v_ids) with ordinality t(id, n) on t.id = e.to_id;
  return query
    select v_ids[o.n], case when v_scopes[o.n] < 0 then 'per_group' else 'per_procedure' end, o.scope_number, o.phase, o.scope_level, o."position"
      from etl._order_nodes(v_names, v_phases, v_scopes, v_from, v_to) o;
end $$;
comment on function etl._order_procedures(int[], text) is
  'Topological order of the selected procedures and the scopes they form. Raises PT400 for a cycle.';
revoke all on function etl._order_procedures(int[], text) from public;

-- The graph of scopes that results when the steps of a group become one node.
create or replace function etl._contract_scopes(scopes int[], phases int[], edge_from int[], edge_to int[], names text[],
  out number_of int[], out levels int[], out phase_of int[])
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_phases int[];
  v_from   int[];
  v_to     int[];
  v_order  record;
begin
  select array_agg(q.number order by q.n) into number_of
    from (select s.n, dense_rank() over (order by s.first_n)::int as number
            from (select n, min(n) over (partition by scope) as first_n from unnest(scopes) with ordinality u(scope, n)) s) q;
  select array_agg(q.phase order by q.number) into v_phases
    from (select s.number, case when min(s.phase) = max(s.phase) then min(s.phase) else 1 end as phase
            from unnest(number_of, phases) s(number, phase) group by s.number) q;
  select array_agg(q.f order by q.f, q.t), array_agg(q.t order by q.f, q.t) into v_from, v_to
    from (select distinct number_of[e.f] as f, number_of[e.t] as t
            from unnest(edge_from, edge_to) e(f, t) where number_of[e.f] <> number_of[e.t]) q;
  v_order := etl._graph_order(v_phases, v_from, v_to);
  if array_position(v_order.levels, null) is not null then
    perform etl._fail_cycle((
      select array_agg((select string_agg(names[s.n], ' + ' order by s.n) from unnest(number_of) with ordinality s(number, n)
                         where s.number = c.number) order by c.i)
        from unnest(etl._graph_cycle(v_order.levels, v_from, v_to)) with ordinality c(number, i)), true);
  end if;
  levels := v_order.levels;
  phase_of := v_order.phase_of;
end $$;
comment on function etl._contract_scopes(int[], int[], int[], int[], text[]) is
  'Numbers the scopes and orders them. Raises PT400 plan.group_cycle, naming procedures of the circle.';
revoke all on function etl._contract_scopes(int[], int[], int[], int[], text[]) from public;
