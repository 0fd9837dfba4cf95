-- A request as one jsonb document: what was asked for, defaults left out, so that equal requests have equal
-- fingerprints, in whatever time zone they are made.
create or replace function etl._request(
  mode text, procedures text[], groups text[], tags text[], with_upstream boolean, with_downstream boolean, as_of timestamptz,
  params jsonb, transaction_scope text, mv_refresh jsonb, idempotency_key text, confirm_full_refresh boolean, approved_by text,
  reason text, max_concurrency int, pipeline text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp set timezone = 'UTC' as $$
  select jsonb_strip_nulls(jsonb_build_object('mode', mode, 'procedures', procedures, 'groups', groups, 'tags', tags,
      'with_upstream', nullif(with_upstream, false), 'with_downstream', nullif(with_downstream, false), 'as_of', as_of,
      'transaction_scope', transaction_scope, 'mv_refresh', mv_refresh, 'idempotency_key', idempotency_key,
      'confirm_full_refresh', nullif(confirm_full_refresh, false), 'approved_by', approved_by, 'reason', reason,
      'max_concurrency', max_concurrency, 'pipeline', pipeline))
    || case when params is null or params = '{}' then '{}' else jsonb_build_object('params', params) end
$$;
comment on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) is
  'The arguments of etl.start_run as one jsonb request.';
revoke all on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) from public;
grant execute on function etl._request(text, text[], text[], text[], boolean, boolean, timestamptz, jsonb, text, jsonb, text, boolean, text, text, int, text) to etl_reader;

create or replace function etl._run_status(run_id bigint) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select r.status from etl.runs r where r.run_id = _run_status.run_id
$$;
comment on function etl._run_status(bigint) is 'The status of a run.';
revoke all on function etl._run_status(bigint) from public;
grant execute on function etl._run_status(bigint) to etl_operator;
