-- What a run says while it goes: one line for people; the same as JSON in DETAIL for clients that ask for it
-- (set b2s.progress = 'json'), and on the channel etl for whoever listens.
create or replace function etl._step_event(event text, step etl.procedure_runs, more jsonb default '{}') returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return jsonb_build_object('event', event, 'run_id', step.run_id, 'order_index', step.order_index, 'procedure', step.procedure_name,
                            'mode', step.mode, 'tx_scope', step.tx_scope, 'attempt', step.attempt) || more;
end $$;
comment on function etl._step_event(text, etl.procedure_runs, jsonb) is 'An event of a step as jsonb.';
revoke all on function etl._step_event(text, etl.procedure_runs, jsonb) from public;

create or replace function etl._event_text(event jsonb) returns text
language plpgsql stable as $$
begin
  if event->>'event' = 'log' then
    return case when event ? 'procedure' then format('[%s] %s: ', event->>'order_index', event->>'procedure') else '' end || (event->>'message');
  end if;
  if event->>'event' = 'step_succeeded' and not event ?| array['warning', 'slice_index'] then
    return format('[%s] %s succeeded %s in %s ms', event->>'order_index', event->>'procedure',
      case event->>'rows_affected' when '1' then '1 row' else (event->>'rows_affected') || ' rows' end, round((event->>'duration_ms')::numeric));
  end if;
  return concat_ws(' ',
    '[' || (event->>'order_index') || ']',
    coalesce(event->>'procedure', event->>'mv_name', 'run ' || (event->>'run_id')),
    regexp_replace(event->>'event', '^(step|refresh|run)_', ''),
    case event->>'rows_affected' when '1' then '1 row' else (event->>'rows_affected') || ' rows' end,
    'in ' || round((event->>'duration_ms')::numeric) || ' ms',
    'slice ' || (event->>'slice_index') || ', up to ' || left(event->>'window_until', 40),
    '(' || (event->>'warning') || ')')
    || coalesce(': ' || (event->>'error_message'), '');
end $$;
comment on function etl._event_text(jsonb) is 'An event as one line for people.';
revoke all on function etl._event_text(jsonb) from public;

-- An expression, as it is called for each step: the server takes 7 us to begin a statement, PERFORM too.
create or replace function etl._announce(event jsonb) returns boolean
language plpgsql volatile as $$
declare
  v_text  text := etl._event_text(event);
  v_level text := event->>'level';
begin
  begin
    if v_level = 'debug' then
      raise debug using errcode = 'PT200', message = v_text, detail = event::text;
    elsif current_setting('b2s.progress', true) = 'json' then
      raise notice using errcode = 'PT200', message = v_text, detail = event::text;
    elsif event->>'event' = 'step_succeeded' and not event ? 'warning' then
      raise notice '%', v_text;
    elsif v_level in ('warning', 'error') or event->>'event' ~ 'failed|retrying|cancelled' or event ? 'warning' then
      raise warning '%', v_text;
    else
      raise notice '%', v_text;
    end if;
  exception when untranslatable_character then
    -- The client's encoding lacks a character: that must not end the run. The context that is sent along may have one too.
    begin
      raise notice '%', regexp_replace(v_text, '[^ -~]', '?', 'g');
    exception when untranslatable_character then
      null;
    end;
  end;
  if v_level is not null then return true; end if;
  -- A payload has 8000 bytes; what has no bound of its own is in the run's tables.
  event := event - array['error_message', 'table_counts', 'warning', 'relations'];
  if octet_length(event->>'error_code') > 200 then event := event || jsonb_build_object('error_code', left(event->>'error_code', 50)); end if;
  v_text := pg_notify('etl', event::text);
  return true;
end $$;
comment on function etl._announce(jsonb) is 'Tells clients and listeners about an event of a run; of a line that a routine logs (it has a level) the client of this session only.';
revoke all on function etl._announce(jsonb) from public;
