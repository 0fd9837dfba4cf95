-- A long window is read in slices (max_window), each a transaction with its own watermark step and its own attempt.

-- Where the rows begin: slices do not pace through years without any.
create or replace function etl._next_value(procedure etl.procedures, since text) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = on set enable_bitmapscan = on set enable_sort = on as $$
declare
  v_type  text := case procedure.watermark_strategy when 'timestamp' then 'timestamptz' when 'id' then 'bigint' else 'xid8' end;
  v_from  text := case when procedure.watermark_strategy = 'xid' then pg_snapshot_xmax(since::pg_snapshot)::text else since end;
  v_zone  text := current_setting('timezone');
  v_value text;
begin
  perform set_config('timezone', coalesce(procedure.watermark_time_zone, v_zone), true);
  v_value := etl._read_source((
    select format('select to_jsonb(q.value) #>> ''{}'' from (%s) q order by q.value limit 1', string_agg(format(
             '(select %1$I::%4$s as value from %2$I.%3$I where %1$I is not null' || case when v_from is not null then ' and %1$I >= $1::%4$s' else '' end
             || case when procedure.watermark_strategy = 'timestamp' then ' and %1$I > ''-infinity''' else '' end
             || ' order by %1$I limit 1)', i[3], i[1], i[2], v_type), ' union all '))
      from (select parse_ident(s) from unnest(procedure.watermark_sources) s) x(i)), v_from);
  perform set_config('timezone', v_zone, true);
  return v_value;
end $$;
comment on function etl._next_value(etl.procedures, text) is 'The first value of the sources that a window beginning at since holds; null when there is none.';
revoke all on function etl._next_value(etl.procedures, text) from public;

-- A snapshot can be cut at any transaction id: the slice sees the transactions below it, except those that the goal does not see.
create or replace function etl._slice_end(procedure etl.procedures, since text, goal text, slice_width numeric) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_width numeric := coalesce(slice_width,
    case jsonb_typeof(procedure.max_window) when 'string' then extract(epoch from (procedure.max_window #>> '{}')::interval) * 1000
                                            else (procedure.max_window #>> '{}')::numeric end);
  v_next  text := etl._next_value(procedure, since);
  v_end   text;
  v_xip   xid8[];
begin
  if v_next is null then return goal; end if;
  case procedure.watermark_strategy
    when 'timestamp' then v_end := to_jsonb(v_next::timestamptz + v_width::float8 * interval '1 ms') #>> '{}';
    when 'id' then v_end := trunc(v_next::numeric + v_width);
    when 'xid' then
      v_end := trunc(v_next::numeric + v_width);
      if v_end::numeric >= pg_snapshot_xmax(goal::pg_snapshot)::text::numeric then return goal; end if;
      v_xip := array(select x from pg_snapshot_xip(goal::pg_snapshot) x where x < v_end::xid8 order by x);
      return format('%s:%s:%s', coalesce(v_xip[1]::text, v_end), v_end, array_to_string(v_xip, ','));
  end case;
  return case when etl._is_after(procedure.watermark_strategy, goal, v_end) then v_end else goal end;
end $$;
comment on function etl._slice_end(etl.procedures, text, text, numeric) is 'Exclusive end of the next slice of a window that ends at goal.';
revoke all on function etl._slice_end(etl.procedures, text, text, numeric) from public;

-- After a committed slice, or after one that ran out of a resource: the next attempt of the step. By index, as in etl._advance_watermark.
create or replace function etl._add_slice(step etl.procedure_runs, since text, slice_index int) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off as $$
begin
  insert into etl.procedure_runs (run_id, order_index, attempt, scope_index, procedure_id, procedure_name, procedure_type, group_name, mode,
    tx_scope, isolation, parameters, dependencies, statement, rows_column, lock_key, settings, watermark_strategy, state_key, window_since,
    window_goal, slice_index, definition)
  values (step.run_id, step.order_index, step.attempt + 1, step.scope_index, step.procedure_id, step.procedure_name, step.procedure_type,
    step.group_name, step.mode, step.tx_scope, step.isolation, step.parameters, step.dependencies, step.statement, step.rows_column,
    step.lock_key, step.settings, step.watermark_strategy, step.state_key, since, coalesce(step.window_goal, step.window_until), _add_slice.slice_index,
    step.definition);
  update etl.run_scopes s set attempt = step.attempt + 1 where s.run_id = step.run_id and s.scope_index = step.scope_index;
end $$;
comment on function etl._add_slice(etl.procedure_runs, text, int) is 'Plans the next slice of a step; where it ends is settled when it is claimed.';
revoke all on function etl._add_slice(etl.procedure_runs, text, int) from public;

-- Halves what a slice reads, down to one unit.
create or replace function etl._halve_slice(scope etl.run_scopes, failure jsonb) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_step      etl.procedure_runs;
  v_procedure etl.procedures;
  v_next      text;
  v_width     numeric;
begin
  if failure->>'class' <> 'resource' or scope.first_order_index < scope.last_order_index then return false; end if;
  select * into strict v_step from etl.procedure_runs p
   where p.run_id = scope.run_id and p.order_index = scope.first_order_index and p.attempt = scope.attempt;
  select * into strict v_procedure from etl.procedures p where p.procedure_id = v_step.procedure_id;
  if v_step.mode <> 'incremental' or v_step.state_key is null or v_procedure.max_window is null then return false; end if;
  v_next := etl._next_value(v_procedure, v_step.window_since);
  v_width := case v_step.watermark_strategy
    when 'timestamp' then extract(epoch from v_step.window_until::timestamptz - v_next::timestamptz) * 1000
    when 'id' then v_step.window_until::numeric - v_next::numeric
    else pg_snapshot_xmax(v_step.window_until::pg_snapshot)::text::numeric - v_next::numeric end / 2;
  if v_width is null or v_width < 1 then return false; end if;
  update etl.run_scopes s set slice_width = v_width where s.run_id = scope.run_id and s.scope_index = scope.scope_index;
  perform etl._add_slice(v_step, v_step.window_since, v_step.slice_index);
  return true;
end $$;
comment on function etl._halve_slice(etl.run_scopes, jsonb) is
  'When a step ran out of a resource and has a max_window: plans it again with half of what it read. False when that cannot help.';
revoke all on function etl._halve_slice(etl.run_scopes, jsonb) from public;
