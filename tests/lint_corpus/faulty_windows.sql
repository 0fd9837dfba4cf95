-- Windows and order. `--> CODE` marks the line of a finding; there are no others.

create function silver.g01(p_since timestamptz, p_until timestamptz) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b
     where b.at between p_since and p_until --> B406
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.g02(p_since timestamptz, p_until timestamptz) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b
     where b.at >= p_since and b.at <= p_until --> B406
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.g03(p_since timestamptz, p_until timestamptz) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b
     where b.at > p_since --> B406
       and b.at < p_until
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.g04(p_since bigint, p_until bigint) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b
     where p_since <= b.id
       and p_until >= b.id --> B406
    on conflict (id) do nothing returning 1)
  select count(*) from new
$$;

create function silver.g05(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.t where at > p_since and at < p_until; --> B406
  return 0;
end $$;

create function silver.g06(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  merge into silver.t t using (select b.id from bronze.b b where b.at <= p_until and b.at >= p_since) s --> B406
     on s.id = t.id when not matched then insert (id) values (s.id);
  return 0;
end $$;

create function silver.g07(p_since timestamptz, --> B405
  p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b where b.at < p_until on conflict (id) do nothing;
  return 0;
end $$;

create procedure silver.g08(p_since timestamptz, p_until timestamptz, inout p_rows bigint default 0) --> B405 B405
language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
end $$;

create function silver.g09() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b
   where b.at > now() - interval '1 day' --> B404
  on conflict (id) do nothing;
  return 0;
end $$;

create function silver.g10() returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.t where valid_to < current_date; --> B404
  return 0;
end $$;

create function silver.g11() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, n) select b.id, count(*) from bronze.b b
   group by b.id having max(b.at) < clock_timestamp() --> B404
  on conflict (id) do nothing;
  return 0;
end $$;

create function silver.g12() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b
    join bronze.c c on c.id = b.id and c.at < localtimestamp --> B404
  on conflict (id) do nothing;
  return 0;
end $$;

create function silver.g13() returns bigint language plpgsql set search_path = '' as $$
begin
  update silver.t set is_old = true where at < statement_timestamp(); --> B404
  return 0;
end $$;

create function silver.g14() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b limit 100 --> B407
  on conflict (id) do nothing;
  return 0;
end $$;

create function silver.g15() returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.t where id in (select t.id from silver.t t limit 10); --> B407
  return 0;
end $$;

create function silver.g16(p_n bigint) returns bigint language plpgsql set search_path = '' as $$
declare
  v_row record;
begin
  for v_row in select b.id from bronze.b b limit p_n loop --> B407
    insert into silver.t (id) values (v_row.id) on conflict (id) do nothing;
  end loop;
  return 0;
end $$;
