-- What is seen from outside: counters that outlive history, log lines of routines, and how fresh a procedure is to be kept.

alter table etl.procedures add column freshness_ms bigint,
  add constraint freshness_is_longer_than_nothing check (freshness_ms > 0);
comment on column etl.procedures.freshness_ms is
  'Its freshness objective, milliseconds: what it fills is to be complete up to a moment no longer ago than this. Null: none.';

alter table etl.runs add column counted_until int not null default 0;
comment on column etl.runs.counted_until is
  'Of a backfill: the last chunk that etl.metrics has counted; it counts them a hundred at a time, and the rest at its end.';

-- The queue is looked at by every worker and every scrape: among ever so many runs that have ended.
create index runs_that_are_queued on etl.runs (pipeline_id, run_id) where status = 'queued';

-- No foreign key: a subject is a procedure, a refresh target or a pipeline, and none of these is ever deleted.
create table etl.metrics (
  family           text not null,
  subject_id       int not null,
  mode             text not null,
  status           text not null,
  slot             int not null,
  observed_count   bigint not null,
  seconds_sum      double precision not null,
  rows_sum         bigint not null,
  buckets          bigint[] not null,
  created_at       timestamptz not null default clock_timestamp(),
  last_observed_at timestamptz,
  last_run_id      bigint,
  last_seconds     double precision,
  last_success_at  timestamptz,
  complete_at      timestamptz,
  primary key (family, subject_id, mode, status, slot),
  constraint family_is_known check (family in ('step', 'refresh', 'run')),
  constraint there_are_twelve_buckets check (cardinality(buckets) = 12)
) with (fillfactor = 50);
comment on table etl.metrics is
  'Counters and histograms of all runs that have ended, purged ones included. They only grow. Read them in etl.metrics_outcomes. Source: the end of each run.';
comment on column etl.metrics.family is 'step: subject_id is a procedure; refresh: a refresh target; run: a pipeline.';
comment on column etl.metrics.mode is 'For a step incremental, full or backfill; for a run its kind; empty for a refresh.';
comment on column etl.metrics.status is 'How it ended; retrying: attempts that were tried again.';
comment on column etl.metrics.slot is
  'One transaction at a time writes the rows of a slot, so that runs that end at the same moment never wait for each other. The sum counts.';
comment on column etl.metrics.observed_count is 'How many steps, refreshes or runs ended so; of retrying: attempts.';
comment on column etl.metrics.rows_sum is 'Rows of committed steps and slices; kept in the row of status succeeded.';
comment on column etl.metrics.buckets is
  'How many durations lie between two bounds of etl._bucket_bounds(): above the one before, up to and including this one; the last one: above all.';
comment on column etl.metrics.last_run_id is 'The newest run that is counted here.';
comment on column etl.metrics.last_seconds is 'The longest duration that the newest run has brought.';
comment on column etl.metrics.last_success_at is 'When the procedure last succeeded, or found nothing new to read.';
comment on column etl.metrics.complete_at is 'Up to when all that was committed had been read by then.';

create sequence etl.log_ids;
comment on sequence etl.log_ids is 'Numbers of log lines, in the order in which they were written.';

create table etl.step_logs (
  log_id         bigint not null default nextval('etl.log_ids'),
  logged_at      timestamptz not null default clock_timestamp(),
  run_id         bigint not null,
  order_index    int not null,
  attempt        int not null,
  procedure_name text not null,
  level          text not null,
  message        text not null,
  data           jsonb,
  is_rolled_back boolean not null,
  primary key (log_id, logged_at),
  constraint level_is_known check (level in ('debug', 'info', 'warning', 'error'))
) partition by range (logged_at);
create index step_logs_run_id on etl.step_logs (run_id, log_id);
comment on table etl.step_logs is
  'What routines had to say, by month: etl.step_logs_p202611 and so on. Append-only; months leave whole. Source: etl.log.';
comment on column etl.step_logs.logged_at is 'When the routine said it. It can be read here when its step has ended.';
comment on column etl.step_logs.data is 'What belongs to the message, for programs.';
comment on column etl.step_logs.is_rolled_back is 'What the step wrote was rolled back; what it said was kept.';
