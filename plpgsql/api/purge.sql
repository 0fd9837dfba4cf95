-- History that has been kept for long enough leaves. Thin, like etl.start_run, since it ends transactions: a batch holds its
-- locks, on rows that no run looks at, for a moment, and other purges wait no longer than that either.
create or replace function etl._purge_batch(max_rows int, out purged jsonb, out is_done boolean, out busy text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_deleted record;
  v_logs    record;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('b2s purge', 0)) then
    perform etl._fail('PT409', 'purge.active', 'history is being purged by another session', 'let it finish; it does all there is to do');
  end if;
  v_deleted := etl._delete_runs(max_rows);
  purged := jsonb_build_object('runs', v_deleted.runs, 'attempts', v_deleted.attempts, 'watermark moves', etl._delete_moves(max_rows),
    'ticks', etl._delete_ticks(max_rows), 'slots', etl._delete_slots(max_rows));
  is_done := not jsonb_path_exists(purged, '$.* ? (@ > 0)');
  if is_done then
    v_logs := etl._drop_logs();
    purged := purged || jsonb_build_object('months of logs', (v_logs.dropped is not null)::int);
    is_done := v_logs.dropped is null and v_logs.busy is null;
    busy := v_logs.busy;
  end if;
  -- Here and not where it is told of, which anybody who may purge can call: the retention that is not kept to shows by this alone.
  perform etl._beat('purge', etl._purge_text(purged));
end $$;
comment on function etl._purge_batch(int) is
  'Purges one batch of everything; is_done: there was nothing left; busy: a month of logs that is in use just now. Raises PT409 purge.active.';
revoke all on function etl._purge_batch(int) from public;
grant execute on function etl._purge_batch(int) to etl_operator;

create or replace function etl._purge_text(purged jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg(format('%s %s', k.value, k.key), ', ' order by k.key) from jsonb_each_text(purged) k
$$;
comment on function etl._purge_text(jsonb) is 'How much was purged, in words.';
revoke all on function etl._purge_text(jsonb) from public;

create or replace function etl._sum_counts(a jsonb, b jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select a || jsonb_object_agg(k.key, coalesce((a->>k.key)::bigint, 0) + k.value::bigint) from jsonb_each_text(b) k
$$;
comment on function etl._sum_counts(jsonb, jsonb) is 'Two objects of numbers, added up.';
revoke all on function etl._sum_counts(jsonb, jsonb) from public;
grant execute on function etl._sum_counts(jsonb, jsonb) to etl_operator;

-- Only beside a batch of this very transaction, which has noted when that was.
create or replace function etl._note_purge(purged jsonb) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  update etl.heartbeats h set detail = etl._purge_text(purged) where h.name = 'purge' and h.beat_at >= transaction_timestamp()
$$;
comment on function etl._note_purge(jsonb) is 'Adds to the note of the batch just purged what was purged before it.';
revoke all on function etl._note_purge(jsonb) from public;
grant execute on function etl._note_purge(jsonb) to etl_operator;

create or replace procedure etl.purge(batch_rows int default 5000, max_duration interval default '1 hour', busy_tries int default 30, inout purged jsonb default null)
language plpgsql as $$
declare
  v_batch  record;
  v_atomic text;
  v_until  timestamptz;
  v_tries  int := 0;
begin
  begin commit; exception when invalid_transaction_termination then v_atomic := sqlerrm; end;
  if v_atomic = etl._atomic_message() then perform etl._fail_in_transaction('etl.purge'); end if;
  purged := '{}';
  v_until := pg_catalog.timestamptz_pl_interval(pg_catalog.clock_timestamp(), max_duration);
  loop
    commit; set transaction isolation level read committed, read write;
    select * into v_batch from etl._purge_batch(batch_rows);
    purged := etl._sum_counts(purged, v_batch.purged);
    exit when v_batch.is_done or pg_catalog.timestamptz_gt(pg_catalog.clock_timestamp(), v_until);
    if v_batch.busy is not null then
      v_tries := pg_catalog.int4pl(v_tries, 1);
      if pg_catalog.int4gt(v_tries, busy_tries) then
        raise warning '% is no longer kept but in use: it stays until the next purge', v_batch.busy;
        exit;
      end if;
      commit;
      perform pg_catalog.pg_sleep(1);
    end if;
  end loop;
  perform etl._note_purge(purged);
end $$;
comment on procedure etl.purge(int, interval, int, jsonb) is
  'Deletes what is no longer kept by the retention of each pipeline, in batches of about batch_rows attempts, for at most max_duration: runs with their attempts, '
  'watermark moves, ticks, slots of schedules, whole months of logs; returns how much. A month of logs that is in use is tried busy_tries times, a second apart. Watermarks, configurations, metrics, and runs that something refers to stay. '
  'CALL it alone, with autocommit on. Raises PT409 purge.active.';
revoke all on procedure etl.purge(int, interval, int, jsonb) from public;
grant execute on procedure etl.purge(int, interval, int, jsonb) to etl_operator;
