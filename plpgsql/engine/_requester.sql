-- Who asks: inside a security definer function current_user is the owner, so it takes the SET ROLE in force or the login.
create or replace function etl._requester() returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(nullif(current_setting('role'), 'none'), session_user::text)
$$;
comment on function etl._requester() is 'The role that makes the request: the SET ROLE in force, else the login.';
revoke all on function etl._requester() from public;
grant execute on function etl._requester() to etl_reader;
