-- Moves a watermark by hand: back, to read a range again; forward, to leave one out; to null, to begin anew.
--
-- A step of that watermark that is under way fails with watermark.moved, and nothing of it stays.
create or replace function etl._watermark_value(strategy text, value text, bound text) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_value text;
begin
  if value = 'now' then return bound; end if;
  begin
    v_value := case strategy when 'timestamp' then to_jsonb(value::timestamptz) #>> '{}' when 'id' then value::bigint::text else value::pg_snapshot::text end;
  exception when data_exception then
    perform etl._fail('PT422', 'watermark.invalid', format('%L is not a watermark of the %s strategy: %s', value, strategy, sqlerrm),
      case strategy when 'timestamp' then 'a time with its zone, such as 2026-01-31 00:00:00+00; now; or null'
                    when 'id' then 'a whole number, the first id to read; now; or null' else 'a pg_snapshot, from etl.state_history; now; or null' end);
  end;
  if etl._is_after(strategy, v_value, bound) then
    perform etl._fail('PT422', 'watermark.ahead', format('%s lies beyond what is safe to read now, %s: rows that are being written would be left out', v_value, bound),
      'give an earlier value; now means the latest that is safe');
  end if;
  return v_value;
end $$;
comment on function etl._watermark_value(text, text, text) is
  'A watermark given by a person in its canonical form. Raises PT422 watermark.invalid, or watermark.ahead when it lies beyond the bound given.';
revoke all on function etl._watermark_value(text, text, text) from public;

create or replace function etl.set_watermark(state_key text, value text, reason text) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_procedure  etl.procedures;
  v_state      etl.state;
  v_value      text;
begin
  select * into v_procedure from etl.procedures p where p.state_key = set_watermark.state_key and p.is_active order by p.procedure_id limit 1;
  if not found then
    perform etl._fail('PT404', 'watermark.unknown', format('no active procedure keeps its watermark under %s', state_key),
      'which there are: select state_key, procedures from etl.watermarks');
  elsif coalesce(btrim(reason), '') = '' then
    perform etl._fail('PT422', 'watermark.no_reason', format('moving the watermark of %s by hand needs a reason', state_key),
      'add reason => ''...''; it is kept in etl.state_history');
  end if;
  if value is not null then
    v_value := etl._watermark_value(v_procedure.watermark_strategy, value,
      (etl._upper_bound(v_procedure.watermark_strategy, set_watermark.state_key, v_procedure.watermark_sources, v_procedure.delay_ms, 1000)).bound);
  end if;
  insert into etl.state (state_key, strategy) values (set_watermark.state_key, v_procedure.watermark_strategy) on conflict do nothing;
  select * into v_state from etl.state s where s.state_key = set_watermark.state_key for update;
  update etl.state s
     set last_success_watermark = v_value, strategy = v_procedure.watermark_strategy, fence = null,
         server_id = case when v_procedure.watermark_strategy = 'xid' then (select c.system_identifier from pg_catalog.pg_control_system() c) end,
         procedure_ids = case when v_value is null then '{}' else array(select p.procedure_id from etl.procedures p where p.state_key = s.state_key and p.is_active) end
   where s.state_key = set_watermark.state_key;
  insert into etl.state_history (state_key, old_watermark, new_watermark, cause, reason, changed_by, session_user_name, application_name)
  values (set_watermark.state_key, v_state.last_success_watermark, v_value, 'set', set_watermark.reason, etl._requester(),
          session_user, current_setting('application_name'));
  return v_value;
end $$;
comment on function etl.set_watermark(text, text, text) is
  'Moves a watermark by hand and returns it. value: a timestamptz, bigint or pg_snapshot by strategy; now, the latest that is safe; null, to read from the beginning. '
  'Kept with its reason in etl.state_history. Raises PT404 watermark.unknown, PT422 watermark.invalid, watermark.ahead or watermark.no_reason.';
revoke all on function etl.set_watermark(text, text, text) from public;
grant execute on function etl.set_watermark(text, text, text) to etl_admin;
