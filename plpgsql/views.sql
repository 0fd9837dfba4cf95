-- What people and programs read.

create or replace view etl.run_history as
select r.run_id, l.name as pipeline, r.status, r.mode, r.requested_by, r.submitted_at, r.started_at, r.ended_at,
       coalesce(r.duration_ms, extract(epoch from clock_timestamp() - r.started_at) * 1000)::numeric(16, 3) as duration_ms,
       r.step_count, r.as_of, r.reason, r.approved_by, r.idempotency_key, r.parent_run_id, r.worker_pid,
       r.status = 'running' and not etl._is_alive(r) as is_dead,
       r.cancel_requested_at, r.cancel_requested_by, r.cancel_reason, r.error_code, r.error_message, r.kind,
       r.status = 'queued' and etl._awaits_approval(r) as awaits_approval
  from etl.runs r join etl.pipelines l using (pipeline_id);
comment on view etl.run_history is
  'Runs and backfills (kind) for people. duration_ms counts on while a run is active; is_dead: its session is gone, the next start marks it abandoned. '
  'awaits_approval: queued, and another admin has to approve it first (etl.approve_run).';

create or replace view etl.step_history as
select p.run_id, p.order_index, p.attempt, p.procedure_name as procedure, p.procedure_type as type, p.group_name, p.mode, p.status, p.skip_reason,
       p.started_at, p.ended_at, coalesce(p.duration_ms, extract(epoch from clock_timestamp() - p.started_at) * 1000)::numeric(16, 3) as duration_ms,
       p.rows_affected, p.table_counts, p.warnings, p.tx_scope, p.isolation, p.window_since, p.window_until, p.parameters, p.dependencies,
       etl._render_call(p.statement, p.mode, p.window_since, p.window_until, p.run_id, p.parameters) as statement,
       p.error_class, p.error_code, p.sqlstate, p.error_message, p.error_detail, p.error_hint, p.error_context, p.window_goal, p.slice_index,
       p.held_back_by
  from etl.procedure_runs p;
comment on view etl.step_history is 'Attempts for people: the statement has its values written in.';

-- Chunks of backfills say nothing about how runs fare: the lock of their run has a negative key.
create or replace view etl.procedure_health as
select p.name as procedure, p.type, l.name as pipeline, last.run_id as last_run_id, last.status as last_status, last.ended_at as last_ended_at,
       last.duration_ms as last_duration_ms, last.rows_affected as last_rows_affected, last.error_code as last_error_code,
       last.error_message as last_error_message, etl._last_success_at(p.procedure_id) as last_success_at,
       s.last_success_watermark as watermark, p.freshness_ms, f.complete_at,
       coalesce(coalesce(f.complete_at, f.last_success_at, '-infinity') < clock_timestamp() - p.freshness_ms * interval '1 ms', false) as is_late
  from etl.procedures p
  join etl.pipelines l using (pipeline_id)
  left join etl._freshness() f using (procedure_id)
  left join lateral (select * from etl.procedure_runs r where r.procedure_id = p.procedure_id and r.lock_key > 0
                      order by r.run_id desc, r.attempt desc limit 1) last on true
  left join etl.state s on s.state_key = p.state_key
 where p.is_active;
comment on view etl.procedure_health is 'How each active procedure last ended in a run, when it last succeeded in one, its watermark, and how fresh it is. Backfills do not count.';
comment on column etl.procedure_health.freshness_ms is 'Its freshness objective, milliseconds; null: none.';
comment on column etl.procedure_health.complete_at is 'Up to when all that was committed has been read.';
comment on column etl.procedure_health.is_late is 'complete_at is longer ago than the freshness objective allows, or it never succeeded.';

create or replace view etl.run_events as
select r.started_at as at, 'run_started' as event, r.run_id, null::int as order_index, null::text as procedure, r.mode, null::text as tx_scope,
       null::int as attempt, null::numeric as duration_ms, null::bigint as rows_affected, null::text as error_code, null::text as error_message,
       null::text as level, null::text as message, null::jsonb as data, null::boolean as is_rolled_back, null::bigint as log_id
  from etl.runs r where r.started_at is not null
union all
select p.started_at, 'step_started', p.run_id, p.order_index, p.procedure_name, p.mode, p.tx_scope, p.attempt, null, null, null, null, null, null, null, null, null
  from etl.procedure_runs p where p.started_at is not null
union all
select p.ended_at, 'step_' || p.status, p.run_id, p.order_index, p.procedure_name, p.mode, p.tx_scope, p.attempt, p.duration_ms, p.rows_affected,
       coalesce(p.error_code, p.skip_reason), p.error_message, null, null, null, null, null
  from etl.procedure_runs p where p.ended_at is not null
union all
select m.ended_at, 'refresh_' || m.status, m.run_id, null, m.mv_name, null, null, null, m.duration_ms, null, coalesce(m.error_code, m.skip_reason),
       coalesce(m.error_message, m.warning), null, null, null, null, null
  from etl.mv_refreshes m where m.ended_at is not null
union all
select r.ended_at, 'run_' || r.status, r.run_id, null, null, r.mode, null, null, r.duration_ms, null, r.error_code, r.error_message, null, null, null, null, null
  from etl.runs r where r.ended_at is not null
