-- Horizons: up to where everything that will ever be committed has been committed.
--
-- A row gets its timestamp or id when it is written and becomes visible when its transaction commits, so the newest value
-- that can be seen says nothing about what is still to come below it. Each strategy has its own way to know:
--
--   timestamp  no transaction that is open now can write a row with now() before its own start
--   id         no transaction that has not yet a lock on the table can draw an id below those drawn already
--   xid        a snapshot says of every transaction whether it had committed, so nothing has to be waited for
--
-- Whatever is read below such a bound must be read in a snapshot taken after it: etl._claim fixes the window and commits,
-- then the step begins.

create or replace function etl._is_query(sources text[]) returns boolean
language sql immutable
return sources[1] ~* '^\s*(select|with)\M';
comment on function etl._is_query(text[]) is 'Whether the source of a watermark is a query and not a list of columns.';
revoke all on function etl._is_query(text[]) from public;

-- Null: it cannot be told, as for a view; then any table counts.
create or replace function etl._source_tables(sources text[]) returns oid[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_tables oid[];
  v_found  oid[];
begin
  if etl._is_query(sources) then return null; end if;
  select case when bool_and(c.relkind in ('r', 'p')) then array_agg(c.oid) end into v_tables
    from unnest(sources) s(source)
    cross join lateral parse_ident(s.source) i(parts)
    join pg_catalog.pg_namespace n on n.nspname = i.parts[1]
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = i.parts[2];
  v_found := v_tables;
  loop
    v_found := array(select h.inhrelid from pg_catalog.pg_inherits h where h.inhparent = any (v_found) and h.inhrelid <> all (v_tables));
    exit when v_found = '{}' or v_found is null;
    v_tables := v_tables || v_found;
  end loop;
  return v_tables;
end $$;
comment on function etl._source_tables(text[]) is 'Every table through which a row can come into a source: partitions and children too. Null when it cannot be told.';
revoke all on function etl._source_tables(text[]) from public;

-- A prepared transaction has no process.
create or replace function etl._writers(tables oid[]) returns table (vxid text, pid int)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return query
    select distinct l.virtualtransaction, l.pid
      from pg_catalog.pg_locks l
     where l.locktype = 'relation' and l.granted and l.pid is distinct from pg_backend_pid()
       and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
       and l.mode in ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
       and (l.relation = any (tables) or tables is null and l.relation >= 16384);
end $$;
comment on function etl._writers(oid[]) is 'Transactions of others that hold a lock for writing on one of these tables; null: on any. pid is null for a prepared one.';
revoke all on function etl._writers(oid[]) from public;

create or replace function etl._describe_holder(pid int) returns text
language sql volatile strict set search_path = pg_catalog, pg_temp as $$
  select format('backend %s (%s), in a transaction since %s', a.pid, concat_ws(', ', r.rolname, nullif(a.application_name, '')),
                coalesce(to_char(a.xact_start, 'YYYY-MM-DD HH24:MI:SS OF'), 'a moment that it does not show'))
    from pg_catalog.pg_stat_get_activity(_describe_holder.pid) a left join pg_catalog.pg_roles r on r.oid = a.usesysid
$$;
comment on function etl._describe_holder(int) is 'The session that holds a horizon back, in words.';
revoke all on function etl._describe_holder(int) from public;

-- The oldest transaction of this database that was open at one moment, and the sessions that are inside one and do not show
-- since when: of a role whose statistics we may not see, or with track_activities off. Between two transactions of one
-- message a session shows none, but the next one gets the time of the message. Whoever waits for its client, outside a
-- transaction, has no message. A walsender streams in one message without end, and writes nothing meanwhile.
--
-- The statistics functions by backend read a picture of all sessions at once, and of each only what is asked for: of the
-- thousand that are idle one function or two, of the few that are left everything.
create or replace function etl._oldest_transaction(out started_at timestamptz, out pid int, out hidden int[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_database oid := (select d.oid from pg_catalog.pg_database d where d.datname = current_database());
  v_shown    int[];
  v_doubtful int[];
  v_inside   int[];
  v_close    record;
begin
  perform pg_stat_clear_snapshot();
  select min(q.xact_start) filter (where q.is_writer), (array_agg(q.pid order by q.xact_start) filter (where q.is_writer))[1],
         coalesce(array_agg(q.pid) filter (where q.xact_start is not null), '{}'), array_agg(q.pid) filter (where q.xact_start is null and q.is_writer)
    into started_at, pid, v_shown, v_doubtful
    from (select s.xact_start, pg_stat_get_backend_pid(s.id) as pid,
                 pg_stat_get_backend_dbid(s.id) = v_database and pg_stat_get_backend_userid(s.id) <> 0
                 and pg_stat_get_backend_pid(s.id) <> pg_backend_pid() as is_writer
            from (select i.id, pg_stat_get_backend_xact_start(i.id) as xact_start from pg_stat_get_backend_idset() i(id) offset 0) s
           where case when s.xact_start is null then pg_stat_get_backend_wait_event(s.id) is distinct from 'ClientRead' else true end) q;
  v_inside := array(select l.pid from pg_catalog.pg_locks l
                     where l.locktype = 'virtualxid' and l.mode = 'ExclusiveLock' and l.granted and l.pid <> all (v_shown) and l.pid <> pg_backend_pid());
  v_doubtful := v_doubtful || v_inside;
  if v_doubtful is null or v_doubtful = '{}' then return; end if;
  perform pg_stat_clear_snapshot();
  select min(q.started_at) as started_at, (array_agg(q.pid order by q.started_at))[1] as pid,
         array_agg(q.pid) filter (where q.xact_start is null and q.pid = any (v_inside)) as hidden
    into v_close
    from (select distinct a.pid, a.xact_start,
                 coalesce(a.xact_start, case when a.state in ('active', 'fastpath function call') then a.query_start end) as started_at
            from unnest(v_doubtful) d(pid) cross join lateral pg_stat_get_activity(d.pid) a
           where a.datid = v_database and a.usesysid is not null
             and (a.backend_type is distinct from 'walsender' or a.query !~* '^\s*start_replication')) q;
  if started_at is null or v_close.started_at < started_at then started_at := v_close.started_at; pid := v_close.pid; end if;
  hidden := v_close.hidden;
end $$;
comment on function etl._oldest_transaction() is
  'The start of the oldest open transaction of this database and its backend; and the backends whose start is hidden, or null.';
revoke all on function etl._oldest_transaction() from public;

-- The clock comes first: whoever begins after it was read writes later timestamps. Then the sessions, then the prepared
-- transactions: one that was prepared between the two is still counted as a session. The margin of one second is for a
-- writer that took its time and was interrupted before it could show it.
create or replace function etl._safe_timestamp(sources text[], wait_ms int, out bound timestamptz, out held_back_by text, out is_general boolean)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_clock    timestamptz := clock_timestamp();
  v_deadline timestamptz := v_clock + wait_ms * interval '1 ms';
  v_oldest   record;
  v_tables   oid[];
  v_prepared text[];
begin
  loop
    v_oldest := etl._oldest_transaction();
    exit when v_oldest.hidden is null;
    if clock_timestamp() > v_deadline then
      perform etl._fail('PT403', 'watermark.hidden_session',
        format('backend %s is in a transaction and does not show since when, so no timestamp is safe to read up to', v_oldest.hidden[1]),
        'grant pg_read_all_stats to etl_engine; and track_activities must be on in every session that writes',
        jsonb_build_object('pids', v_oldest.hidden));
    end if;
    perform pg_sleep(0.005);
  end loop;
  is_general := not exists (select from pg_catalog.pg_prepared_xacts x where x.database = current_database());
  if not is_general then
    v_tables := etl._source_tables(sources);
    v_prepared := array(select w.vxid from etl._writers(v_tables) w where w.pid is null);
    while exists (select from etl._writers(v_tables) w where w.vxid = any (v_prepared)) loop
      if clock_timestamp() > v_deadline then
        bound := '-infinity';
        held_back_by := (select format('prepared transaction %s of %s, since %s', x.gid, x.owner, to_char(x.prepared, 'YYYY-MM-DD HH24:MI:SS OF'))
                           from pg_catalog.pg_prepared_xacts x where x.database = current_database() order by x.prepared limit 1);
        return;
      end if;
      perform pg_sleep(0.005);
    end loop;
  end if;
  bound := least(v_clock, v_oldest.started_at) - interval '1 second';
  if v_oldest.started_at < v_clock - interval '5 seconds' then held_back_by := etl._describe_holder(v_oldest.pid); end if;
end $$;
comment on function etl._safe_timestamp(text[], int) is
  'A time below which no row with now() can still be committed; -infinity while a prepared transaction makes that unknown; is_general: in any source. Waits at most wait_ms. '
  'Raises PT403 watermark.hidden_session when sessions hide since when they are in a transaction.';
revoke all on function etl._safe_timestamp(text[], int) from public;

-- A bound stays one for ever, so the steps of a run share theirs for a moment: looking at a thousand sessions takes longer than
-- many a step. One row a pipeline, as one of its runs is active at a time. A worker that finds it locked, by another one that is
-- just noting its own, goes on without: nobody waits here.
create or replace function etl._recent_horizon(run_id bigint, out bound timestamptz, out held_back_by text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select h.bound, h.held_back_by
    from etl.recent_horizons h
   where h.pipeline_id = (select r.pipeline_id from etl.runs r where r.run_id = _recent_horizon.run_id) and h.run_id = _recent_horizon.run_id
     and h.noted_at between clock_timestamp() - interval '250 ms' and clock_timestamp()
$$;
comment on function etl._recent_horizon(bigint) is 'The safe timestamp that a step of the same run computed in the last quarter of a second, or null.';
revoke all on function etl._recent_horizon(bigint) from public;

create or replace function etl._note_horizon(run_id bigint, noted_at timestamptz, bound timestamptz, held_back_by text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_pipeline_id int := (select r.pipeline_id from etl.runs r where r.run_id = _note_horizon.run_id);
begin
  -- In a rehearsal of another isolation level a row that others have changed cannot even be looked at.
  if v_pipeline_id is null or current_setting('transaction_isolation') <> 'read committed' then return; end if;
  perform from etl.recent_horizons h where h.pipeline_id = v_pipeline_id for update skip locked;
  if found then
    update etl.recent_horizons h
       set run_id = _note_horizon.run_id, noted_at = _note_horizon.noted_at, bound = _note_horizon.bound, held_back_by = _note_horizon.held_back_by
     where h.pipeline_id = v_pipeline_id;
  elsif not exists (select from etl.recent_horizons h where h.pipeline_id = v_pipeline_id) then
    insert into etl.recent_horizons (pipeline_id, run_id, noted_at, bound, held_back_by)
    values (v_pipeline_id, _note_horizon.run_id, _note_horizon.noted_at, _note_horizon.bound, _note_horizon.held_back_by) on conflict do nothing;
  end if;
end $$;
comment on function etl._note_horizon(bigint, timestamptz, timestamptz, text) is 'Keeps a safe timestamp for the next steps of the same run.';
revoke all on function etl._note_horizon(bigint, timestamptz, timestamptz, text) from public;

-- Partitions that the planner left out are not locked, and cannot hold the value that was looked for. What the engine itself has read
-- in this transaction is no source: every run that goes on writes there.
create or replace function etl._read_tables() returns oid[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  return array(select l.relation from pg_catalog.pg_locks l
                 join pg_catalog.pg_class c on c.oid = l.relation and c.relnamespace <> 'etl'::regnamespace
                where l.pid = pg_backend_pid() and l.locktype = 'relation' and l.relation >= 16384 and l.mode = 'AccessShareLock');
end $$;
comment on function etl._read_tables() is 'Relations that this transaction has read, but the engine''s own.';
revoke all on function etl._read_tables() from public;

create or replace function etl._feeding_sequences(tables oid[], column_name text) returns table (oid oid, cache bigint, increment bigint)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return query
    select distinct q.seqrelid, q.seqcache, q.seqincrement
      from unnest(tables) t(oid)
      join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attnum > 0 and (a.attname = column_name or column_name is null)
      cross join lateral (
        select d.objid as seqrelid from pg_catalog.pg_depend d
         where d.refclassid = 'pg_class'::regclass and d.refobjid = a.attrelid and d.refobjsubid = a.attnum and d.classid = 'pg_class'::regclass
        union all
        select d.refobjid from pg_catalog.pg_attrdef f join pg_catalog.pg_depend d on d.classid = 'pg_attrdef'::regclass and d.objid = f.oid
         where f.adrelid = a.attrelid and f.adnum = a.attnum and d.refclassid = 'pg_class'::regclass) r
      join pg_catalog.pg_sequence q on q.seqrelid = r.seqrelid;
end $$;
comment on function etl._feeding_sequences(oid[], text) is
  'The sequences that make the values of a column, or of any: those it owns, and those its default names.';
revoke all on function etl._feeding_sequences(oid[], text) from public;

-- A line of its own for what follows: the query may end with a comment.
create or replace function etl._query_value_sql(query text) returns text
language sql immutable
return format(E'select to_jsonb(q.value) #>> ''{}'' from (%s\n) q(value)', query);
comment on function etl._query_value_sql(text) is 'The statement that reads the value of a query that is the source of a watermark, as text.';
revoke all on function etl._query_value_sql(text) from public;
grant execute on function etl._query_value_sql(text) to etl_owner;

-- The newest value there is. User's tables are read with the planner's own settings, which etl._claim narrows.
create or replace function etl._newest(sources text[]) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = on set enable_bitmapscan = on set enable_sort = on as $$
begin
  if etl._is_query(sources) then return etl._read_source(etl._query_value_sql(sources[1])); end if;
  return etl._read_source((
    select format('select max(q.value) from (%s) q', string_agg(format('select max(%I)::bigint as value from %I.%I', i[3], i[1], i[2]), ' union all '))
      from (select parse_ident(s) from unnest(sources) s) p(i)));
end $$;
comment on function etl._newest(text[]) is 'The newest value of a source: what its query returns, or the highest id of its columns.';
revoke all on function etl._newest(text[]) from public;

-- stage 1: the writers that were there right after the bound was read; 2: those of them that were prepared meanwhile, which
-- changes their name in pg_locks; 3: all gone, the bound is safe.
create or replace function etl._settle(fence jsonb, tables oid[]) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if fence->>'stage' = '1' and not exists (select from etl._writers(tables) w where fence->'writers' ? w.vxid) then
    fence := fence || jsonb_build_object('stage', 2, 'writers',
      (select coalesce(jsonb_agg(w.vxid), '[]') from etl._writers(tables) w where w.pid is null));
  end if;
  if fence->>'stage' = '2' and not exists (select from etl._writers(tables) w where fence->'writers' ? w.vxid) then
    fence := fence || '{"stage": 3, "writers": []}';
  end if;
  return fence;
end $$;
comment on function etl._settle(jsonb, oid[]) is 'A remembered bound, one stage further when the writers it waits for have ended.';
revoke all on function etl._settle(jsonb, oid[]) from public;

-- Everything whose lock shows that a transaction writes ids, or has drawn one to write it later. A sequence that caches hands
-- out ids that were drawn, and committed around, long before they are inserted; one that counts down begins at the wrong end.
create or replace function etl._id_relations(sources text[]) returns oid[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_tables   oid[] := case when etl._is_query(sources) then etl._read_tables() else etl._source_tables(sources) end;
  v_columns  text[] := case when etl._is_query(sources) then array[null] else array(select distinct (parse_ident(s))[3] from unnest(sources) s) end;
  v_sequence record;
begin
  for v_sequence in select q.* from unnest(v_columns) c cross join etl._feeding_sequences(v_tables, c) q loop
    if v_sequence.cache > 1 or v_sequence.increment < 0 then
      perform etl._fail('PT422', 'watermark.unordered_sequence',
        format('sequence %s (cache %s, increment %s) does not make ids in the order in which they are inserted, so no id is safe to read up to',
               v_sequence.oid::regclass, v_sequence.cache, v_sequence.increment),
        format('alter sequence %s cache 1; or use the xid strategy', v_sequence.oid::regclass));
    end if;
    v_tables := v_tables || v_sequence.oid;
  end loop;
  return v_tables;
end $$;
comment on function etl._id_relations(text[]) is
  'The tables that ids are written to, and the sequences that make them. Raises PT422 watermark.unordered_sequence.';
revoke all on function etl._id_relations(text[]) from public;

-- What cannot be settled in time is remembered and settled by a later run. The bound comes first, then what is to be watched.
create or replace function etl._safe_id(sources text[], inout fence jsonb, wait_ms int, out bound bigint, out held_back_by text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_deadline  timestamptz := clock_timestamp() + wait_ms * interval '1 ms';
  v_newest    bigint := coalesce(etl._newest(sources)::bigint, -9223372036854775808);
  v_relations oid[] := etl._id_relations(sources);
  v_old       jsonb := fence;
  v_new       jsonb;
begin
  v_new := (select jsonb_build_object('bound', v_newest, 'stage', case when count(*) = 0 then 3 else 1 end, 'writers', coalesce(jsonb_agg(w.vxid), '[]'))
              from etl._writers(v_relations) w);
  while v_new->>'stage' <> '3' loop
    v_old := etl._settle(v_old, v_relations);
    v_new := etl._settle(v_new, v_relations);
    exit when clock_timestamp() > v_deadline;
    if v_new->>'stage' <> '3' then perform pg_sleep(0.01); end if;
  end loop;
  bound := case when v_new->>'stage' = '3' then v_newest when v_old->>'stage' = '3' then (v_old->>'bound')::bigint end;
  fence := case when v_new->>'stage' = '3' then null when v_old->>'stage' in ('1', '2') then v_old else v_new end;
  if fence is not null then
    held_back_by := (select coalesce(etl._describe_holder(w.pid), format('a prepared transaction (%s)', w.vxid))
                       from etl._writers(v_relations) w where v_new->'writers' ? w.vxid order by w.pid limit 1);
  end if;
end $$;
comment on function etl._safe_id(text[], jsonb, int) is
  'The highest id below or at which no writer can still commit a row, or null while none is known; and what to remember for the next time. '
  'Waits at most wait_ms. Raises PT422 watermark.unordered_sequence.';
revoke all on function etl._safe_id(text[], jsonb, int) from public;

-- Our own transaction counts as unfinished: what it may still write belongs to a later window.
create or replace function etl._safe_snapshot() returns pg_snapshot
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_now pg_snapshot := pg_current_snapshot();
  v_own xid8 := pg_current_xact_id_if_assigned();
begin
  if v_own is null or v_own >= pg_snapshot_xmax(v_now) then return v_now; end if;
  return (select format('%s:%s:%s', (array_agg(q.x order by q.x))[1], pg_snapshot_xmax(v_now), string_agg(q.x::text, ',' order by q.x))
            from (select pg_snapshot_xip(v_now) union select v_own) q(x))::pg_snapshot;
end $$;
comment on function etl._safe_snapshot() is 'This moment as a snapshot in which this transaction is still running.';
revoke all on function etl._safe_snapshot() from public;

-- Everything a strategy knows about how far may be read. The bound is exclusive, in the strategy's type, as text.
create or replace function etl._upper_bound(strategy text, state_key text, sources text[], delay_ms int, wait_ms int, run_id bigint default null,
  out bound text, out held_back_by text, out fence jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  v_clock  timestamptz := clock_timestamp();
  v_safe   record;
  v_newest timestamptz;
  v_shared record;
begin
  -- Who shares the watermark shares its bound, and that must be safe for all of them.
  select array_agg(distinct s.source) as sources, max(p.delay_ms) as delay_ms into v_shared
    from etl.procedures p cross join unnest(p.watermark_sources) s(source)
   where p.state_key = _upper_bound.state_key and p.is_active and s.source <> all (sources);
  sources := sources || coalesce(v_shared.sources, '{}');
  delay_ms := greatest(delay_ms, v_shared.delay_ms);
  case strategy
    when 'timestamp' then
      select h.* into v_safe from etl._recent_horizon(run_id) h;
      if v_safe.bound is null then
        v_safe := etl._safe_timestamp(sources, least(wait_ms, 1000));
        if v_safe.is_general then perform etl._note_horizon(run_id, v_clock, v_safe.bound, v_safe.held_back_by); end if;
      end if;
      -- The newest value is itself to be read: the bound is one tick after it.
      if etl._is_query(sources) then v_newest := coalesce(etl._newest(sources)::timestamptz + interval '1 microsecond', '-infinity'); end if;
      bound := to_jsonb(least(v_safe.bound - delay_ms * interval '1 ms', v_newest)) #>> '{}';
    when 'id' then
      v_safe := etl._safe_id(sources, (select s.fence from etl.state s where s.state_key = _upper_bound.state_key), least(wait_ms, 500));
      bound := coalesce(case when v_safe.bound > -9223372036854775808 then v_safe.bound + 1 end, -9223372036854775808);
      fence := v_safe.fence;
    when 'xid' then
      bound := etl._safe_snapshot();
      return;
  end case;
  held_back_by := v_safe.held_back_by;
end $$;
comment on function etl._upper_bound(text, text, text[], int, int, bigint) is
  'Exclusive end of what may be read now, a timestamptz, bigint or pg_snapshot as text; what holds it back; and, for ids, what to remember. Waits at most wait_ms. '
  'run_id: a run for whose steps a bound of a moment ago will do.';
revoke all on function etl._upper_bound(text, text, text[], int, int, bigint) from public;
