-- Runs for programs, newest first, a page at a time: the next page begins before the last run of this one, however many have come since.
create or replace function etl.list_runs(
  pipeline text default null, status text[] default null, kind text default null, procedure text default null, requested_by text default null,
  since timestamptz default null, until timestamptz default null, before bigint default null, page_size int default 50) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline_id int := case when pipeline is not null then (etl._pipeline(pipeline)).pipeline_id end;
  v_unknown     text := (select string_agg(s, ', ') from unnest(status) s
                          where s not in ('queued', 'running', 'succeeded', 'completed_with_warnings', 'failed', 'cancelled', 'abandoned'));
  v_ids         bigint[];
begin
  if page_size is null or page_size not between 1 and 500 then
    perform etl._fail('PT422', 'request.invalid', 'page_size is 1 to 500', 'leave it out for 50');
  elsif v_unknown is not null then
    perform etl._fail('PT422', 'request.invalid', format('there is no status %s', v_unknown),
      'queued, running, succeeded, completed_with_warnings, failed, cancelled or abandoned');
  elsif kind not in ('run', 'backfill') then
    perform etl._fail('PT422', 'request.invalid', format('kind is run or backfill, not %s', kind), 'leave it out for both');
  end if;
  v_ids := array(
    select r.run_id from etl.runs r
     where (v_pipeline_id is null or r.pipeline_id = v_pipeline_id)
       and (list_runs.status is null or r.status = any (list_runs.status))
       and (list_runs.kind is null or r.kind = list_runs.kind)
       and (list_runs.requested_by is null or r.requested_by = list_runs.requested_by)
       and (list_runs.since is null or r.submitted_at >= list_runs.since)
       and (list_runs.until is null or r.submitted_at < list_runs.until)
       and (list_runs.before is null or r.run_id < list_runs.before)
       and (list_runs.procedure is null or exists (
              select from etl.procedure_runs p where p.run_id = r.run_id and p.procedure_name = list_runs.procedure))
     order by r.run_id desc limit page_size + 1);
  return (
    select jsonb_build_object('runs', coalesce(jsonb_agg(to_jsonb(h) order by h.run_id desc), '[]'),
             'next_before', case when cardinality(v_ids) > page_size then v_ids[page_size] end)
      from etl.run_history h where h.run_id = any (v_ids[1:page_size]));
end $$;
comment on function etl.list_runs(text, text[], text, text, text, timestamptz, timestamptz, bigint, int) is
  'Runs and backfills, newest first, as {"runs": [rows of etl.run_history], "next_before"}: those submitted from since on and before until, at most page_size '
  '(1 to 500). before: next_before of the page before this one; it is null after the last page. Raises PT404 pipeline.unknown, PT422 request.invalid.';
revoke all on function etl.list_runs(text, text[], text, text, text, timestamptz, timestamptz, bigint, int) from public;
grant execute on function etl.list_runs(text, text[], text, text, text, timestamptz, timestamptz, bigint, int) to etl_reader;
