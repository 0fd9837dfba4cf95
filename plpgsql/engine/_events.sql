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
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return concat_ws(' ',
    case when event ? 'order_index' then format('[%s]', event->>'order_index') end,
    coalesce(event->>'procedure', event->>'mv_name', format('run %s', event->>'run_id')),
    regexp_replace(event->>'event', '^(step|refresh|run)_', ''),
    case when event->>'rows_affected' is not null then format('%s %s', event->>'rows_affected', case event->>'rows_affected' when '1' then 'row' else 'rows' end) end,
    case when event->>'duration_ms' is not null then format('in %s ms', round((event->>'duration_ms')::numeric)) end,
    case when event->>'warning' is not null then format('(%s)', event->>'warning') end)
    || coalesce(': ' || (event->>'error_message'), '');
end $$;
comment on function etl._event_text(jsonb) is 'An event as one line for people.';
revoke all on function etl._event_text(jsonb) from public;

create or replace function etl._announce(events jsonb) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_event jsonb;
  v_json  boolean := coalesce(current_setting('b2s.progress', true), '') = 'json';
begin
  for v_event in select e from jsonb_array_elements(events) e loop
    if v_json then
      raise notice using errcode = 'PT200', message = etl._event_text(v_event), detail = v_event::text;
    elsif v_event->>'event' ~ 'failed|retrying|cancelled' or v_event ? 'warning' then
      raise warning '%', etl._event_text(v_event);
    else
      raise notice '%', etl._event_text(v_event);
    end if;
    -- A payload has 8000 bytes; what has no bound of its own is in the run's tables.
    perform pg_notify('etl', (v_event - array['error_message', 'table_counts', 'warning'])::text);
  end loop;
end $$;
comment on function etl._announce(jsonb) is 'Tells clients and listeners about events of a run.';
revoke all on function etl._announce(jsonb) from public;
