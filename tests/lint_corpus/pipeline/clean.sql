-- Judged with transformations.yaml beside it. Nothing is found here.

create function silver.load_regions(p_run_id bigint default null) returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.regions (id, run_id) select b.id, p_run_id from bronze.regions b on conflict (id) do nothing;
  return 1;
end $$;

create function silver.load_customers(p_since timestamptz, p_until timestamptz, batch int default 1) returns bigint
language plpgsql set search_path = '' as $$
begin
  insert into silver.customers select c.id from bronze.customers c where c.at >= p_since and c.at < p_until on conflict (id) do nothing;
  return batch;
end $$;

create procedure silver.load_orders(how text, from_id bigint, to_id bigint, p_country text, inout p_rows bigint)
language plpgsql set search_path = '' as $$
begin
  if how = 'full' then truncate silver.orders; end if;
  insert into silver.orders (id) select o.id from bronze.orders o
   where o.country = p_country and (from_id is null or o.id >= from_id) and o.id < to_id on conflict (id) do nothing;
  get diagnostics p_rows = row_count;
end $$;

create function silver.load_totals() returns bigint language sql set search_path = '' as $$
  with gone as (delete from silver.totals where true), new as (
    insert into silver.totals (day, n) select o.day, count(*) from silver.orders o group by o.day returning 1)
  select count(*) from new
$$;

create function silver.load_archive() returns bigint language plpgsql set search_path = '' as $$
begin
  insert into silver.archive (day, n)
  select t.day, t.n from silver.totals t join silver.orders o on o.day = t.day on conflict (day) do nothing;
  return silver.count_of_orders();
end $$;

create function silver.count_of_orders() returns bigint language sql set search_path = '' as $$
  select count(*) from silver.orders
$$;
