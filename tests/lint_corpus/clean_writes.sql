-- Routines that look like trouble and are none. Nothing is found here.

create function silver.c01(p_mode text, p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_mode = 'full' then
    truncate silver.t;
    insert into silver.t (id) select b.id from bronze.b b;
    return 0;
  end if;
  insert into silver.t (id) select b.id from bronze.b b where b.at >= p_since and b.at < p_until on conflict (id) do nothing;
  return 1;
end $$;

create function silver.c02(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  case p_mode
    when 'full' then truncate silver.t; insert into silver.t (id) select b.id from bronze.b b;
    when 'incremental' then insert into silver.t (id) select b.id from bronze.b b on conflict do nothing;
    else raise exception 'mode % is unknown', p_mode;
  end case;
  return 1;
end $$;

create function silver.c03(p_mode text) returns bigint language plpgsql set search_path = '' as $$
declare
  v_full constant boolean := lower(p_mode) = 'full';
begin
  if not v_full then
    merge into silver.t t using bronze.b b on b.id = t.id when not matched then insert (id) values (b.id);
    return 1;
  end if;
  delete from silver.t;
  insert into silver.t (id) select b.id from bronze.b b;
  return 2;
end $$;

create function silver.c04(p_mode text, p_since timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_since is null then
    delete from silver.t;
    insert into silver.t (id) select b.id from bronze.b b;
  else
    insert into silver.t (id) select b.id from bronze.b b where b.at >= p_since on conflict (id) do nothing;
  end if;
  return 1;
end $$;

create function silver.c05() returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.t;
  insert into silver.t (id) select b.id from bronze.b b;
  return 1;
end $$;

create function silver.c06() returns bigint language plpgsql set search_path = '' as $$
begin
  truncate silver.t;
  insert into silver.t (id) select b.id from bronze.b b;
  return 1;
end $$;

create function silver.c07(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql set search_path = '' as $$
begin
  delete from silver.t t using bronze.b b where b.id = t.id and b.at >= p_since and b.at < p_until;
  insert into silver.t (id) select b.id from bronze.b b where b.at >= p_since and b.at < p_until;
  return 1;
end $$;

create function silver.c08() returns bigint language sql set search_path = '' as $$
  with gone as (delete from silver.t where day = '2026-01-01' returning 1), new as (
    insert into silver.t (id) select b.id from bronze.b b returning 1)
  select count(*) from new
$$;

create function silver.c09() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b where not exists (select from silver.t t where t.id = b.id) returning 1)
  select count(*) from new
$$;

create function silver.c10() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b left join silver.t t using (id) where t.id is null returning 1)
  select count(*) from new
$$;

create function silver.c11() returns bigint language sql set search_path = '' as $$
  with new as (
    insert into silver.t (id) select b.id from bronze.b b except select t.id from silver.t t returning 1)
  select count(*) from new
$$;

create function silver.c12() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do update set at = excluded.at;
  insert into silver.log (text, at) values ('loaded', now());
  return 1;
end $$;

create function silver.c13() returns bigint language plpgsql set search_path = '' as $$
begin
  create temporary table changed on commit drop as select b.id from bronze.b b;
  insert into changed select c.id from bronze.c c;
  truncate changed;
  insert into silver.t (id) select id from changed on conflict (id) do nothing;
  drop table changed;
  return 1;
end $$;

create function silver.c14() returns bigint language plpgsql set search_path = '' as $$
begin
  create temp table changed (id bigint);
  insert into pg_temp.changed select b.id from bronze.b b;
  delete from changed;
  insert into silver.t (id) select id from changed on conflict (id) do nothing;
  return 1;
end $$;

create function silver.c15(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  update silver.t set at = b.at from bronze.b b where b.id = silver.t.id;
  delete from silver.t using bronze.gone g where g.id = silver.t.id;
  delete from silver.t where id is null;
  return 1;
end $$;

create function silver.c16() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, key) select b.id, gen_random_uuid() from bronze.b b on conflict (id) do nothing;
  return 1;
end $$;

create function silver.c17() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.t (id, key)
  select b.id, nextval('silver.s') from bronze.b b where not exists (select from silver.t t where t.id = b.id);
  return 1;
end $$;

create function silver.c18() returns bigint language plpgsql set search_path = '' as $$
begin
  with q as (select b.id, b.at from bronze.b b)
  insert into silver.t (id, at) select * from q on conflict (id) do nothing;
  insert into silver.t (id, at) select s.* from (select b.id, b.at from bronze.b b) s on conflict (id) do nothing;
  return 1;
end $$;

create function silver.c19() returns bigint language plpgsql set search_path = '' as $$
declare
  v_row silver.t%rowtype;
begin
  for v_row in select t.* from silver.t t order by t.id loop
    v_row.at := now();
    update silver.t set at = v_row.at where id = v_row.id;
  end loop;
  return 1;
end $$;

create function silver.c20() returns trigger language plpgsql set search_path = '' as $$
begin
  insert into silver.history select old.*;
  return new;
end $$;

create function silver.c21() returns bigint language sql set search_path = '' begin atomic
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  select case when true then 1 else 2 end::bigint;
end;

create function silver.c22(how text default 'incremental') returns bigint language plpgsql set search_path = '' as $$
begin
  update silver.t set n = n + 1 where how = 'full';
  return 1;
end $$;

create function silver.c23(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  if p_mode in ('full', 'rebuild') or p_mode is null then
    truncate silver.t;
  end if;
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
end $$;

create function silver.c24(p_mode text) returns bigint language plpgsql set search_path = '' as $$
begin
  if coalesce(p_mode, 'full') = 'full' then
    drop table if exists silver.t;
    create table silver.t as select b.id from bronze.b b;
    return 0;
  end if;
  insert into silver.t (id) select b.id from bronze.b b on conflict (id) do nothing;
  return 1;
end $$;
