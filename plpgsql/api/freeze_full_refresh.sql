-- Throws or lifts the global freeze: while it is in force no run may refresh anything fully, whatever it confirms.
create or replace function etl.freeze_full_refresh(is_frozen boolean, reason text default null) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  if coalesce(btrim(reason), '') = '' then
    perform etl._fail('PT422', 'freeze.no_reason', 'freezing or unfreezing full refreshes needs a reason',
      format('select etl.freeze_full_refresh(%s, reason => ''...'')', is_frozen));
  end if;
  insert into etl.full_refresh_freezes (is_frozen, reason, changed_by) values (is_frozen, reason, etl._requester());
  return case when is_frozen then 'full refreshes are frozen' else 'full refreshes are allowed again' end;
end $$;
comment on function etl.freeze_full_refresh(boolean, text) is
  'Freezes (true) or allows (false) full refreshes in this database, with a reason that is kept. Admins only. Raises PT422 freeze.no_reason.';
revoke all on function etl.freeze_full_refresh(boolean, text) from public;
grant execute on function etl.freeze_full_refresh(boolean, text) to etl_admin;
