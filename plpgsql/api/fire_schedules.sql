-- The clock's one question: what is due now? Asked by pg_cron, by b2s worker --schedule, by both, once a minute or more often:
-- when a schedule is due is computed here, so a tick that is early, late, doubled or left out changes nothing but the delay.
create or replace function etl.fire_schedules()
returns table (pipeline text, schedule text, slot_at timestamptz, outcome text, run_id bigint, passed_over_count int, reason text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_slot etl.schedule_slots;
begin
  -- Not a join: with nothing to join to, the server would not ask what is due.
  for v_slot in select * from etl._fire_schedules(clock_timestamp()) loop
    return query
      select l.name, s.name, v_slot.slot_at, v_slot.outcome, v_slot.run_id, v_slot.passed_over_count, v_slot.reason
        from etl.schedules s join etl.pipelines l using (pipeline_id) where s.schedule_id = v_slot.schedule_id;
  end loop;
end $$;
comment on function etl.fire_schedules() is
  'Queues the runs of all schedules that are due, each slot once, and returns what became of each: submitted, skipped, missed or failed, with the reason. '
  'For a clock: once a minute, or more often. etl.work executes what is queued.';
revoke all on function etl.fire_schedules() from public;
grant execute on function etl.fire_schedules() to etl_operator;
