-- Who asks, and with whose rights. Inside a security definer function current_user is its owner, so neither is that.

create or replace function etl._requesting_role() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(nullif(current_setting('role'), 'none'), session_user::text)
$$;
comment on function etl._requesting_role() is 'The role whose rights a request has: the SET ROLE in force, else the login.';
revoke all on function etl._requesting_role() from public;
grant execute on function etl._requesting_role() to etl_reader;

create or replace function etl._is_admin(role text) returns boolean
language sql stable
return coalesce(pg_has_role(to_regrole(quote_ident(role))::oid, 'etl_admin', 'usage'), false);
comment on function etl._is_admin(text) is 'Whether a role has the rights of etl_admin; false for one that is no more.';
revoke all on function etl._is_admin(text) from public;

-- Any session can set request.jwt.claims; only from a login that was granted etl_frontend, itself and not by way of another role, do they
-- say who asks.
create or replace function etl._is_front_end() returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select exists (select from pg_catalog.pg_auth_members m
                   join pg_catalog.pg_roles g on g.oid = m.roleid and g.rolname = 'etl_frontend'
                   join pg_catalog.pg_roles r on r.oid = m.member and r.rolname = session_user)
$$;
comment on function etl._is_front_end() is 'Whether the login of this session is a trusted front end: one that says, request by request, who asks.';
revoke all on function etl._is_front_end() from public;
grant execute on function etl._is_front_end() to etl_reader;

create or replace function etl._subject() returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
begin
  if v_claims is null or not etl._is_front_end() then return null; end if;
  begin
    return nullif(btrim(v_claims::jsonb->>'sub'), '');
  exception when data_exception then
    perform etl._fail('PT400', 'claims.invalid', 'request.jwt.claims is no JSON object', 'the front end sets it to the claims of a verified token');
  end;
end $$;
comment on function etl._subject() is 'The claim sub of whoever asks through a trusted front end, else null. Raises PT400 claims.invalid.';
revoke all on function etl._subject() from public;
grant execute on function etl._subject() to etl_reader;

create or replace function etl._requester() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(etl._subject(), etl._requesting_role())
$$;
comment on function etl._requester() is 'Who makes the request, for the record: the subject that a trusted front end names, else the SET ROLE in force, else the login.';
revoke all on function etl._requester() from public;
grant execute on function etl._requester() to etl_reader;
