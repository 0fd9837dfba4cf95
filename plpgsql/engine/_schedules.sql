-- What becomes of a schedule that is due. Its row is held meanwhile: a second clock passes over it, and the next time finds it decided.

-- Never waits: a session that has noted something and keeps its transaction open stops no other. The lock of the first note is of
-- the row that is not there yet.
create or replace function etl._beat(name text, detail text default null) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from etl.heartbeats h
              where h.name = _beat.name and h.beat_at >= clock_timestamp() - interval '10 seconds' and h.detail is not distinct from _beat.detail) then
    return;
  end if;
  update etl.heartbeats h
     set beat_at = clock_timestamp(), session_user_name = session_user, application_name = current_setting('application_name'), detail = _beat.detail
   where h.name = (select x.name from etl.heartbeats x where x.name = _beat.name for update skip locked);
  if found or exists (select from etl.heartbeats h where h.name = _beat.name) then return; end if;
  if not pg_try_advisory_xact_lock(hashtextextended('b2s heartbeat ' || _beat.name, 0)) then return; end if;
  insert into etl.heartbeats (name, beat_at, session_user_name, application_name, detail)
  values (_beat.name, clock_timestamp(), session_user, current_setting('application_name'), _beat.detail)
  on conflict on constraint heartbeats_pkey do nothing;
end $$;
comment on function etl._beat(text, text) is 'Notes that a clock is alive, unless another session is just noting it.';
revoke all on function etl._beat(text, text) from public;

