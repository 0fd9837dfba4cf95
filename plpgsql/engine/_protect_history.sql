-- Ended runs and attempts, and everything append-only, cannot be changed or deleted by any role, the owner included. What has
-- been kept for long enough is deleted by the role etl_retention, which only etl.purge can act as (engine/_purge.sql): no
-- setting, lock or row that somebody could make opens that door, and no role is a member of it. Who administers it, and so could
-- become it, finds it shut as well: it opens to the functions of that role and not to the role.
create or replace function etl._refuse_change() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform etl._fail('PT409', 'history.immutable',
    format('%s refused: what etl.%s says has ended and cannot be changed', tg_op, tg_table_name),
    'history is kept as it happened; to correct data, start another run',
    jsonb_build_object('table', 'etl.' || tg_table_name));
end $$;
comment on function etl._refuse_change() is 'Trigger: refuses to change history. Raises PT409 history.immutable.';
revoke all on function etl._refuse_change() from public;

-- The invariants of an attempt, by name. In a trigger because that costs a third of what check constraints do, or of a
-- condition of the trigger that says as much: the server parses those anew for every update (migrations/0002_runtime.sql).
create or replace function etl._guard_attempt() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_broken text := case
    when (new.ended_at is null) <> (new.status in ('pending', 'running')) then 'an_ended_attempt_has_an_end'
    when new.status in ('failed', 'retrying') and new.error_code is null then 'a_failed_attempt_says_why'
    when (new.status = 'skipped') <> (new.skip_reason is not null) then 'a_skipped_attempt_says_why' end;
begin
  if old.ended_at is not null then
    perform etl._fail('PT409', 'history.immutable', 'UPDATE refused: what etl.procedure_runs says has ended and cannot be changed',
      'history is kept as it happened; to correct data, start another run', '{"table": "etl.procedure_runs"}');
  elsif v_broken is not null then
    raise exception using errcode = 'check_violation', schema = 'etl', table = 'procedure_runs', constraint = v_broken,
      message = format('new row for table etl.procedure_runs violates %s', v_broken);
  end if;
  return new;
end $$;
comment on function etl._guard_attempt() is
  'Trigger: an ended attempt cannot be changed (PT409 history.immutable), and an attempt is consistent in itself (23514).';
revoke all on function etl._guard_attempt() from public;

create or replace trigger an_ended_run_is_immutable before update on etl.runs
  for each row when (old.ended_at is not null) execute function etl._refuse_change();
create or replace trigger an_ended_run_is_not_deleted before delete on etl.runs
  for each row when (old.ended_at is not null and (current_user <> 'etl_retention' or 'etl_retention' in (session_user, current_setting('role')))) execute function etl._refuse_change();
create or replace trigger an_ended_attempt_is_immutable before update on etl.procedure_runs
  for each row execute function etl._guard_attempt();
create or replace trigger an_attempt_is_not_deleted before delete on etl.procedure_runs
  for each row when (old.ended_at is not null and (current_user <> 'etl_retention' or 'etl_retention' in (session_user, current_setting('role')))) execute function etl._refuse_change();
create or replace trigger an_ended_refresh_is_immutable before update on etl.mv_refreshes
  for each row when (old.ended_at is not null) execute function etl._refuse_change();
create or replace trigger an_ended_refresh_is_not_deleted before delete on etl.mv_refreshes
  for each row when (old.ended_at is not null and (current_user <> 'etl_retention' or 'etl_retention' in (session_user, current_setting('role')))) execute function etl._refuse_change();
create or replace trigger config_versions_are_append_only before update or delete on etl.config_versions
  for each row execute function etl._refuse_change();
create or replace trigger state_history_is_append_only before update on etl.state_history
  for each row execute function etl._refuse_change();
create or replace trigger state_history_is_not_deleted before delete on etl.state_history
  for each row when (current_user <> 'etl_retention' or 'etl_retention' in (session_user, current_setting('role'))) execute function etl._refuse_change();
create or replace trigger step_logs_are_append_only before update or delete on etl.step_logs
  for each row execute function etl._refuse_change();
create or replace trigger freezes_are_append_only before update or delete on etl.full_refresh_freezes
  for each row execute function etl._refuse_change();
create or replace trigger approvals_are_append_only before update or delete on etl.approvals
  for each row execute function etl._refuse_change();

create or replace trigger runs_are_not_truncated before truncate on etl.runs execute function etl._refuse_change();
create or replace trigger attempts_are_not_truncated before truncate on etl.procedure_runs execute function etl._refuse_change();
create or replace trigger refreshes_are_not_truncated before truncate on etl.mv_refreshes execute function etl._refuse_change();
create or replace trigger config_versions_are_not_truncated before truncate on etl.config_versions execute function etl._refuse_change();
create or replace trigger state_history_is_not_truncated before truncate on etl.state_history execute function etl._refuse_change();
create or replace trigger step_logs_are_not_truncated before truncate on etl.step_logs execute function etl._refuse_change();
create or replace trigger freezes_are_not_truncated before truncate on etl.full_refresh_freezes execute function etl._refuse_change();
create or replace trigger approvals_are_not_truncated before truncate on etl.approvals execute function etl._refuse_change();
