-- A line in the log of a run, from within a routine.
--
-- The routine need not know which run and step it works for: the engine has set that for this transaction. Its client sees the
-- line at once; in etl.step_logs it is when the step has ended, rolled back or not (engine/_logs.sql). A routine must not fail
-- because it has something to say: an unknown level is info, and outside of a step the client alone is told.
create or replace function etl.log(level text, message text, data jsonb default null) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_step  text[] := string_to_array(substring(current_setting('b2s.step', true) from '^[0-9]{1,18} [0-9]{1,9} [0-9]{1,9} .+$'), ' ');
  v_lines int := coalesce(substring(current_setting('b2s.log_lines', true) from '^[0-9]{1,4}$')::int, 0) + 1;
  v_level text := case when lower(level) in ('warning', 'warn') then 'warning' when lower(level) in ('error', 'critical', 'fatal') then 'error'
                       when lower(level) like 'debug%' then 'debug' else 'info' end;
  v_line  jsonb;
begin
  v_line := jsonb_strip_nulls(jsonb_build_object('event', 'log', 'run_id', v_step[1]::bigint, 'order_index', v_step[2]::int, 'attempt', v_step[3]::int,
    'procedure', v_step[4], 'level', v_level, 'message', coalesce(message, ''), 'data', data));
  perform etl._announce(v_line);
  if v_step is null then return; end if;
  execute format('prepare b2s_log_%s as select %L', nextval('etl.log_ids'),
    encode(convert_to((v_line || jsonb_build_object('at', clock_timestamp()))::text, 'UTF8'), 'base64'));
  perform set_config('b2s.log_lines', v_lines::text, true);
  if v_lines >= 1000 then perform etl._keep_or_forget_logs(v_step[1]::bigint, v_step[2]::int, v_step[3]::int); end if;
end $$;
comment on function etl.log(text, text, jsonb) is
  'Writes a line into the log of the step that calls it: etl.step_logs, b2s logs. level: debug, info, warning or error. It is kept when the step is rolled '
  'back too; of more than a thousand lines the last ones. Outside of a step only the client is told.';
revoke all on function etl.log(text, text, jsonb) from public;
grant execute on function etl.log(text, text, jsonb) to etl_reader;