-- The file is the confirmation of a scheduled full refresh, and says why; who may start one, and the freeze, are seen to by the plan.
create or replace function etl._scheduled_request(schedule etl.schedules, slot_at timestamptz) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select etl._request(d->>'mode', etl._names(d->'procedures'), etl._names(d->'groups'), etl._names(d->'tags'), false, false, null, d->'params',
           null, null, format('schedule %s.%s %s', l.name, schedule.name, to_char(slot_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
           d->>'mode' = 'full', null, d->>'reason', null, l.name)
    from etl.pipelines l cross join (select schedule.definition as d) s
   where l.pipeline_id = schedule.pipeline_id
$$;
comment on function etl._scheduled_request(etl.schedules, timestamptz) is
  'The request of a schedule for one slot. Its idempotency key names the slot, so that whoever fires it, and however often, starts one run.';
revoke all on function etl._scheduled_request(etl.schedules, timestamptz) from public;

create or replace function etl._names(names jsonb) returns text[]
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select nullif(etl._text_array(names), '{}')
$$;
comment on function etl._names(jsonb) is 'A jsonb array as text[], null when it is empty.';
revoke all on function etl._names(jsonb) from public;

-- Recorded as a run that has failed, so that it shows wherever failed runs do. Without the key of the slot, which another request
-- may have; and with a reason, which a schedule of a release before need not give for a full refresh.
create or replace function etl._fail_scheduled(schedule etl.schedules, request jsonb, code text, message text) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_run_id bigint;
begin
  v_run_id := etl._create_run(request - 'idempotency_key' || case when request->>'mode' = 'full'
    then jsonb_build_object('reason', coalesce(request->>'reason', 'schedule ' || schedule.name)) else '{}' end, schedule.pipeline_id, 1, '{}', is_queued => true);
  update etl.runs r set status = 'failed', started_at = clock_timestamp(), ended_at = clock_timestamp(), error_code = code, error_message = message
   where r.run_id = v_run_id;
  raise warning 'schedule % could not start a run: %', schedule.name, message using hint = format('b2s show %s', v_run_id);
  return v_run_id;
end $$;
comment on function etl._fail_scheduled(etl.schedules, jsonb, text, text) is 'Records a scheduled run that was refused; returns its number.';
revoke all on function etl._fail_scheduled(etl.schedules, jsonb, text, text) from public;

-- Of a queue, only what this schedule itself has put there is in the way, which will read everything up to when it starts.
create or replace function etl._run_in_the_way(schedule etl.schedules, out run_id bigint, out reason text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select r.run_id, format('run %s is %s', r.run_id, case r.status when 'queued' then 'still queued' else 'active' end)
    from etl.runs r
   where r.pipeline_id = schedule.pipeline_id and r.kind = 'run'
     and case r.status when 'queued' then exists (select from etl.schedule_slots s where s.run_id = r.run_id and s.schedule_id = schedule.schedule_id)
                       when 'running' then schedule.definition->>'on_conflict' is distinct from 'queue' and etl._is_alive(r) end
   order by r.status, r.run_id limit 1
$$;
comment on function etl._run_in_the_way(etl.schedules) is 'The run because of which a schedule that is due cannot start another one, or null.';
revoke all on function etl._run_in_the_way(etl.schedules) from public;

-- How late a slot may still be started. A clock ticks once a minute and servers restart: five minutes are not missed.
create or replace function etl._lateness_allowed(schedule etl.schedules) returns interval
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case jsonb_typeof(schedule.definition->'catch_up')
    when 'number' then greatest((schedule.definition->>'catch_up')::bigint * interval '1 ms', interval '5 minutes')
    when 'boolean' then case when (schedule.definition->>'catch_up')::boolean then interval '1000 years' else interval '5 minutes' end
    else interval '5 minutes' end
$$;
comment on function etl._lateness_allowed(etl.schedules) is 'How long after its time a slot is still started.';
revoke all on function etl._lateness_allowed(etl.schedules) from public;

create or replace function etl._decide_slot(schedule etl.schedules, slot_at timestamptz, as_of timestamptz, out outcome text, out run_id bigint, out reason text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_request jsonb := etl._scheduled_request(schedule, slot_at);
  v_busy    record;
  v_code    text;
begin
  if as_of - slot_at > etl._lateness_allowed(schedule) then
    outcome := 'missed'; reason := format('noticed %s too late: no clock was running', date_trunc('second', as_of - slot_at));
    return;
  end if;
  select * into v_busy from etl._run_in_the_way(schedule);
  if v_busy.run_id is not null then
    reason := v_busy.reason;
    if schedule.definition->>'on_conflict' = 'fail' then
      outcome := 'failed'; run_id := etl._fail_scheduled(schedule, v_request, 'run.active', reason);
    else
      outcome := 'skipped';
    end if;
    return;
  end if;
  begin
    select s.run_id into run_id from etl._submit(v_request) s;
    outcome := 'submitted';
  exception when others then
    get stacked diagnostics reason = message_text, v_code = pg_exception_detail;
    v_code := coalesce(substring(v_code from '"code": "([^"]+)"'), sqlstate);
    outcome := 'failed'; run_id := etl._fail_scheduled(schedule, v_request, v_code, reason);
  end;
end $$;
comment on function etl._decide_slot(etl.schedules, timestamptz, timestamptz) is 'Queues the run of a slot, or says why not.';
revoke all on function etl._decide_slot(etl.schedules, timestamptz, timestamptz) from public;

-- However many slots have passed, one run makes up for them: it reads everything up to when it starts.
create or replace function etl._fire_schedule(schedule etl.schedules, as_of timestamptz) returns etl.schedule_slots
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_cron     text := schedule.definition->>'cron';
  v_zone     text := schedule.definition->>'timezone';
  v_due      record;
  v_decision record;
  v_slot     etl.schedule_slots;
begin
  -- One that was configured before there was a clock begins now.
  if schedule.next_at is not null then
    v_due := etl._due_slots(v_cron, v_zone, schedule.next_at, as_of);
    v_decision := etl._decide_slot(schedule, v_due.last_at, as_of);
    insert into etl.schedule_slots (schedule_id, slot_at, outcome, run_id, reason, passed_over_count)
    values (schedule.schedule_id, v_due.last_at, v_decision.outcome, v_decision.run_id, v_decision.reason, v_due.slot_count - 1)
    on conflict do nothing
    returning * into v_slot;
  end if;
  update etl.schedules s set next_at = etl._next_slot(v_cron, v_zone, as_of) where s.schedule_id = schedule.schedule_id;
  return v_slot;
end $$;
comment on function etl._fire_schedule(etl.schedules, timestamptz) is 'Decides the last slot of a schedule that is due, and notes the next one. The caller holds its row.';
revoke all on function etl._fire_schedule(etl.schedules, timestamptz) from public;

-- A full refresh that may not be started is not decided either, or whoever ticks first would use it up. Whoever ticks learns why:
-- there may be no other clock. Once a minute, however often that is.
create or replace function etl._warn_of_full_schedules(as_of timestamptz, requester text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_minute text := date_trunc('minute', as_of)::text;
  v_name   text;
begin
  if current_setting('b2s.full_schedules_warned', true) = v_minute then return; end if;
  for v_name in select s.name from etl.schedules s where s.is_active and s.definition->>'mode' = 'full' and s.next_at <= as_of order by s.schedule_id loop
    raise warning 'schedule % is due and left so: it refreshes fully, which % may not start', v_name, requester
      using hint = format('grant etl_admin to %I, or let a member of etl_admin be the clock', requester);
    perform set_config('b2s.full_schedules_warned', v_minute, false);
  end loop;
end $$;
comment on function etl._warn_of_full_schedules(timestamptz, text) is 'Says which schedules are due and left to a clock that may start full refreshes.';
revoke all on function etl._warn_of_full_schedules(timestamptz, text) from public;

create or replace function etl._fire_schedules(as_of timestamptz) returns setof etl.schedule_slots
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_is_admin boolean := etl._is_admin(etl._requesting_role());
  v_schedule etl.schedules;
  v_slot     etl.schedule_slots;
begin
  -- While b2s is being upgraded nothing is started; what is due waits.
  if not pg_try_advisory_xact_lock_shared(6435443, 0) then return; end if;
  perform etl._beat('clock');
  if not v_is_admin then perform etl._warn_of_full_schedules(as_of, etl._requesting_role()); end if;
  -- What another clock is deciding, or b2s sync-config changing, is not waited for: there is a next time.
  for v_schedule in
    select * from etl.schedules s
     where s.is_active and coalesce(s.next_at, '-infinity') <= as_of and (v_is_admin or s.next_at is null or s.definition->>'mode' is distinct from 'full')
     order by s.schedule_id for update skip locked
  loop
    begin
      v_slot := etl._fire_schedule(v_schedule, as_of);
      if v_slot.schedule_id is not null then return next v_slot; end if;
    exception when others then
      raise warning 'schedule % cannot be fired: %', v_schedule.name, sqlerrm;
    end;
  end loop;
end $$;
comment on function etl._fire_schedules(timestamptz) is 'Decides everything that is due at a moment and that whoever asks may start.';
revoke all on function etl._fire_schedules(timestamptz) from public;

create or replace function etl._resumptions(run_id bigint) returns setof etl.runs
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive attempts(run_id) as (
    select _resumptions.run_id
    union
    select r.run_id from attempts a join etl.runs r on r.parent_run_id = a.run_id
  )
  select r.* from attempts a join etl.runs r using (run_id)
$$;
comment on function etl._resumptions(bigint) is 'A run, the runs that resumed it, those that resumed them, and so on.';
revoke all on function etl._resumptions(bigint) from public;
grant execute on function etl._resumptions(bigint) to etl_reader;

-- A resumed run that succeeds counts for the slot of the run it resumes.
create or replace function etl._succeeded_at(run_id bigint) returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
  select min(r.ended_at) from etl._resumptions(run_id) r where r.status in ('succeeded', 'completed_with_warnings')
$$;
comment on function etl._succeeded_at(bigint) is 'When a run, or one that resumed it, succeeded; or null.';
revoke all on function etl._succeeded_at(bigint) from public;
grant execute on function etl._succeeded_at(bigint) to etl_reader;
