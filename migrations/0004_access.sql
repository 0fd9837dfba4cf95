-- Who asked, who approved, and from where.

alter table etl.pipelines add column approvals text not null default 'none';
alter table etl.pipelines add constraint approvals_is_none_or_two_person check (approvals in ('none', 'two_person'));
comment on column etl.pipelines.approvals is
  'two_person: a run of mode full starts only when an admin other than whoever asked for it has approved it. Else: none.';

alter table etl.runs add column requested_role text, add column subject text;
alter table etl.runs alter column requested_role
  set default coalesce(nullif(pg_catalog.current_setting('role'), 'none'), session_user);
comment on column etl.runs.requested_by is
  'Who asked: the subject that a trusted front end names, else the SET ROLE in force, else the login.';
comment on column etl.runs.requested_role is 'The role whose rights the request has: the SET ROLE in force, else the login.';
comment on column etl.runs.subject is
  'The claim sub of whoever asked through a trusted front end (a member of etl_frontend); null for everybody else.';
comment on column etl.runs.session_user_name is 'The login of the session that asked.';
comment on column etl.runs.application_name is 'The client that asked, as it named itself.';
comment on column etl.runs.approved_by is
  'Who approved a full refresh. With approvals two_person an admin who did so in the database (etl.approvals), else as the request says.';

create table etl.approvals (
  approval_id       bigint generated always as identity primary key,
  run_id            bigint not null references etl.runs,
  fingerprint       text not null,
  approved_by       text not null,
  approver_role     text not null,
  person            text not null,
  reason            text,
  session_user_name text not null default session_user,
  application_name  text not null default pg_catalog.current_setting('application_name'),
  approved_at       timestamptz not null default clock_timestamp(),
  constraint a_person_approves_a_run_once unique (run_id, person)
);
comment on table etl.approvals is
  'Who approved which run of mode full, for pipelines with approvals two_person. Append-only. Source: etl.approve_run.';
comment on column etl.approvals.fingerprint is 'Digest of the request that was approved, as in etl.runs.';
comment on column etl.approvals.approver_role is 'The role in force then; it must still be an admin when the run starts.';
comment on column etl.approvals.person is 'The subject that a trusted front end names, else the login: it must differ from that of whoever asked.';

alter table etl.config_versions add column requested_by text, add column application_name text;
alter table etl.config_versions alter column application_name set default pg_catalog.current_setting('application_name');
comment on column etl.config_versions.applied_by is 'The login of the session that applied it.';
comment on column etl.config_versions.requested_by is
  'Who applied it: the subject that a trusted front end names, else the SET ROLE in force, else the login.';
comment on column etl.config_versions.application_name is 'The client that applied it, as it named itself.';

alter table etl.full_refresh_freezes add column session_user_name text, add column application_name text;
alter table etl.full_refresh_freezes alter column session_user_name set default session_user;
alter table etl.full_refresh_freezes alter column application_name set default pg_catalog.current_setting('application_name');
comment on column etl.full_refresh_freezes.session_user_name is 'The login of the session that changed it.';
comment on column etl.full_refresh_freezes.application_name is 'The client that changed it, as it named itself.';

alter table etl.state_history add column session_user_name text, add column application_name text;
comment on column etl.state_history.session_user_name is 'For a move by hand: the login of the session. For the others see the run.';
comment on column etl.state_history.application_name is 'For a move by hand: the client, as it named itself. For the others see the run.';
