-- The second person of a full refresh, where a pipeline has approvals two_person.
create or replace function etl.approve_run(run_id bigint, reason text default null) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_run    etl.runs;
  v_person text := etl._person();
begin
  select * into v_run from etl.runs r where r.run_id = approve_run.run_id for update;
  if not found then
    perform etl._fail('PT404', 'run.unknown', format('there is no run %s', run_id), 'which there are: select * from etl.run_history');
  elsif not etl._needs_approval(v_run.pipeline_id, v_run.request) then
    perform etl._fail('PT409', 'approval.not_needed', format('run %s needs no approval', run_id), 'only runs of mode full do, of pipelines with approvals: two_person');
  elsif v_run.status not in ('queued', 'failed', 'cancelled', 'abandoned') then
    perform etl._fail('PT409', 'approval.too_late', format('run %s is %s', run_id, v_run.status), 'what is queued, or is to be resumed, can be approved',
      jsonb_build_object('status', v_run.status));
  elsif v_person = coalesce(v_run.subject, v_run.session_user_name) then
    perform etl._fail('PT403', 'approval.own_request', format('%s asked for run %s and cannot approve it too', v_person, run_id), 'let another admin approve it');
  elsif v_run.request->>'approved_by' <> etl._requester() then
    perform etl._fail('PT403', 'approval.other_approver', format('run %s names %s as who approves it, not %s', run_id, v_run.request->>'approved_by', etl._requester()),
      'let them approve it, or ask again without approved_by');
  end if;
  insert into etl.approvals (run_id, fingerprint, approved_by, approver_role, person, reason)
  values (v_run.run_id, v_run.fingerprint, etl._requester(), etl._requesting_role(), v_person, approve_run.reason)
  on conflict on constraint a_person_approves_a_run_once do nothing;
  if v_run.status <> 'queued' then return format('run %s may be resumed', run_id); end if;
  update etl.runs r set approved_by = etl._requester() where r.run_id = v_run.run_id;
  perform pg_notify('etl', jsonb_build_object('event', 'run_approved', 'run_id', run_id, 'pipeline_id', v_run.pipeline_id)::text);
  return format('run %s is approved; a worker takes it up', run_id);
end $$;
comment on function etl.approve_run(bigint, text) is
  'Approves a run of mode full that somebody else has queued, or that is to be resumed, in a pipeline with approvals two_person. Admins only. '
  'Raises PT404 run.unknown, PT403 approval.own_request, approval.other_approver or approval.anonymous, PT409 approval.not_needed or approval.too_late.';
revoke all on function etl.approve_run(bigint, text) from public;
grant execute on function etl.approve_run(bigint, text) to etl_admin;
