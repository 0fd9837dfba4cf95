-- Errors, transactions, injections, names, syntax. `--> CODE` marks the line of a finding; there are no others.

create procedure silver.h01(inout p_rows bigint default 0) language plpgsql as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
  commit; --> B201
end $$;

create procedure silver.h02(inout p_rows bigint default 0) language plpgsql as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
  if p_rows > 1000 then
    rollback; --> B201
  end if;
end $$;

create function silver.h03() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
exception
  when unique_violation then return 0;
  when others then --> B202
    insert into silver.errors (text) values (sqlerrm);
    return 0;
end $$;

create function silver.h04() returns bigint language plpgsql set search_path = '' as $$
begin
  begin
    insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  exception when deadlock_detected or serialization_failure then --> B202
    null;
  end;
  return 1;
end $$;

create function silver.h05() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
exception when sqlstate '40001' then --> B202
  raise warning 'try later';
  return 0;
end $$;

create function silver.h06() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
exception when query_canceled then --> B202
  return 0;
end $$;

create function silver.h07(table_name text) returns bigint language plpgsql set search_path = '' as $$
begin
  execute 'analyze silver.' || table_name; --> B501
  return 1;
end $$;

create function silver.h08(country text) returns bigint language plpgsql set search_path = '' as $$
declare
  v_sql text;
  v_n bigint;
begin
  v_sql := 'select count(*) from silver.t where country = ''' || country || '''';
  execute v_sql into v_n; --> B501
  return v_n;
end $$;

create function silver.h09(condition text) returns bigint language plpgsql set search_path = '' as $$
declare
  v_n bigint;
begin
  execute format('select count(*) from silver.t where %s', condition) into v_n; --> B501
  return v_n;
end $$;

create function silver.h10(name text) returns setof bigint language plpgsql set search_path = '' as $$
begin
  return query execute concat('select id from silver.', name); --> B501
end $$;

create function silver.h11(name text) returns bigint language plpgsql set search_path = '' as $$
declare
  v_row record;
begin
  for v_row in execute 'select id from silver.' || lower(name) loop --> B501
    null;
  end loop;
  return 0;
end $$;

create function silver.h12(options jsonb) returns bigint language plpgsql set search_path = '' as $$
begin
  execute 'analyze ' || (options->>'table'); --> B501
  return 0;
end $$;

create function silver.h13() returns bigint language plpgsql set search_path = '' as $$
declare
  v_row record;
begin
  for v_row in select c.relname from pg_catalog.pg_class c loop
    execute 'analyze silver.' || v_row.relname; --> B501
  end loop;
  return 0;
end $$;

create function silver.h14(a text, b text) returns bigint language plpgsql set search_path = '' as $$
declare
  v_name text := coalesce(a, b, 't');
begin
  execute format('analyze silver.%s', v_name); --> B501 B501
  return 0;
end $$;

create function silver.h15() returns bigint language sql stable security definer as $$ --> B502
  select count(*) from silver.t
$$;

create procedure silver.h16() language plpgsql security definer as $$ --> B502
begin
  perform 1;
end $$;

create function silver.h17() returns bigint language sql stable as $$
  select count(*) from t --> B503
$$;

create function silver.h18() returns bigint language plpgsql as $$
declare
  v_n bigint;
begin
  select count(*) into v_n
    from orders o --> B503
    join customers c on c.id = o.customer_id; --> B503
  return v_n;
end $$;

create function silver.h19() returns bigint language sql stable as '
  select count(*) from t where name = ''x'' --> B503
';

create function silver.h20() returns bigint language plpgsql set search_path = '' as $$
begin
  retrun 1; --> B001
end $$;

create function silver.h21() returns bigint language plpgsql set search_path = '' as $$
begin
  perform count(*) from silver.t where; --> B001
  return 1;
end $$;

create function silver.h22() returns bigint language sql set search_path = '' as $$
  select count(*) form silver.t --> B001
$$;

create function silver.h23() returns jsonb language sql stable set search_path = '' as $$
  select json_object('a': 1)::jsonb --> B506
$$;

create function silver.h24() returns bigint language plpgsql set search_path = '' as $$
declare
  v_n bigint;
begin
  select count(*) into v_n from json_table('[]', '$[*]' columns (a int path '$')) j; --> B506
  return v_n;
end $$;

create function silver.h25() returns uuid language sql volatile set search_path = '' as $$
  select uuidv7() --> B506
$$;

create function silver.h26() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing; -- b2s: ignore[B401] safe --> B901
  return 1;
end $$;

create function silver.h27() returns bigint language plpgsql as $$
declare
  v_n bigint;
begin
  select count(*) into v_n from t; -- b2s: ignore[B503]
  return v_n; --> B902@-1
end $$;

create procedure silver.h28(inout p_rows bigint default null) --> B102
language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
end $$;

create function silver.h29(names text[]) returns bigint language plpgsql set search_path = '' as $$
declare
  v_sql text := 'select 1';
  v_name text;
begin
  foreach v_name in array names loop
    v_sql := v_sql || ' from silver.' || v_name;
  end loop;
  execute v_sql; --> B501
  return 1;
end $$;
