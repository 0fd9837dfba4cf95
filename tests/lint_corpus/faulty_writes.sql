-- Writes that hurt when a run is repeated. `--> CODE` marks the line of a finding; there are no others.

create function silver.f01(p_since timestamptz, p_until timestamptz) returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b where b.at >= p_since and b.at < p_until returning 1) --> B401
  select count(*) from new
$$;

create function silver.f02(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_mode = 'full' then
    truncate silver.t;
  end if;
  insert into silver.t (id) select b.id from bronze.b b where b.at >= p_since and b.at < p_until; --> B401
  return 1;
end $$;

create function silver.f03(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_mode <> 'full' then
    insert into silver.t (id) --> B401
    select b.id from bronze.b b where b.at >= p_since and b.at < p_until;
    return 1;
  end if;
  delete from silver.t;
  insert into silver.t (id) select b.id from bronze.b b;
  return 2;
end $$;

create function silver.f04(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  case p_mode
    when 'full' then delete from silver.t;
    else insert into silver.t (id) select b.id from bronze.b b; --> B401
  end case;
  return 1;
end $$;

create function silver.f05(p_mode text) returns bigint language plpgsql set search_path = '' as $$
declare
  v_full boolean := p_mode = 'full';
begin
  if v_full then delete from silver.t; end if;
  insert into silver.t (id) select b.id from bronze.b b; --> B401
  return 1;
end $$;

create function silver.f06(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.other where true;
  insert into silver.t (id) select b.id from bronze.b b; --> B401
  return 1;
end $$;

create function silver.f07() returns bigint language plpgsql set search_path = '' as $$
begin
  execute 'insert into silver.t (id) select b.id from bronze.b b'; --> B401
  return 1;
end $$;

create function silver.f08() returns bigint language plpgsql set search_path = '' as $$
declare
  v_row record;
begin
  for v_row in select b.id from bronze.b b loop
    insert into silver.t (id) select v_row.id from bronze.c c where c.id = v_row.id; --> B401
  end loop;
  return 1;
end $$;

create procedure silver.f09(p_mode text, inout p_rows bigint default null) language plpgsql set search_path = '' as $$
begin
  delete from silver.t; --> B402
  insert into silver.t (id) select b.id from bronze.b b;
  get diagnostics p_rows = row_count;
end $$;

create function silver.f10(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  update silver.t set is_current = false; --> B402
  update silver.t t set is_current = true from bronze.b b where b.id = t.id and b.at >= p_since and b.at < p_until;
  return 1;
end $$;

create function silver.f11(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_mode = 'incremental' then
    delete from silver.t; --> B402
  end if;
  return 0;
end $$;

create function silver.f12(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_mode is null or p_mode = 'incremental' then
    truncate table silver.t; --> B403
  end if;
  return 0;
end $$;

create function silver.f13(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  truncate silver.t, silver.u; --> B403 B403
  insert into silver.t (id) select b.id from bronze.b b;
  return 0;
end $$;

create function silver.f14(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  drop table if exists silver.t; --> B403
  create table silver.t as select b.id from bronze.b b;
  return 0;
end $$;

create function silver.f15(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  execute format('truncate %I.%I', 'silver', 't'); --> B403
  return 0;
end $$;

create function silver.f16(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, key)
  select b.id, random() --> B401@-1 B408
    from bronze.b b where b.at >= p_since and b.at < p_until;
  return 0;
end $$;

create function silver.f17() returns bigint language plpgsql set search_path = '' as $$
begin
  update silver.t set key = gen_random_uuid() where key is null; --> B408
  return 0;
end $$;

create function silver.f18() returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.t where true;
  insert into silver.t (id, key) select b.id, nextval('silver.s') from bronze.b b; --> B408
  return 0;
end $$;

create function silver.f19() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t select b.id from bronze.b b on conflict (id) do nothing; --> B504
  return 0;
end $$;

create function silver.f20() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, at) select b.* from bronze.b b on conflict (id) do nothing; --> B504
  return 0;
end $$;

create function silver.f21() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, at) select * from bronze.b on conflict (id) do nothing; --> B504
  return 0;
end $$;

create function silver.f22() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into bronze.seen (id) select t.id from silver.t t on conflict (id) do nothing; --> B305
  return 0;
end $$;

create function silver.f23() returns bigint language plpgsql set search_path = '' as $$
begin
  delete from bronze.b where at < '2020-01-01'; --> B305
  return 0;
end $$;
