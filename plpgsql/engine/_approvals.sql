-- Four eyes: where a pipeline has approvals two_person, a run of mode full needs an admin other than whoever asked for it, who says so in
-- the database. What is compared is the person: the subject that a trusted front end names, else the login. A SET ROLE makes nobody another one.

create or replace function etl._person() returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_subject text := etl._subject();
begin
  if v_subject is null and etl._is_front_end() then
    perform etl._fail('PT403', 'approval.anonymous', format('%s does not say who asks, and this pipeline wants two persons', session_user),
      'the token needs a claim sub, and the front end has to pass it in request.jwt.claims');
  end if;
  return coalesce(v_subject, session_user);
end $$;
comment on function etl._person() is 'Who this session acts for. Raises PT403 approval.anonymous when a front end does not say.';
revoke all on function etl._person() from public;

create or replace function etl._needs_approval(pipeline_id int, request jsonb) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(request->>'mode' = 'full', false) and (select p.approvals = 'two_person' from etl.pipelines p where p.pipeline_id = _needs_approval.pipeline_id)
$$;
comment on function etl._needs_approval(int, jsonb) is 'Whether a request for this pipeline needs two persons.';
revoke all on function etl._needs_approval(int, jsonb) from public;
grant execute on function etl._needs_approval(int, jsonb) to etl_reader;

create or replace function etl._awaits_approval(run etl.runs) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return run.status = 'queued' and run.approved_by is null and etl._needs_approval(run.pipeline_id, run.request);
end $$;
comment on function etl._awaits_approval(etl.runs) is 'Whether a queued run waits for its second person.';
revoke all on function etl._awaits_approval(etl.runs) from public;
grant execute on function etl._awaits_approval(etl.runs) to etl_reader;

-- A run that resumes another one does what was approved for that one.
create or replace function etl._approver(run etl.runs, person text) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive line(run_id, parent_run_id) as (
    select run.run_id, run.parent_run_id
    union all
    select r.run_id, r.parent_run_id from line l join etl.runs r on r.run_id = l.parent_run_id
  )
  select a.approved_by from line join etl.approvals a using (run_id)
   where a.person <> _approver.person and a.fingerprint = run.fingerprint
     and coalesce(a.approved_by = run.request->>'approved_by', true)
     and etl._is_admin(a.approver_role)
   order by a.approval_id desc limit 1
$$;
comment on function etl._approver(etl.runs, text) is
  'Who approved a run, or one that it resumes: another person than the one given, and still an admin. Null: nobody.';
revoke all on function etl._approver(etl.runs, text) from public;

create or replace function etl._fail_unapproved(run_id bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._fail('PT403', 'approval.required', 'a full refresh of this pipeline needs the approval of another admin',
    case when run_id is null then 'submit it: select * from etl.submit_run(...) with the same arguments; another admin: select etl.approve_run(run_id); then call etl.work(run_id => ...)'
         else format('let another admin run: select etl.approve_run(%s)', run_id) end, jsonb_strip_nulls(jsonb_build_object('run_id', run_id)));
end $$;
comment on function etl._fail_unapproved(bigint) is 'Raises PT403 approval.required. run_id: the run that is to be approved, if there is one.';
revoke all on function etl._fail_unapproved(bigint) from public;

-- What can be told of a request when it is queued.
create or replace function etl._check_requester(request jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if request->>'approved_by' in (etl._person(), etl._requester()) then
    perform etl._fail('PT403', 'approval.own_request', format('%s asks for a full refresh and cannot approve it too', request->>'approved_by'),
      'name another admin in approved_by, or leave it out: any other may approve');
  end if;
end $$;
comment on function etl._check_requester(jsonb) is 'Raises PT403 approval.own_request or approval.anonymous for a request that needs two persons.';
revoke all on function etl._check_requester(jsonb) from public;
