-- Windows and order, as they should be, and what only resembles a mistake. Nothing is found here.

create function silver.d01(p_since timestamptz, p_until timestamptz) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b
     where (p_since is null or b.at >= p_since) and (p_until is null or b.at < p_until) on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.d02(p_since bigint, p_until bigint) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b where p_since <= b.id and p_until > b.id on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.d03(p_since pg_snapshot, p_until pg_snapshot) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b where etl.arrived(b.etl_xid, p_since, p_until) on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.d04(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_until <= p_since then
    return 0;
  end if;
  insert into silver.t (id) select b.id from bronze.b b where b.at >= p_since and b.at < p_until on conflict (id) do nothing;
  return 1;
end $$;

create function silver.d05(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
declare
  v_n bigint;
begin
  execute 'insert into silver.t (id) select b.id from bronze.b b where b.at >= $1 and b.at < $2 on conflict (id) do nothing'
    using p_since, p_until;
  get diagnostics v_n = row_count;
  return v_n;
end $$;

create function silver.d06() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, loaded_at, age) select b.id, now(), current_date - b.day from bronze.b b
  on conflict (id) do update set loaded_at = clock_timestamp();
  return 1;
end $$;

create function silver.d07() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, birth) select b.id, case when b.birth <= current_date then b.birth end from bronze.b b
  on conflict (id) do update set birth = excluded.birth where silver.t.birth is distinct from excluded.birth;
  return 1;
end $$;

create function silver.d08() returns bigint language plpgsql set search_path = '' as $$
declare
  v_begin timestamptz := clock_timestamp();
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  raise notice 'took %', clock_timestamp() - v_begin;
  return 1;
end $$;

create function silver.d09() returns bigint language plpgsql set search_path = '' as $$
begin
  if exists (select from bronze.b limit 1) then
    insert into silver.t (id) select b.id from bronze.b b order by b.id limit 10 on conflict (id) do nothing;
  end if;
  return 1;
end $$;

create function silver.d10() returns bigint language plpgsql set search_path = '' as $$
declare
  v_one bigint;
begin
  select b.id into v_one from bronze.b b limit 1;
  perform b.id from bronze.b b limit 1;
  insert into silver.t (id) values (v_one) on conflict (id) do nothing;
  return 1;
end $$;

create function silver.d11() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b limit all on conflict (id) do nothing;
  return 1;
end $$;

create procedure silver.d12(p_since timestamptz, p_until timestamptz, inout p_rows bigint default 0)
language plpgsql set search_path = '' as $$
declare
  c_new cursor (f timestamptz, t timestamptz) for select b.id from bronze.b b where b.at >= f and b.at < t;
begin
  p_rows := 0;
  for v_row in c_new(p_since, p_until) loop
    insert into silver.t (id) values (v_row.id) on conflict (id) do nothing;
    p_rows := p_rows + 1;
  end loop;
end $$;

create function silver.d13(p_since timestamptz, p_until timestamptz, out p_rows bigint) language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b where b.at >= d13.p_since and b.at < d13.p_until on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
end $$;

create function silver.d14(p_day date) returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b where b.day between p_day and p_day + 6 on conflict (id) do nothing;
  return 1;
end $$;

create function silver.d15() returns bigint language sql set search_path = '' as $$
  with recursive tree as (
    select b.id, b.parent from bronze.b b where b.parent is null
    union all
    select b.id, b.parent from bronze.b b join tree t on t.id = b.parent),
  new as (insert into silver.t (id) select tree.id from tree on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.d16(p_until timestamptz) returns bigint language sql set search_path = '' as $$
  with b as (select b.id, b.at from bronze.b b where b.at < p_until),
  new as (insert into silver.t (id) select b.id from b on conflict (id) do nothing returning 1)
  select count(*) from new
$$;
