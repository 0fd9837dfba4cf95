-- After a restore into another cluster, or an upgrade of this one by pg_upgrade: the transaction ids in the Bronze rows, and the
-- snapshot kept as watermark, count another cluster's transactions.
--
-- Rows that were read already get the id 3, which every snapshot sees; all others get the id of this transaction, and are
-- read by the next run. Whoever shares a source table with the watermark is rebased with it. What was written since the
-- restore cannot be told from old rows by its number alone, so everything from the restoring transaction on counts as unread.
create or replace function etl._rebased_procedures(state_key text) returns etl.procedures[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive sharing as (
    select p.procedure_id, p.state_key, p.watermark_sources from etl.procedures p where p.is_active and p.watermark_strategy = 'xid' and p.state_key = _rebased_procedures.state_key
    union
    select p.procedure_id, p.state_key, p.watermark_sources from sharing s join etl.procedures p
        on p.is_active and p.watermark_strategy = 'xid' and (p.state_key = s.state_key or p.watermark_sources && s.watermark_sources)
  )
  select array_agg(p) from etl.procedures p where p.procedure_id in (select s.procedure_id from sharing s)
$$;
comment on function etl._rebased_procedures(text) is 'The procedures that keep this watermark, and those that share a source with them, directly or not.';
revoke all on function etl._rebased_procedures(text) from public;

create or replace function etl.rebase_watermark(state_key text, reason text) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_procedures etl.procedures[] := etl._rebased_procedures(state_key);
  v_keys       text[] := (select array_agg(distinct p.state_key) from unnest(v_procedures) p);
  v_read       text[];
  v_restored   xid8;
  v_count      bigint := 0;
  v_source     text;
  v_state      etl.state;
begin
  perform etl._check_nothing_deferred('etl.rebase_watermark');
  if v_procedures is null then
    perform etl._fail('PT404', 'watermark.unknown', format('no active procedure keeps a watermark of the xid strategy under %s', state_key),
      'which there are: select state_key, strategy from etl.watermarks');
  elsif coalesce(btrim(reason), '') = '' then
    perform etl._fail('PT422', 'watermark.no_reason', format('rebasing the watermark of %s needs a reason', state_key),
      'add reason => ''...''; it is kept in etl.state_history');
  end if;
  perform from etl.state s where s.state_key = any (v_keys) order by s.state_key for update;
  -- A key that was never read has no watermark: none of the rows it shares with others counts as read.
  v_read := array(select coalesce(s.last_success_watermark, '1:1:') from unnest(v_keys) k left join etl.state s on s.state_key = k);
  -- The numbers of this cluster from the one that restored the watermark on; xmin has 32 bits of the 64.
  select min(pg_current_xact_id()::text::bigint - ((pg_current_xact_id()::text::bigint - s.xmin::text::bigint) & 4294967295))::text::xid8 into v_restored
    from etl.state s where s.state_key = any (v_keys);
  perform set_config('b2s.rebase', 'on', true);
  for v_source in select distinct s from unnest(v_procedures) p cross join unnest(p.watermark_sources) s order by s loop
    v_count := v_count + etl._restamp_source(v_source, v_read, coalesce(v_restored, '0'));
  end loop;
  perform set_config('b2s.rebase', 'off', true);
  for v_state in select * from etl.state s where s.state_key = any (v_keys) and s.last_success_watermark is not null loop
    update etl.state s set last_success_watermark = etl._safe_snapshot(), server_id = (select c.system_identifier from pg_catalog.pg_control_system() c)
     where s.state_key = v_state.state_key;
    insert into etl.state_history (state_key, old_watermark, new_watermark, cause, reason, changed_by, session_user_name, application_name)
    select s.state_key, v_state.last_success_watermark, s.last_success_watermark, 'set', rebase_watermark.reason, etl._requester(), session_user,
           current_setting('application_name')
      from etl.state s where s.state_key = v_state.state_key;
  end loop;
  delete from etl.watermark_ticks t where t.state_key = any (v_keys);
  return v_count;
end $$;
comment on function etl.rebase_watermark(text, text) is
  'Makes a watermark of the xid strategy, and its source rows, count this cluster''s transactions after a restore or pg_upgrade; returns how many rows got a new id. '
  'What was not read before is read by the next run. Locks the source tables against writers. Raises PT404 watermark.unknown, PT403 watermark.cannot_restamp.';
revoke all on function etl.rebase_watermark(text, text) from public;
grant execute on function etl.rebase_watermark(text, text) to etl_admin;
