-- The same request as etl.start_run, left for a worker: what a program calls that must not wait.
create or replace function etl._submit(request jsonb) returns table (run_id bigint, status text, is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run  etl.runs;
  v_plan record;
begin
  perform etl._check_request(request);
  v_run := etl._known_run(request);
  -- The status of the response, when it is PostgREST that asks.
  perform set_config('response.status', case when v_run.run_id is null then '202' else '200' end, true);
  if v_run.run_id is not null then return query select v_run.run_id, etl._run_status(v_run.run_id), false; return; end if;
  v_plan := etl._plan(request);
  if etl._needs_approval(v_plan.pipeline_id, request) then perform etl._check_requester(request); end if;
  return query select etl._create_run(request, v_plan.pipeline_id, v_plan.max_concurrency, v_plan.items, is_queued => true), 'queued', true;
  perform pg_notify('etl', jsonb_build_object('event', 'run_queued', 'pipeline_id', v_plan.pipeline_id)::text);
end $$;
comment on function etl._submit(jsonb) is 'Stores a planned request as a queued run, or finds the one that has the same idempotency key.';
revoke all on function etl._submit(jsonb) from public;
grant execute on function etl._submit(jsonb) to etl_operator;

create or replace function etl.submit_run(
  mode text default null, procedures text[] default null, groups text[] default null, tags text[] default null,
  with_upstream boolean default false, with_downstream boolean default false,
  as_of timestamptz default null, params jsonb default null,
  transaction_scope text default null, mv_refresh jsonb default null,
  idempotency_key text default null, confirm_full_refresh boolean default false, approved_by text default null, reason text default null,
  max_concurrency int default null, pipeline text default null)
returns table (run_id bigint, status text, is_new boolean)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select * from etl._submit(etl._request(mode, procedures, groups, tags, with_upstream, with_downstream, as_of, params, transaction_scope,
    mv_refresh, idempotency_key, confirm_full_refresh, approved_by, reason, max_concurrency, pipeline))
$$;
comment on function etl.submit_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) is
  'Queues the request that etl.start_run with the same arguments would run; a worker (etl.work, b2s worker) takes it up, first come, first served. '
  'Returns run_id, status and is_new (false: the idempotency key was known). Checked now, and planned again when it starts. A full refresh of a pipeline with approvals two_person waits for etl.approve_run. Raises what etl.start_run raises.';
revoke all on function etl.submit_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) from public;
grant execute on function etl.submit_run(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) to etl_operator;
