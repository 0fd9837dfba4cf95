-- Judged with transformations.yaml beside it. `--> CODE` marks the line of a finding; there are no others.

create function silver.load_regions() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.regions (id)
  select distinct o.region_id from silver.orders o --> B301 B303
  on conflict (id) do nothing;
  return 1;
end $$;

create function silver.load_customers(p_since timestamp, --> B101
  p_until timestamptz, region text) --> B101
returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.customers
  select c.id from bronze.customers c where c.at >= p_since and c.at < p_until and c.region = $3
  on conflict (id) do nothing;
  insert into silver.regions (id) select c.region_id from bronze.customers c on conflict (id) do nothing; --> B304
  return 1;
end $$;

create function silver.load_orders(how text, from_id bigint, to_id bigint) returns bigint --> B101
language plpgsql set search_path = '' as $$
begin
  if how = 'full' then
    truncate silver.orders;
  end if;
  insert into silver.orders (id)
  select o.id from bronze.orders o
    join silver.customers c on c.id = o.customer_id --> B301
   where o.id > from_id --> B406
     and o.id < to_id
  on conflict (id) do nothing;
  delete from landing.orders where id < to_id; --> B305
  return 1;
end $$;

create function silver.load_totals(p_run_id text) returns bigint --> B101
language plpgsql set search_path = '' as $$
begin
  delete from silver.totals where true;
  insert into silver.totals (day, n) select o.day, count(*) from silver.orders o
   where o.day < current_date --> B404
   group by o.day;
  return 1;
end $$;

create function silver.load_archive() returns bigint language plpgsql set search_path = '' as $$
begin
  merge into silver.archive a using silver.totals t on t.day = a.day
   when not matched then insert (day, n) values (t.day, t.n) returning a.day;
  perform silver.regions_of_today(); --> B301
  return 1;
end $$;

create function silver.regions_of_today() returns bigint language sql set search_path = '' as $$
  select silver.count_of_regions()
$$;

create function silver.count_of_regions() returns bigint language sql set search_path = '' as $$
  select count(*) from silver.regions
$$;

create function silver.helper() returns void language plpgsql set search_path = '' as $$
begin
  truncate silver.scratch;
  insert into silver.scratch select * from silver.orders;
end $$;
