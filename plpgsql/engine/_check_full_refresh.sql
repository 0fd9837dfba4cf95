-- Guardrails of a full refresh. A request for mode full needs everything; a procedure whose own default mode is full
-- was allowed by whoever configured it, and is only stopped by the freeze.
create or replace function etl._check_full_refresh(items etl.plan_item[], request jsonb, requester text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_full      text[] := (select array_agg(p.name order by p.name) from unnest(items) i join etl.procedures p using (procedure_id)
                          where i.kind = 'steps' and i.mode = 'full');
  v_forbidden text[] := (select array_agg(p.name order by p.name) from unnest(items) i join etl.procedures p using (procedure_id)
                          where i.kind = 'steps' and i.mode = 'full' and not p.allow_full_refresh);
  v_freeze    etl.full_refresh_freezes;
  v_problems  jsonb := '[]';
begin
  if v_full is null then return; end if;
  select * into v_freeze from etl.full_refresh_freezes f order by f.freeze_id desc limit 1;
  if v_freeze.is_frozen then
    v_problems := v_problems || jsonb_build_object('code', 'full_refresh.frozen',
      'message', format('full refreshes are frozen since %s by %s: %s', v_freeze.changed_at, v_freeze.changed_by, v_freeze.reason),
      'hint', 'an admin lifts it: select etl.freeze_full_refresh(false, reason => ''...'')');
  end if;
  if request->>'mode' = 'full' then
    if v_forbidden is not null then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.not_allowed',
        'message', format('full refresh is not allowed for %s', array_to_string(v_forbidden, ', ')),
        'hint', 'select other procedures, or set allow_full_refresh: true for them and run b2s sync-config', 'procedures', to_jsonb(v_forbidden));
    end if;
    if not etl._is_admin(requester) then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.not_admin',
        'message', format('%s may not start a full refresh', requester),
        'hint', format('ask a member of etl_admin, or: grant etl_admin to %I', requester));
    end if;
    if request->'confirm_full_refresh' is distinct from 'true' then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.unconfirmed',
        'message', format('a full refresh rebuilds %s and was not confirmed', array_to_string(v_full, ', ')),
        'hint', 'repeat the call with confirm_full_refresh => true', 'procedures', to_jsonb(v_full));
    end if;
    if coalesce(btrim(request->>'reason'), '') = '' then
      v_problems := v_problems || jsonb_build_object('code', 'full_refresh.no_reason',
        'message', 'a full refresh needs a reason', 'hint', 'repeat the call with reason => ''...''');
    end if;
  end if;
  if v_problems <> '[]' then
    perform etl._fail('PT403', v_problems->0->>'code', v_problems->0->>'message', v_problems->0->>'hint',
                      jsonb_build_object('errors', v_problems));
  end if;
end $$;
comment on function etl._check_full_refresh(etl.plan_item[], jsonb, text) is
  'Raises PT403 with the code of the first guardrail a full refresh violates and all of them in DETAIL: full_refresh.frozen, '
  'full_refresh.not_allowed, full_refresh.not_admin, full_refresh.unconfirmed, full_refresh.no_reason.';
revoke all on function etl._check_full_refresh(etl.plan_item[], jsonb, text) from public;
