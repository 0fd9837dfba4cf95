-- What a monitoring system reads: b2s exporter turns each row into samples. Everything here costs the same however much history
-- there is: counters are stored (engine/_metrics.sql), and of runs only those that go on or wait are looked at.

-- Each step of each run once, whatever its attempts. A window of timestamps is complete up to its end; one of ids or snapshots up
-- to when that end was noted; who has no watermark reads everything there is when it begins.
create or replace view etl.step_outcomes as
select q.run_id, q.order_index, q.procedure_id, q.procedure, q.mode, q.status, q.skip_reason, q.attempt_count, q.retry_count, q.started_at, q.ended_at,
       q.duration_ms, q.rows_affected, case when q.is_success then q.ended_at end as success_at,
       case when not q.is_success or q.watermark_strategy is null and q.window_until is not null then null
            when q.watermark_strategy is null then q.began_at
            when q.watermark_strategy <> 'timestamp' then (
              select t.ticked_at from etl.watermark_ticks t where t.state_key = q.state_key and t.bound = q.window_until order by t.ticked_at desc limit 1)
            when isfinite(q.window_until::timestamptz) then q.window_until::timestamptz end as complete_at
  from (select p.run_id, p.order_index, p.procedure_id, p.procedure_name as procedure, case when p.lock_key < 0 then 'backfill' else p.mode end as mode,
               p.status::text as status, p.skip_reason::text as skip_reason, (count(*) over attempts)::int as attempt_count,
               (count(*) filter (where p.status = 'retrying') over attempts)::int as retry_count, min(p.started_at) over attempts as started_at, p.ended_at,
               p.started_at as began_at, p.duration_ms + coalesce(sum(p.duration_ms) filter (where p.status = 'advanced') over attempts, 0) as duration_ms,
               coalesce(sum(p.rows_affected) filter (where p.status in ('advanced', 'succeeded')) over attempts, 0)::bigint as rows_affected,
               p.watermark_strategy, p.state_key, p.window_until, lead(p.attempt) over attempts is null as is_last,
               (p.status = 'succeeded' or coalesce(p.skip_reason = 'no_data', false)) and p.lock_key > 0 as is_success
          from etl.procedure_runs p
        window attempts as (partition by p.run_id, p.order_index order by p.attempt rows unbounded preceding)) q
 where q.is_last;
comment on view etl.step_outcomes is 'How each step of each run ended: one row a step, its slices taken together, attempts that were tried again left out of its duration.';
comment on column etl.step_outcomes.mode is 'incremental, full or backfill.';
comment on column etl.step_outcomes.status is 'That of its last attempt.';
comment on column etl.step_outcomes.retry_count is 'Attempts that failed and were tried again.';
comment on column etl.step_outcomes.duration_ms is 'The last attempt, with the slices that were committed before it, milliseconds; null when it was never started.';
comment on column etl.step_outcomes.rows_affected is 'Rows of what was committed, its slices included.';
comment on column etl.step_outcomes.success_at is 'When it succeeded, or found nothing new to read. Null in a backfill.';
comment on column etl.step_outcomes.complete_at is 'Everything that was committed by then has been read. Null: not a success, or not known.';

create or replace view etl.metrics_outcomes as
select * from etl._counted_outcomes();
comment on view etl.metrics_outcomes is
  'How often what ended how, and how long it took, since b2s counts: counters and histograms, as true as the tables at any moment. Configured procedures and views only.';
comment on column etl.metrics_outcomes.family is 'step, refresh or run: subject is a procedure, a materialized view or a pipeline.';
comment on column etl.metrics_outcomes.mode is 'Of steps incremental, full or backfill; of runs their kind, run or backfill; of refreshes empty.';
comment on column etl.metrics_outcomes.status is
  'succeeded, failed, rolled_back, cancelled, abandoned; skipped: not started; retrying: attempts that were tried again. Of runs their status.';
comment on column etl.metrics_outcomes.rows_sum is 'Rows of committed steps and slices, with status succeeded.';
comment on column etl.metrics_outcomes.buckets is 'How many durations lie in each bucket of etl._bucket_bounds(), not added up.';
comment on column etl.metrics_outcomes.created_at is 'Since when it is counted; null: as long as nothing of it is stored.';
comment on column etl.metrics_outcomes.last_run_id is 'The newest run that is counted here.';
comment on column etl.metrics_outcomes.last_seconds is 'The longest duration that the newest run has brought; null where nothing is timed.';

create or replace view etl.metrics_procedures as
select l.name as pipeline, p.name as procedure, p.type, f.last_success_at, f.complete_at, p.state_key is not null as has_watermark,
       p.freshness_ms / 1000.0 as freshness_seconds
  from etl.procedures p
  join etl.pipelines l using (pipeline_id)
  left join etl._freshness() f using (procedure_id)
 where p.is_active;
comment on view etl.metrics_procedures is 'How fresh each active procedure is, and is to be.';
comment on column etl.metrics_procedures.last_success_at is 'When it last succeeded in a run, or found nothing new to read.';
comment on column etl.metrics_procedures.complete_at is 'Up to when all that was committed has been read; for ids and snapshots the moment at which the end of the window was noted.';
comment on column etl.metrics_procedures.freshness_seconds is 'Its freshness objective; null: none.';

