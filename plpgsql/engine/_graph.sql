-- Order in a graph of numbered nodes (1..n): linear in nodes and edges, so that ten thousand procedures plan at once.
--
-- Edges run from what comes first to what comes later and must be sorted by edge_from.
-- levels: the longest way to a node; null for a node in a cycle or behind one.
-- phases: 0 for what comes before every fact, 1 for a scope that mixes dimensions and facts, 2 for facts and
-- whatever depends on one. Given as 0, 1, 2 by what a node itself contains.
create or replace function etl._graph_order(phases int[], edge_from int[], edge_to int[], out levels int[], out phase_of int[])
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_nodes   int := coalesce(array_length(phases, 1), 0);
  v_edges   int := coalesce(array_length(edge_from, 1), 0);
  v_waiting int[] := array_fill(0, array[greatest(v_nodes, 1)]);
  v_first   int[] := array_fill(0, array[greatest(v_nodes, 1)]);
  v_queue   int[] := '{}';
  v_head    int := 1;
  v_tail    int := 0;
  v_node    int;
  v_next    int;
begin
  levels := array_fill(null::int, array[greatest(v_nodes, 1)]);
  phase_of := phases;
  for e in 1 .. v_edges loop
    v_waiting[edge_to[e]] := v_waiting[edge_to[e]] + 1;
    if v_first[edge_from[e]] = 0 then v_first[edge_from[e]] := e; end if;
  end loop;
  for n in 1 .. v_nodes loop
    if v_waiting[n] = 0 then v_tail := v_tail + 1; v_queue[v_tail] := n; end if;
  end loop;
  while v_head <= v_tail loop
    v_node := v_queue[v_head];
    v_head := v_head + 1;
    levels[v_node] := coalesce(levels[v_node], 0);
    continue when v_first[v_node] = 0;
    for e in v_first[v_node] .. v_edges loop
      exit when edge_from[e] <> v_node;
      v_next := edge_to[e];
      levels[v_next] := greatest(levels[v_next], levels[v_node] + 1);
      if phase_of[v_node] > 0 then phase_of[v_next] := 2; end if;
      v_waiting[v_next] := v_waiting[v_next] - 1;
      if v_waiting[v_next] = 0 then v_tail := v_tail + 1; v_queue[v_tail] := v_next; end if;
    end loop;
  end loop;
  for n in 1 .. v_nodes loop
    if v_waiting[n] > 0 then levels[n] := null; end if;
  end loop;
end $$;
comment on function etl._graph_order(int[], int[], int[]) is
  'Levels and phases of a graph; a level is null for nodes in or behind a cycle.';
revoke all on function etl._graph_order(int[], int[], int[]) from public;

-- One cycle, as node numbers, each depending on the next, the first repeated at the end; null when there is none.
create or replace function etl._graph_cycle(levels int[], edge_from int[], edge_to int[]) returns int[]
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_path int[] := '{}';
  v_node int := (select min(n) from unnest(levels) with ordinality l(level, n) where l.level is null);
begin
  while v_node is not null loop
    if array_position(v_path, v_node) is not null then
      return v_path[array_position(v_path, v_node):] || v_node;
    end if;
    v_path := v_path || v_node;
    select min(e.f) into v_node from unnest(edge_from, edge_to) e(f, t) where e.t = v_node and levels[e.f] is null;
  end loop;
  return null;
end $$;
comment on function etl._graph_cycle(int[], int[], int[]) is 'The nodes of one cycle of a graph, or null.';
revoke all on function etl._graph_cycle(int[], int[], int[]) from public;
