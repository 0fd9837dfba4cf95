-- A warehouse as it grew: thirty routines in three schemas, by several hands. `call silver.load_everything()` is how
-- it is run today.

create schema bronze;
create schema silver;
create schema mart;
create schema "Stage Area";

create table bronze.crm_customers (cust_id text, cust_name text, country text, loaded_at timestamptz not null default now());
create table bronze.crm_regions (code text, label text);
create table bronze.erp_products (sku text, title text, price text, family text, loaded_at timestamptz not null default now());
create table bronze.erp_families (family text, label text);
create table bronze.shop_orders (order_no bigint generated always as identity (cache 1) primary key, cust_id text, sku text, qty text, status text,
                                 ordered_on text, loaded_at timestamptz not null default now());
create table bronze.shop_returns (order_no bigint, qty int, loaded_at timestamptz not null default now());
create table bronze.fx_rates (day date, currency text, rate numeric);
create table bronze.clicks (click_id bigint, cust_id text, at timestamptz not null);
create table bronze."Legacy Stores" ("Store No" text, "City" text);

create table silver.etl_log (log_id bigint generated always as identity, at timestamptz default clock_timestamp(), step text, note text);
create table silver.regions (region_code text primary key, region_name text not null);
create table silver.dim_customers (customer_id bigint primary key, name text, region_code text references silver.regions, is_active boolean not null default true);
create table silver.families (family text primary key, label text);
create table silver.products (sku text primary key, title text, price numeric, family text references silver.families);
create table silver.orders (order_no bigint primary key, customer_id bigint references silver.dim_customers, sku text references silver.products,
                            qty int, amount numeric, ordered_on date);
create table silver.returns (order_no bigint primary key, qty int);
create table silver.fact_daily_sales (day date, sku text, qty bigint, amount numeric, primary key (day, sku));
create table silver.customer_value (customer_id bigint primary key, amount numeric, segment text);
create table silver.segments (segment text primary key, members bigint, threshold numeric);
create table silver.fx (day date, currency text, rate numeric, primary key (day, currency));
create table silver.clicks (click_id bigint primary key, customer_id bigint, at timestamptz);
create table silver.sessions (customer_id bigint, started_at timestamptz, clicks bigint, primary key (customer_id, started_at));
create table silver.dim_calendar (day date primary key, is_weekend boolean);
create table silver."Stores" ("Store No" text primary key, city text);
create table silver.stg_prices (sku text, price numeric);
create table silver.price_history (sku text, price numeric, seen_on date, primary key (sku, seen_on));
create table silver.order_flags (order_no bigint primary key, is_returned boolean);
create table silver.alerts (alert text primary key, hits bigint);
create table silver.audit_orders (order_no bigint, changed_at timestamptz default clock_timestamp());
create table mart.top_customers (customer_id bigint primary key, amount numeric);
create table mart.kpis (kpi text primary key, value numeric);
create table mart.kpi_notes (kpi text primary key, note text);
create table "Stage Area"."Raw Copy" (sku text primary key, title text);

-- Helpers that transform nothing.

create function silver.to_number(p_text text) returns numeric language plpgsql immutable as $$
begin
  return replace(nullif(trim(p_text), ''), ',', '.')::numeric;
exception when others then
  return null;
end $$;

create function silver.customer_key(p_text text) returns bigint language sql immutable as $$ select nullif(regexp_replace(p_text, '\D', '', 'g'), '')::bigint $$;

create procedure silver.log(p_step text, p_note text default null) language sql as $$ insert into silver.etl_log (step, note) values (p_step, p_note) $$;

create function silver.current_rate(p_currency text) returns numeric language sql stable as $$
  select f.rate from silver.fx f where f.currency = p_currency order by f.day desc limit 1
$$;

create function silver.touch_audit() returns trigger language plpgsql as $$
begin
  insert into silver.audit_orders (order_no) values (new.order_no);
  return new;
end $$;
create trigger orders_audit after insert or update on silver.orders for each row execute function silver.touch_audit();

-- Truncate and reload.

create procedure silver.load_regions() language plpgsql as $$
begin
  call silver.log('regions', 'start');
  delete from silver.regions r where not exists (select from silver.dim_customers c where c.region_code = r.region_code);
  insert into silver.regions (region_code, region_name) select upper(code), label from bronze.crm_regions
  on conflict (region_code) do update set region_name = excluded.region_name;
end $$;

create procedure silver.load_customers() language plpgsql as $$
declare
  v_count bigint;
begin
  insert into silver.dim_customers as d (customer_id, name, region_code)
  select distinct on (silver.customer_key(c.cust_id)) silver.customer_key(c.cust_id), initcap(trim(c.cust_name)), r.region_code
    from bronze.crm_customers c left join silver.regions r on r.region_code = upper(c.country)
   where silver.customer_key(c.cust_id) is not null
   order by silver.customer_key(c.cust_id), c.loaded_at desc
  on conflict (customer_id) do update set name = excluded.name, region_code = excluded.region_code;
  get diagnostics v_count = row_count;
  call silver.log('customers', v_count::text);