union all
select g.logged_at, 'log', g.run_id, g.order_index, g.procedure_name, null, null, g.attempt, null, null, null, null, g.level, g.message, g.data,
       nullif(g.is_rolled_back, false), g.log_id
  from etl.step_logs g;
comment on view etl.run_events is
  'What happened in each run, event by event, from the run tables, and what its routines had to say (event log: etl.log). Source of b2s logs.';
comment on column etl.run_events.level is 'Of a line that a routine logged: debug, info, warning or error.';
comment on column etl.run_events.message is 'What it said.';
comment on column etl.run_events.data is 'What belongs to the message, for programs.';
comment on column etl.run_events.is_rolled_back is 'True: what the step wrote was rolled back, what it said was kept.';
comment on column etl.run_events.log_id is 'The number of the line in etl.step_logs.';

create or replace view etl.backfill_progress as
select r.run_id, l.name as pipeline, array(select n.name from jsonb_array_elements_text(r.request->'procedures') n(name)) as procedures, r.status,
       r.request->>'from' as from_, r.request->>'until' as until, r.request->>'chunk' as chunk, r.step_count as chunks_total,
       c.done as chunks_done, c.failed as chunks_failed, r.step_count - c.done - c.failed as chunks_left, c.rows_affected,
       round(c.rows_affected / nullif(e.seconds, 0), 1) as rows_per_second, round(60 * c.done / nullif(e.seconds, 0), 1) as chunks_per_minute, r.started_at,
       case when e.is_alive and c.done > 0
         then clock_timestamp() + (r.step_count - c.done - c.failed) * (c.mean_ms + r.pause_ms) * interval '1 ms' end as eta,
       r.parent_run_id, r.status = 'running' and not e.is_alive as is_dead
  from etl.runs r
  join etl.pipelines l using (pipeline_id)
  cross join lateral (
    select count(*) filter (where p.status = 'succeeded')::int as done, count(*) filter (where p.status = 'failed')::int as failed,
           coalesce(sum(p.rows_affected), 0)::bigint as rows_affected, avg(p.duration_ms) filter (where p.status = 'succeeded') as mean_ms
      from etl.procedure_runs p where p.run_id = r.run_id) c
  cross join lateral (
    select etl._is_alive(r) as is_alive, coalesce(r.duration_ms / 1000, extract(epoch from clock_timestamp() - r.started_at)) as seconds) e
 where r.kind = 'backfill';
comment on view etl.backfill_progress is
  'Backfills: range, chunks that succeeded (done), failed or are left, rows, rates, and when it will have ended (eta) at the mean time of a chunk. '
  'Left are those not started yet, or never: etl.backfill(resume => run_id) takes them up, and those that failed.';

create or replace view etl.schedule_history as
select l.name as pipeline, s.name as schedule, h.slot_at, h.decided_at, h.outcome, h.run_id, r.status as run_status, r.duration_ms, h.passed_over_count,
       coalesce(h.reason, r.error_message) as reason
  from etl.schedule_slots h join etl.schedules s using (schedule_id) join etl.pipelines l using (pipeline_id) left join etl.runs r using (run_id);
comment on view etl.schedule_history is 'What became of each time at which a schedule was due, and how its run fared; run_status is null once that was purged.';

-- Due is what was decided, or should have been: with a clock that has died, next_at stays in the past.
create or replace view etl.schedule_health as
select l.name as pipeline, s.name as schedule, s.definition->>'cron' as cron, s.definition->>'timezone' as timezone, s.next_at,
       last.slot_at as last_slot_at, last.outcome as last_outcome, last.run_id as last_run_id, r.status as last_status, last.reason as last_reason,
       success.slot_at as last_success_slot_at, success.at as last_success_at,
       coalesce(due.slot_at > coalesce(success.slot_at, '-infinity'), false) as is_late,
       case when due.slot_at > coalesce(success.slot_at, '-infinity') then due.slot_at end as late_since
  from etl.schedules s
  join etl.pipelines l using (pipeline_id)
  left join lateral (select * from etl.schedule_slots h where h.schedule_id = s.schedule_id order by h.slot_at desc limit 1) last on true
  left join etl.runs r on r.run_id = last.run_id
  left join lateral (
    select h.slot_at, etl._succeeded_at(h.run_id) as at
      from (select * from etl.schedule_slots x where x.schedule_id = s.schedule_id and x.run_id is not null order by x.slot_at desc limit 10000) h
     where etl._succeeded_at(h.run_id) is not null order by h.slot_at desc limit 1) success on true
  cross join lateral (
    select clock_timestamp() - coalesce((s.definition->>'late_after_ms')::bigint, 3600000) * interval '1 ms' as until) late
  cross join lateral (
    select greatest(case when s.next_at <= late.until then s.next_at end,
                    (select max(h.slot_at) from etl.schedule_slots h where h.schedule_id = s.schedule_id and h.slot_at <= late.until)) as slot_at) due
 where s.is_active;
comment on view etl.schedule_health is
  'How each active schedule fares: when it is due next, what became of its last slot, when a run of it last succeeded. is_late: a slot (late_since) has no successful run '
  'at or after it although late_after has passed, whatever the reason: a run that failed, was skipped or still runs, no worker, no clock.';

grant select on etl.backfill_progress, etl.run_history, etl.step_history, etl.procedure_health, etl.run_events, etl.schedule_history, etl.schedule_health
  to etl_reader;
