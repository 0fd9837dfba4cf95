-- What goes on now, for whoever looks: which session is at what, how long that usually takes, and what it waits for.

-- The sessions of b2s and no others: with the rights of the owner, who may see more of a session than a reader may.
create or replace function etl._waits()
returns table (pipeline_id int, run_id bigint, pid int, wait_event_type text, wait_event text, lock_wait_since timestamptz, blocked_by jsonb)
language sql volatile security definer set search_path = pg_catalog, pg_temp set jit = off as $$
  select w.pipeline_id, w.run_id, w.pid, a.wait_event_type, a.wait_event, k.since,
         (select jsonb_agg(jsonb_build_object('pid', b.pid, 'user', x.usename, 'application', x.application_name, 'state', x.state, 'since', x.xact_start)
                           order by x.xact_start)
            from unnest(case when k.since is not null or a.wait_event_type = 'Lock' then pg_blocking_pids(w.pid) end) b(pid)
            left join pg_catalog.pg_stat_activity x on x.pid = b.pid)
    from (select r.pipeline_id, r.run_id, unnest(etl._living_workers(r)) as pid from etl.runs r where r.status = 'running') w
    cross join lateral pg_stat_get_activity(w.pid) a
    cross join lateral (select min(l.waitstart) as since from pg_catalog.pg_locks l where l.pid = w.pid and not l.granted) k
$$;
comment on function etl._waits() is
  'The sessions that execute runs, what each waits for, since when it waits for a lock, and who is in its way: [{"pid", "user", "application", "state", "since"}].';
revoke all on function etl._waits() from public;
grant execute on function etl._waits() to etl_reader;

create or replace function etl._usual_ms(procedure_id int, mode text, is_backfill boolean) returns numeric
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off as $$
  select round(percentile_cont(0.5) within group (order by q.duration_ms)::numeric, 3)
    from (select (select sum(e.duration_ms) from etl.procedure_runs e
                   where e.run_id = p.run_id and e.order_index = p.order_index and e.status in ('advanced', 'succeeded')) as duration_ms
            from etl.procedure_runs p
           where p.procedure_id = _usual_ms.procedure_id and p.mode = _usual_ms.mode and p.status = 'succeeded' and (p.lock_key < 0) = is_backfill
           order by p.run_id desc limit 20) q
$$;
comment on function etl._usual_ms(int, text, boolean) is 'How long a step takes: the median of its last twenty successes in that mode, milliseconds; null when there is none.';
revoke all on function etl._usual_ms(int, text, boolean) from public;
grant execute on function etl._usual_ms(int, text, boolean) to etl_reader;

-- Stored counters of runs that have ended, and what has ended of those that go on. A backfill reads the past.
create or replace function etl._freshness() returns table (procedure_id int, last_success_at timestamptz, complete_at timestamptz)
language sql stable security definer set search_path = pg_catalog, pg_temp set jit = off as $$
  select q.subject_id, max(q.last_success_at), max(q.complete_at)
    from (select m.subject_id, m.last_success_at, m.complete_at from etl.metrics m where m.family = 'step' and m.status = 'succeeded' and m.last_success_at is not null
          union all
          select o.subject_id, o.last_success_at, o.complete_at from etl._live_outcomes() o where o.family = 'step' and o.status = 'succeeded') q
   group by q.subject_id
$$;
comment on function etl._freshness() is
  'Of each procedure when it last succeeded or found nothing new to read, and up to when all that was committed has been read.';
revoke all on function etl._freshness() from public;
grant execute on function etl._freshness() to etl_reader;

-- One look at the sessions, whatever the number of procedures. A session that is just beginning may not show it yet: a second look.
create or replace function etl._horizon_now(out horizon timestamptz, out held_back_by text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_clock    timestamptz := clock_timestamp();
  v_oldest   record;
  v_prepared record;
begin
  for i in 1 .. 2 loop
    v_oldest := etl._oldest_transaction();
    exit when v_oldest.hidden is null;
    perform pg_sleep(0.002);
  end loop;
  if v_oldest.hidden is not null then
    held_back_by := format('backend %s, which does not show since when it is in a transaction', v_oldest.hidden[1]);
    return;
  end if;
  select x.prepared, format('prepared transaction %s of %s', x.gid, x.owner) as holder into v_prepared
    from pg_catalog.pg_prepared_xacts x where x.database = current_database() order by x.prepared limit 1;
  horizon := least(v_clock, v_oldest.started_at, v_prepared.prepared) - interval '1 second';
  if v_prepared.prepared <= least(v_clock, v_oldest.started_at) then
    held_back_by := v_prepared.holder;
  elsif v_oldest.started_at < v_clock - interval '5 seconds' then
    held_back_by := etl._describe_holder(v_oldest.pid);
  end if;
end $$;
comment on function etl._horizon_now() is
  'The time before which nothing can still be committed in this database, and what keeps it from being now; null when a session hides since when it is in a transaction.';
revoke all on function etl._horizon_now() from public;
grant execute on function etl._horizon_now() to etl_reader;
