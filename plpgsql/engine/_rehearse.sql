-- dry_run => 'execute': the engine's own helpers run every scope in one transaction that is rolled back, so that later
-- steps see what earlier ones wrote and the row counts are true. Isolation levels are the caller's; nothing is waited for.
create or replace function etl._rehearse(request jsonb, out steps etl.procedure_runs[], out refreshes etl.mv_refreshes[])
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_plan   record;
  v_run_id bigint;
  v_next   etl.run_scopes;
  v_result jsonb;
  v_done   record;
  v_seen   bigint[] := etl._change_baseline();
begin
  perform etl._check_request(request);
  v_plan := etl._plan(request);
  perform etl._check_nothing_deferred('etl.start_run');
  begin
    -- What the helpers announce is about to be undone.
    perform set_config('client_min_messages', 'error', true);
    perform etl._acquire(v_plan.pipeline_id);
    v_run_id := etl._create_run(request - 'idempotency_key', v_plan.pipeline_id, v_plan.max_concurrency, v_plan.items);
    update etl.procedure_runs p set settings = coalesce(p.settings, '{}') || '{"is_rehearsed": true}' where p.run_id = v_run_id;
    loop
      v_next := etl._claim(v_run_id, v_result, v_next.required_by <> '{}' or v_next.precedes <> '{}');
      exit when v_next.scope_index is null;
      if v_next.kind = 'refresh' then v_result := etl._execute_refresh(v_run_id, v_next.scope_index);
      else
        v_done := etl._execute_scope(v_run_id, v_next.first_order_index, v_next.last_order_index, v_seen);
        v_result := v_done.result; v_seen := v_done.seen;
      end if;
      if v_result ? 'failure' then perform etl._record_failure(v_run_id, v_next.scope_index, v_result->'failure'); end if;
      if v_result ? 'failure' then v_seen := etl._change_baseline(); v_result := null; v_next := null; end if;
    end loop;
    select array_agg(p order by p.order_index, p.attempt) into steps from etl.procedure_runs p where p.run_id = v_run_id;
    select array_agg(m order by m.scope_index) into refreshes from etl.mv_refreshes m where m.run_id = v_run_id;
    raise exception using errcode = 'PT200', message = 'rehearsal over';
  exception when sqlstate 'PT200' then
    null;
  end;
end $$;
comment on function etl._rehearse(jsonb) is 'Runs a request and rolls everything back; returns what would have been recorded.';
revoke all on function etl._rehearse(jsonb) from public;
grant execute on function etl._rehearse(jsonb) to etl_operator;
