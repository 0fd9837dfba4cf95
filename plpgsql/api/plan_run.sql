-- What a request would do, in order, writing nothing. With execute, it is really run and rolled back.
create or replace function etl._plan_notes(dependencies jsonb) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select string_agg(format('needs %s, which is not in this run and %s', d->>'procedure',
           coalesce('last succeeded at ' || (d->>'last_success_at'), 'never succeeded')), '; ')
    from jsonb_array_elements(dependencies) d
   where not (d->>'in_run')::boolean
$$;
comment on function etl._plan_notes(jsonb) is 'How old the dependencies are that a run does not include.';
revoke all on function etl._plan_notes(jsonb) from public;

create or replace function etl._show_plan(request jsonb)
returns table (order_index int, scope_index int, kind text, name text, procedure_type text, group_name text, mode text, tx_scope text,
  isolation text, depends_on text[], window_since text, window_until text, parameters jsonb, statement text, notes text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan     record;
  v_items    etl.plan_item[];
  v_selected int[];
begin
  perform etl._check_request(request);
  v_plan := etl._plan(request);
  v_items := v_plan.items;
  v_selected := (select array_agg(i.procedure_id) from unnest(v_items) i where i.kind = 'steps');
  return query
    select i.order_index, i.scope_index, case i.kind when 'steps' then 'step' else i.kind end, coalesce(p.name, i.mv_name), p.type, g.name,
           i.mode, i.tx_scope, p.isolation,
           case when i.kind = 'steps'
             then (select array_agg(x->>'procedure') from jsonb_array_elements(n.dependencies) x)
             else (select array_agg(q.name order by q.name) from unnest(v_items) s join etl.procedures q using (procedure_id)
                    where s.order_index = any (i.feeders)) end,
           w.since, w.until, i.parameters, etl._render_call(p.call_sql, i.mode, w.since, w.until, null, i.parameters),
           case when i.kind = 'steps' then nullif(concat_ws('; ', etl._plan_notes(n.dependencies), w.notes), '')
                else format('after %s, on %s, %s', i.refresh_after, i.refresh_on,
                       case when i.concurrency <> 'false' and etl._can_refresh_concurrently(etl._relation(i.mv_name)) then 'concurrently'
                            when i.concurrency <> 'false' and etl._can_refresh_concurrently(etl._relation(i.mv_name)) is null then 'which does not exist'
                            else 'readers wait' end) end
      from unnest(v_items) i
      left join etl.procedures p using (procedure_id)
      left join etl.group_members m using (procedure_id)
      left join etl.groups g using (group_id)
      left join etl._dependency_snapshots(v_selected) n using (procedure_id)
      left join lateral etl._preview_window(p, i.mode, (request->>'as_of')::timestamptz) w on true
     where i.kind <> 'barrier'
     order by i.scope_index, i.order_index;
end $$;
comment on function etl._show_plan(jsonb) is 'The plan of a request as rows.';
revoke all on function etl._show_plan(jsonb) from public;
grant execute on function etl._show_plan(jsonb) to etl_reader;

create or replace function etl._preview_window(procedure etl.procedures, mode text, as_of timestamptz, out since text, out until text, out notes text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_window record;
begin
  if procedure.state_key is null then return; end if;
  v_window := etl._window(procedure, mode, as_of, 100);
  since := v_window.since; until := v_window.until;
  notes := concat_ws('; ', 'held back by ' || v_window.held_back_by,
    case when mode = 'incremental' and procedure.max_window is not null and procedure.transaction_scope = 'per_group'
         then 'max_window has no effect in a group that is one transaction'
         when mode = 'incremental' and procedure.max_window is not null then nullif('read in slices, the first one up to ' || etl._slice_end(procedure, since, until, null), 'read in slices, the first one up to ' || until) end,
    case when mode = 'incremental' and procedure.on_empty = 'skip' and not etl._has_rows(procedure, since, until) then 'nothing to read: it is skipped' end,
    etl._upgrade_hint(procedure));
exception when others then
  notes := format('no window: %s', sqlerrm);
end $$;
comment on function etl._preview_window(etl.procedures, text, timestamptz) is 'The window that a step would get if it started now, and what is to be said of it.';
revoke all on function etl._preview_window(etl.procedures, text, timestamptz) from public;

create or replace function etl.plan_run(
  mode text default null, procedures text[] default null, groups text[] default null, tags text[] default null,
  with_upstream boolean default false, with_downstream boolean default false,
  as_of timestamptz default null, params jsonb default null,
  transaction_scope text default null, mv_refresh jsonb default null,
  confirm_full_refresh boolean default false, approved_by text default null, reason text default null,
  max_concurrency int default null, pipeline text default null)
returns table (order_index int, scope_index int, kind text, name text, procedure_type text, group_name text, step_mode text, tx_scope text,
  isolation text, depends_on text[], window_since text, window_until text, parameters jsonb, statement text, notes text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select * from etl._show_plan(etl._request(mode, procedures, groups, tags, with_upstream, with_downstream, as_of, params, transaction_scope,
    mv_refresh, null, confirm_full_refresh, approved_by, reason, max_concurrency, pipeline))
$$;
comment on function etl.plan_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, boolean, text, text, int, text) is
  'What etl.start_run with the same arguments would do, in order: steps and refreshes of materialized views, their scopes, windows as of now, '
  'parameters and statements. Writes nothing. Raises what start_run would raise.';
revoke all on function etl.plan_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, boolean, text, text, int, text) from public;
grant execute on function etl.plan_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, boolean, text, text, int, text) to etl_reader;

-- start_run with dry_run has no rows to return: the plan goes out as notices.
create or replace function etl._report_plan(request jsonb, is_executed boolean) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_rehearsal record;
  v_row       record;
begin
  if is_executed then
    v_rehearsal := etl._rehearse(request);
    for v_row in
      select s.order_index, s.procedure_name as name, s.status, s.rows_affected, s.error_message from unnest(v_rehearsal.steps) s
      union all
      select null, m.mv_name, m.status, null, m.error_message from unnest(v_rehearsal.refreshes) m
    loop
      raise notice '% % %, rolled back%', coalesce('[' || v_row.order_index || ']', 'refresh'), v_row.name,
        coalesce(v_row.status || ' ' || v_row.rows_affected || ' rows', v_row.status), coalesce(': ' || v_row.error_message, '');
    end loop;
    return;
  end if;
  for v_row in select * from etl._show_plan(request) loop
    raise notice '%', concat_ws(' ', coalesce('[' || v_row.order_index || ']', 'refresh'), v_row.name, v_row.mode,
      case when v_row.tx_scope = 'per_group' then format('in group %s', v_row.group_name) end,
      case when v_row.window_until is not null then format('window [%s, %s)', coalesce(v_row.window_since, 'the beginning'), v_row.window_until) end,
      case when v_row.notes is not null then format('(%s)', v_row.notes) end);
  end loop;
end $$;
comment on function etl._report_plan(jsonb, boolean) is 'Shows a plan, or the outcome of a rehearsal, as notices.';
revoke all on function etl._report_plan(jsonb, boolean) from public;
grant execute on function etl._report_plan(jsonb, boolean) to etl_operator;