exception when others then
  call silver.log('customers', sqlerrm);
end $$;

create procedure silver.load_families() language sql as $$
  insert into silver.families (family, label) select family, label from bronze.erp_families on conflict (family) do update set label = excluded.label;
$$;

create function silver.load_products() returns integer language plpgsql as $$
declare
  n integer;
begin
  truncate silver.stg_prices;
  insert into silver.stg_prices (sku, price) select sku, silver.to_number(price) from bronze.erp_products;
  insert into silver.products (sku, title, price, family)
  select distinct on (p.sku) p.sku, p.title, s.price, p.family from bronze.erp_products p join silver.stg_prices s using (sku)
   order by p.sku, p.loaded_at desc
  on conflict (sku) do update set title = excluded.title, price = excluded.price, family = excluded.family;
  get diagnostics n = row_count;
  return n;
end $$;

-- OUT arguments, and an overload.

create procedure silver.load_orders(out p_inserted bigint, out p_rejected bigint) language plpgsql as $$
begin
  insert into silver.orders (order_no, customer_id, sku, qty, amount, ordered_on)
  select o.order_no, c.customer_id, p.sku, o.qty::int, o.qty::int * p.price, to_date(o.ordered_on, 'YYYYMMDD')
    from bronze.shop_orders o join silver.dim_customers c on c.customer_id = silver.customer_key(o.cust_id) join silver.products p on p.sku = o.sku
   where o.qty ~ '^\d+$'
  on conflict (order_no) do update set qty = excluded.qty, amount = excluded.amount;
  get diagnostics p_inserted = row_count;
  select count(*) into p_rejected from bronze.shop_orders o where o.qty !~ '^\d+$';
end $$;

create procedure silver.load_returns() language plpgsql as $$
begin
  truncate silver.returns;
  insert into silver.returns (order_no, qty) select r.order_no, sum(r.qty) from bronze.shop_returns r group by r.order_no;
end $$;

create procedure silver.load_returns(p_only bigint) language plpgsql as $$
begin
  delete from silver.returns where order_no = p_only;
  insert into silver.returns (order_no, qty) select r.order_no, sum(r.qty) from bronze.shop_returns r where r.order_no = p_only group by r.order_no;
end $$;

-- Ends its own transactions.

create procedure silver.load_clicks() language plpgsql as $$
begin
  insert into silver.clicks (click_id, customer_id, at) select c.click_id, silver.customer_key(c.cust_id), c.at from bronze.clicks c on conflict do nothing;
  commit;
end $$;

create procedure silver.load_calendar() language plpgsql as $$
begin
  for v_month in 1 .. 12 loop
    insert into silver.dim_calendar (day, is_weekend)
    select d::date, extract(isodow from d) > 5 from generate_series(make_date(2026, v_month, 1), make_date(2026, v_month, 1) + interval '1 month - 1 day', '1 day') d
    on conflict do nothing;
    if v_month % 6 = 0 then commit; end if;
  end loop;
end $$;

-- Incremental already, with names of their own.

create function silver.load_fx(in_from timestamptz default null, in_until timestamptz default null) returns bigint language plpgsql as $$
declare
  n bigint;
begin
  insert into silver.fx (day, currency, rate) select distinct on (day, currency) day, currency, rate from bronze.fx_rates order by day, currency, rate
  on conflict (day, currency) do update set rate = excluded.rate;
  get diagnostics n = row_count;
  return n;
end $$;

create function silver.load_price_history(p_since timestamptz, p_until timestamptz) returns bigint language plpgsql as $$
declare
  n bigint;
begin
  insert into silver.price_history (sku, price, seen_on)
  select distinct on (p.sku, p.loaded_at::date) p.sku, silver.to_number(p.price), p.loaded_at::date
    from bronze.erp_products p
   where (p_since is null or p.loaded_at >= p_since) and p.loaded_at < p_until
   order by p.sku, p.loaded_at::date, p.loaded_at desc
  on conflict (sku, seen_on) do update set price = excluded.price;
  get diagnostics n = row_count;
  return n;
end $$;

create function silver.load_sessions(in_from timestamptz, in_to timestamptz) returns bigint language plpgsql as $$
declare
  n bigint;
begin
  insert into silver.sessions (customer_id, started_at, clicks)
  select silver.customer_key(c.cust_id), date_trunc('hour', c.at), count(*) from bronze.clicks c
   where c.at >= coalesce(in_from, '-infinity') and c.at < in_to and silver.customer_key(c.cust_id) is not null group by 1, 2
  on conflict (customer_id, started_at) do update set clicks = excluded.clicks;
  get diagnostics n = row_count;
  return n;
end $$;

-- A circle through tables: the segments decide the value, the value the segments.

create procedure silver.load_customer_value() language plpgsql as $$
begin
  insert into silver.customer_value as v (customer_id, amount, segment)
  select o.customer_id, sum(o.amount), coalesce((select s.segment from silver.segments s where s.threshold <= sum(o.amount) order by s.threshold desc limit 1), 'none')
    from silver.orders o group by o.customer_id
  on conflict (customer_id) do update set amount = excluded.amount, segment = excluded.segment;
