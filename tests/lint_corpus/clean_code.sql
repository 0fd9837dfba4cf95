-- Errors, names, dynamic SQL and all the ways to write a body. Nothing is found here.

create function silver.e01() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
exception
  when unique_violation then
    return 0;
  when others then
    raise warning 'failed: %', sqlerrm;
    raise;
end $$;

create function silver.e02() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
exception when others then
  raise exception using errcode = sqlstate, message = 'loading t: ' || sqlerrm;
end $$;

create function silver.e03(table_name text) returns bigint language plpgsql set search_path = '' as $$
begin
  execute format('analyze silver.%I', table_name);
  execute 'analyze silver.' || quote_ident(table_name);
  execute format('select 1 where %L = $1', table_name) using table_name;
  return 1;
end $$;

create function silver.e04(target regclass, n integer) returns bigint language plpgsql set search_path = '' as $$
begin
  execute 'analyze ' || target;
  execute format('analyze %s', target);
  execute format('select %s', n);
  execute 'select ' || n || ' + ' || now()::date - date '2020-01-01';
  return 1;
end $$;

create function silver.e05(is_long boolean) returns bigint language plpgsql set search_path = '' as $$
declare
  v_columns text := 'id, name';
  v_sql text;
begin
  v_sql := 'select ' || v_columns || ' from silver.t';
  if is_long then
    v_sql := v_sql || ' where true';
  end if;
  execute v_sql;
  execute case when is_long then 'analyze silver.t' else 'analyze silver.u' end;
  return 1;
end $$;

create function silver.e06() returns bigint language plpgsql set search_path = '' as $$
declare
  v_name text;
begin
  for v_name in select quote_ident(c.relname) from pg_catalog.pg_class c loop
    execute format('analyze silver.%I', v_name);
  end loop;
  return 1;
end $$;

create function silver.e07() returns bigint language plpgsql set search_path = '' as $$
begin
  execute (select string_agg(format('analyze %I.%I', n.nspname, c.relname), '; ')
             from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace);
  return 1;
end $$;

create function silver.e08() returns bigint language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select count(*) from silver.t
$$;

create function silver.e09() returns bigint language sql stable security definer begin atomic
  select count(*) from t;
end;

create function silver.e10() returns bigint language sql stable return (select count(*) from t);

create function silver.e11() returns bigint language sql stable set search_path = silver, pg_temp as $$
  select count(*) from t join u using (id)
$$;

create function silver.e12() returns bigint language sql stable as $$
  with t as (select 1 as id) select count(*) from t
$$;

create function silver.e13() returns bigint language plpgsql as $$
declare
  v_n bigint;
begin
  select count(*) into v_n from pg_class;
  select count(*) into v_n from generate_series(1, 3) as g;
  return v_n;
end $$;

create function silver.e14() returns bigint language plpgsql as 'begin return length(''it''''s'' || ''$$''); end';

create function silver.e15() returns bigint language plpgsql as E'begin\n  return length(\'x\\n\');\nend';

create function silver.e16() returns bigint language plpgsql as $body$
begin
  return length($q$ a 'b' $$ $q$);
end
$body$;

create function silver.e17(inout a silver.t, inout b silver.state[]) language plpgsql set search_path = '' as $$
declare
  v_one silver.t;
  v_many silver.t[];
  v_state silver.state := 'new';
  v_like silver.t.name%type;
  v_row silver.t%rowtype;
begin
  v_one.id := 1;
  v_row := v_one;
  a.id := v_row.id;
  v_many[1] := v_one;
  b := array[v_state];
  v_like := v_one.name;
end $$;

create function silver.e18(n numeric(10, 2), variadic names text[] default '{}') returns table (id bigint, name text)
language plpgsql set search_path = '' as $$
#variable_conflict use_column
<<outer_block>>
declare
  c_all cursor for select t.id, t.name from silver.t t;
  v_row record;
begin
  open c_all;
  loop
    fetch c_all into v_row;
    exit when not found;
    continue when v_row.id is null;
    id := v_row.id;
    return next;
  end loop;
  close c_all;
  foreach name in array names loop
    return next;
  end loop;
  while n > 1 loop
    n := n - 1;
  end loop;
  for i in reverse 10..1 by 2 loop
    null;
  end loop;
  return query select t.id, t.name from silver.t t;
  assert n <= 1, 'too much';
end outer_block $$;

create procedure silver.e19(names text) language plpgsql as $$
begin
  commit;
  call silver.e20(names);
  rollback;
end $$;

create procedure silver.e20(names text) language sql as $$ select names $$;

create function silver.e21() returns trigger language plpgsql as $$
begin
  new.at := now();
  if tg_op = 'DELETE' then return old; end if;
  return new;
end $$;

create function silver.e22() returns event_trigger language plpgsql as $$ begin raise notice '%', tg_tag; end $$;

create function silver.e23() returns bigint language plpgsql as $$
declare
  v_n bigint;
begin
  select count(*) into v_n from orders; -- b2s: ignore[B503] one schema per tenant, chosen by the role
  -- b2s: ignore-next[B503] the same here
  select count(*) into v_n from customers;
  return v_n;
end $$;

create function silver.é24("größe" text) returns text language plpgsql as $$
declare
  "ß" text := 'é' || "größe";
begin
  return "ß";
end $$;

create function silver.e25() returns bigint language c as 'nothing', 'of_ours';

create function silver.e26(a int, b int = 2) returns int language sql immutable strict parallel safe cost 10 as $$ select a + b $$;

create aggregate silver.e27(int) (sfunc = int4pl, stype = int);