create or replace view etl.metrics_pipelines as
select l.name as pipeline, a.run_count as active_runs, a.backfill_count as active_backfills, a.dead_count as dead_runs, a.active_since,
       q.queued_count as queued_runs, q.queued_since, coalesce(w.waiting_count, 0) as waiting_sessions,
       coalesce(extract(epoch from clock_timestamp() - w.lock_wait_since), 0)::float8 as lock_wait_seconds, v.version as config_version, v.applied_at as config_applied_at
  from etl.pipelines l
  cross join lateral (
    select count(*) filter (where r.kind = 'run') as run_count, count(*) filter (where r.kind = 'backfill') as backfill_count,
           count(*) filter (where not etl._is_alive(r)) as dead_count, min(r.started_at) as active_since
      from etl.runs r where r.pipeline_id = l.pipeline_id and r.status = 'running') a
  cross join lateral (
    select count(*) as queued_count, min(r.submitted_at) as queued_since from etl.runs r where r.pipeline_id = l.pipeline_id and r.status = 'queued') q
  left join (select x.pipeline_id, count(*) as waiting_count, min(x.lock_wait_since) as lock_wait_since
               from etl._waits() x where x.lock_wait_since is not null group by x.pipeline_id) w using (pipeline_id)
  left join lateral (
    select c.version, c.applied_at from etl.config_versions c where c.pipeline_id = l.pipeline_id order by c.version desc limit 1) v on true;
comment on view etl.metrics_pipelines is 'What goes on and what waits in each pipeline, and which configuration it has.';
comment on column etl.metrics_pipelines.dead_runs is 'Runs whose sessions are gone and that nobody has recorded as abandoned yet.';
comment on column etl.metrics_pipelines.active_since is 'When the oldest run or backfill that goes on began.';
comment on column etl.metrics_pipelines.waiting_sessions is 'Sessions at work that wait for a lock.';
comment on column etl.metrics_pipelines.lock_wait_seconds is 'For how long the one that has waited longest waits.';

create or replace view etl.metrics_server as
select i.version, array(select m.name from etl.migrations m order by m.name) as migrations, h.horizon, h.held_back_by,
       coalesce((select f.is_frozen from etl.full_refresh_freezes f order by f.freeze_id desc limit 1), false) as is_full_refresh_frozen,
       (select h.beat_at from etl.heartbeats h where h.name = 'clock') as clock_at, (select count(*) from etl.schedules s where s.is_active) as schedule_count
  from etl.installation i cross join lateral etl._horizon_now() h;
comment on view etl.metrics_server is 'The installation, and how far back the oldest open transaction of this database reaches. One row.';
comment on column etl.metrics_server.horizon is 'Nothing can still be committed with a time before this; null: a session hides since when it is in a transaction.';
comment on column etl.metrics_server.clock_at is 'When a clock last asked what is due; null: none ever did.';
comment on column etl.metrics_server.schedule_count is 'How many schedules there are for a clock.';
comment on column etl.metrics_server.held_back_by is 'What keeps the horizon from being now; null: nothing to speak of.';

create or replace view etl.active_steps as
select r.run_id, l.name as pipeline, r.kind, s.order_index, s.subject, s.mode, s.attempt, s.pid, s.started_at,
       round(extract(epoch from clock_timestamp() - s.started_at) * 1000, 3) as running_ms, s.usual_ms, w.wait_event_type, w.wait_event, w.lock_wait_since, w.blocked_by
  from etl.runs r
  join etl.pipelines l using (pipeline_id)
  cross join lateral (
    select p.order_index, p.procedure_name as subject, p.mode, p.attempt, p.worker_pid as pid, p.started_at,
           etl._usual_ms(p.procedure_id, p.mode, r.kind = 'backfill') as usual_ms
      from etl.procedure_runs p where p.run_id = r.run_id and p.status = 'running'
    union all
    select null as order_index, m.mv_name, 'refresh' as mode, 1 as attempt, m.worker_pid, m.started_at, null as usual_ms from etl.mv_refreshes m where m.run_id = r.run_id and m.status = 'running') s
  left join etl._waits() w on w.run_id = r.run_id and w.pid = s.pid
 where r.status = 'running';
comment on view etl.active_steps is 'What is being executed now: by which session, since when, how long it usually takes, and who is in its way.';
comment on column etl.active_steps.subject is 'The procedure, or the materialized view that is refreshed.';
comment on column etl.active_steps.running_ms is 'For how long it has been running, milliseconds.';
comment on column etl.active_steps.usual_ms is 'The median of its last twenty successes in that mode, milliseconds; null: it has none.';
comment on column etl.active_steps.wait_event_type is 'What the session waits for, as in pg_stat_activity; null: nothing, or not to be seen.';
comment on column etl.active_steps.lock_wait_since is 'Since when the session waits for a lock; null: it does not.';
comment on column etl.active_steps.blocked_by is 'The sessions that hold what it waits for: [{"pid", "user", "application", "state", "since"}].';

grant select on etl.step_outcomes, etl.metrics_outcomes, etl.metrics_procedures, etl.metrics_pipelines, etl.metrics_server, etl.active_steps to etl_reader;