end $$;

create procedure silver.load_segments() language plpgsql as $$
begin
  insert into silver.segments (segment, members, threshold)
  select s.segment, (select count(*) from silver.customer_value v where v.amount >= s.threshold), s.threshold
    from (values ('gold', 100.0), ('silver', 20.0)) s(segment, threshold)
  on conflict (segment) do update set members = excluded.members;
end $$;

-- Without a schema, and with one set.

create procedure silver.load_daily_sales() language plpgsql set search_path = silver as $$
begin
  delete from fact_daily_sales where true;
  insert into fact_daily_sales (day, sku, qty, amount) select o.ordered_on, o.sku, sum(o.qty), sum(o.amount) from orders o group by o.ordered_on, o.sku;
end $$;

create procedure silver.load_order_flags() language plpgsql as $$
begin
  insert into order_flags (order_no, is_returned) select o.order_no, exists (select from returns r where r.order_no = o.order_no) from orders o
  on conflict (order_no) do update set is_returned = excluded.is_returned;
end $$;

-- Names that need quotes.

create procedure silver."Load Stores"() language plpgsql as $$
begin
  insert into silver."Stores" ("Store No", city) select s."Store No", trim(s."City") from bronze."Legacy Stores" s
  on conflict ("Store No") do update set city = excluded.city;
end $$;

create function "Stage Area"."Copy Products"() returns bigint language sql as $$
  with copied as (insert into "Stage Area"."Raw Copy" (sku, title) select p.sku, p.title from silver.products p
                  on conflict (sku) do update set title = excluded.title returning 1)
  select count(*) from copied
$$;

-- Dynamic SQL, and one that nobody can read beforehand.

create procedure silver.load_alerts() language plpgsql as $$
begin
  execute format('delete from silver.%I where true', 'alerts');
  execute 'insert into silver.alerts (alert, hits) select ''late'', count(*) from silver.orders where ordered_on < current_date';
end $$;

create procedure silver.run_from_table() language plpgsql as $$
declare
  v_sql text;
begin
  for v_sql in select note from silver.etl_log where step = 'sql' loop
    execute v_sql;
  end loop;
end $$;

-- Needs a value that somebody must give.

create procedure silver.purge_orders(p_before date) language plpgsql as $$
begin
  delete from silver.orders where ordered_on < p_before;
end $$;

-- Another schema, two writers of one table, and one routine that loads three.

create procedure mart.load_top_customers() language plpgsql as $$
begin
  truncate mart.top_customers;
  insert into mart.top_customers (customer_id, amount) select v.customer_id, v.amount from silver.customer_value v order by v.amount desc, v.customer_id limit 3;
end $$;

create procedure mart.load_kpis() language plpgsql as $$
declare
  v_started timestamptz := clock_timestamp();
begin
  call silver.log('kpis', 'start');
  create temp table kpi_sums on commit drop as select sum(o.amount) as revenue, count(*) as orders from silver.orders o;
  truncate mart.kpis;
  insert into mart.kpis (kpi, value) select 'revenue', s.revenue from kpi_sums s;
  insert into mart.kpis (kpi, value) select 'orders', s.orders from kpi_sums s;
  truncate mart.kpi_notes;
  insert into mart.kpi_notes (kpi, note) select k.kpi, 'of ' || (select count(*) from mart.kpis) from mart.kpis k;
  call silver.log('kpis', (clock_timestamp() - v_started)::text);
exception when others then
  call silver.log('kpis', sqlerrm);
  raise;
end $$;

create procedure mart.fix_kpis() language sql as $$
  insert into mart.kpis (kpi, value) select 'customers', count(*) from silver.dim_customers on conflict (kpi) do update set value = excluded.value;
$$;

-- On top.

create view silver.v_orders as select o.*, c.name from silver.orders o join silver.dim_customers c using (customer_id);
create materialized view mart.mv_sales as select day, sum(amount) as amount from silver.fact_daily_sales group by day;
create materialized view mart.mv_share as select day, amount / nullif(sum(amount) over (), 0) as share from mart.mv_sales;
create materialized view mart."MV Customers" as select name, count(*) as orders from silver.v_orders group by name;

-- Today's pipeline.

create procedure silver.load_everything() language plpgsql as $$
declare
  v_inserted bigint;
  v_rejected bigint;
begin
  call silver.load_regions();
  call silver.load_customers();
  call silver.load_families();
  perform silver.load_products();
  call silver.load_orders(v_inserted, v_rejected);
  call silver.load_returns();
  perform silver.load_fx();
  call silver.load_customer_value();
  call silver.load_segments();
  call silver.load_daily_sales();
  call silver."Load Stores"();
  perform "Stage Area"."Copy Products"();
  call silver.load_alerts();
  call mart.load_top_customers();
  call mart.load_kpis();
  call mart.fix_kpis();
end $$;
