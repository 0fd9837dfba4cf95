-- Silver of the worked pipeline: the target tables, one routine for each of them, and two materialized views.
--
-- How the routines are written, and why:
--
--   * A routine declares what it wants to be told: p_mode, p_since, p_until, p_run_id, and parameters of its own. It returns the
--     number of rows it wrote. It never commits; whoever calls it decides about the transaction.
--   * The window [p_since, p_until) chooses KEYS: everything about which any source table received a row in that time. Each
--     chosen key is then computed anew from all of its rows, and the newest row wins. So a late correction arrives
--     whichever table it came to, and reading an old window again (a backfill) can never put an older version back.
--   * Writes are upserts that leave equal rows alone. The same window twice writes nothing the second time.
--   * p_mode 'full' empties the target and fills it again, in the caller's transaction: readers see the old rows until the commit.
--
-- Facts have no foreign keys to dimensions: an order may arrive before its customer does. transformations.yaml checks that instead.
-- The file can be run again at any time, after bronze.sql. Run it as a superuser, or as a member of etl_owner.

create schema if not exists silver;
alter schema silver owner to etl_owner;
comment on schema silver is 'Clean, typed and keyed tables, kept up to date from bronze.';

create schema if not exists mart;
alter schema mart owner to etl_owner;
comment on schema mart is 'Materialized views for reports, refreshed after a run.';

-- Cleaning helpers ---------------------------------------------------------------------------------------------------------
-- One expression each, and no SET clause, so that the planner can inline them.

create or replace function silver.clean(value text) returns text
language sql immutable parallel safe as $$ select nullif(btrim(value, e' \t\r\n'), '') $$;
comment on function silver.clean(text) is 'The text without surrounding white space; null when nothing is left.';

create or replace function silver.to_id(value text) returns bigint
language sql immutable parallel safe as $$
  select case when silver.clean(value) ~ '^[0-9]{1,18}$' then silver.clean(value)::bigint end
$$;
comment on function silver.to_id(text) is 'A whole number without sign; null when the text is none.';

create or replace function silver.to_number(value text) returns numeric
language sql immutable parallel safe as $$
  select case when silver.clean(value) ~ '^-?[0-9]{1,12}(\.[0-9]{1,6})?$' then silver.clean(value)::numeric end
$$;
comment on function silver.to_number(text) is 'A decimal number; null when the text is none.';

create or replace function silver.to_day(value text) returns date
language sql immutable parallel safe as $$
  select case
    when silver.clean(value) !~ '^([1-9][0-9]{3})-?(0[1-9]|1[0-2])-?(0[1-9]|[12][0-9]|3[01])$' then null
    when right(silver.clean(value), 2)::integer <= extract(day from
           make_date(left(silver.clean(value), 4)::integer, substr(translate(silver.clean(value), '-', ''), 5, 2)::integer, 1)
           + interval '1 month - 1 day')
      then make_date(left(silver.clean(value), 4)::integer, substr(translate(silver.clean(value), '-', ''), 5, 2)::integer,
                     right(silver.clean(value), 2)::integer)
  end
$$;
comment on function silver.to_day(text) is
  'A day written YYYYMMDD or YYYY-MM-DD; null for anything else, and for days that no calendar has.';

create or replace function silver.to_customer_key(value text) returns text
language sql immutable parallel safe as $$
  select nullif(regexp_replace(replace(upper(silver.clean(value)), '-', ''), '^NAS', ''), '')
$$;
comment on function silver.to_customer_key(text) is
  'The key all systems share: the ERP writes NASAW00011000 or AW-00011000 where the CRM writes AW00011000.';

create or replace function silver.to_gender(value text) returns text
language sql immutable parallel safe as $$
  select case when upper(silver.clean(value)) in ('M', 'MALE') then 'Male'
              when upper(silver.clean(value)) in ('F', 'FEMALE') then 'Female' end
$$;
comment on function silver.to_gender(text) is 'Male or Female; null when the source does not say.';

create or replace function silver.to_country(value text) returns text
language sql immutable parallel safe as $$
  select case replace(upper(silver.clean(value)), '.', '')
    when 'AU' then 'Australia'
    when 'CA' then 'Canada'
    when 'DE' then 'Germany'
    when 'FR' then 'France'
    when 'GB' then 'United Kingdom'
    when 'UK' then 'United Kingdom'
    when 'US' then 'United States'
    when 'USA' then 'United States'
    else coalesce(initcap(silver.clean(value)), 'n/a')
  end
$$;
comment on function silver.to_country(text) is 'The name of a country, for a name or a usual short form; n/a when there is none.';

-- dim_categories -----------------------------------------------------------------------------------------------------------

create table if not exists silver.dim_categories (
  category_id     text primary key,
  category        text not null,
  subcategory     text not null,
  has_maintenance boolean,
  run_id          bigint,
  updated_at      timestamptz not null default clock_timestamp()
);
alter table silver.dim_categories owner to etl_owner;
comment on table silver.dim_categories is 'Product categories, one row per category_id.';
comment on column silver.dim_categories.run_id is 'The run that wrote this version of the row; null after a call by hand.';

-- A procedure, to show that shape: the count goes out through an INOUT argument. It has no window, because a table of a few
-- dozen rows is cheaper to compare as a whole than to keep a watermark for.
create or replace procedure silver.load_categories(inout p_rows bigint default null, p_run_id bigint default null)
language plpgsql set search_path = '' as $$
begin
  insert into silver.dim_categories as t (category_id, category, subcategory, has_maintenance, run_id)
  select distinct on (upper(silver.clean(c.id)))
         upper(silver.clean(c.id)), coalesce(silver.clean(c.cat), 'n/a'), coalesce(silver.clean(c.subcat), 'n/a'),
         case upper(silver.clean(c.maintenance)) when 'YES' then true when 'NO' then false end, p_run_id
    from bronze.erp_px_cat_g1v2 c
   where silver.clean(c.id) is not null
   order by upper(silver.clean(c.id)), c.ingested_at desc, c.ctid desc
  on conflict (category_id) do update
    set category = excluded.category, subcategory = excluded.subcategory, has_maintenance = excluded.has_maintenance,
        run_id = excluded.run_id, updated_at = excluded.updated_at
  where (t.category, t.subcategory, t.has_maintenance)
        is distinct from (excluded.category, excluded.subcategory, excluded.has_maintenance);
  get diagnostics p_rows = row_count;
end $$;
alter procedure silver.load_categories(bigint, bigint) owner to etl_owner;
comment on procedure silver.load_categories(bigint, bigint) is
  'Loads silver.dim_categories from bronze.erp_px_cat_g1v2; p_rows comes back as the number of rows written.';

-- dim_locations ------------------------------------------------------------------------------------------------------------

create table if not exists silver.dim_locations (
  customer_key text primary key,
  country      text not null,
  run_id       bigint,
  updated_at   timestamptz not null default clock_timestamp()
);
alter table silver.dim_locations owner to etl_owner;
comment on table silver.dim_locations is 'Where a customer lives, one row per customer_key.';
comment on column silver.dim_locations.country is 'Full English name; n/a when the ERP does not know it.';
comment on column silver.dim_locations.run_id is 'The run that wrote this version of the row; null after a call by hand.';

-- The arguments have names of their own, as a routine does that is older than the pipeline; `args` in transformations.yaml
-- maps them.
create or replace function silver.load_locations(
  refresh_mode text default 'incremental', from_ts timestamptz default null, to_ts timestamptz default null,
  p_run_id bigint default null)
returns bigint language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  if refresh_mode = 'full' then
    delete from silver.dim_locations;
  end if;

  insert into silver.dim_locations as t (customer_key, country, run_id)
  select distinct on (silver.to_customer_key(l.cid))
         silver.to_customer_key(l.cid), silver.to_country(l.cntry), p_run_id
    from bronze.erp_loc_a101 l
   where silver.to_customer_key(l.cid) in (
           select silver.to_customer_key(w.cid) from bronze.erp_loc_a101 w
            where (from_ts is null or w.ingested_at >= from_ts) and (to_ts is null or w.ingested_at < to_ts))
   order by silver.to_customer_key(l.cid), l.ingested_at desc, l.ctid desc
  on conflict (customer_key) do update
    set country = excluded.country, run_id = excluded.run_id, updated_at = excluded.updated_at
  where t.country is distinct from excluded.country;
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
alter function silver.load_locations(text, timestamptz, timestamptz, bigint) owner to etl_owner;
comment on function silver.load_locations(text, timestamptz, timestamptz, bigint) is
  'Loads silver.dim_locations: country names made uniform, the newest row of a customer wins. Returns the rows written.';

-- dim_customers ------------------------------------------------------------------------------------------------------------

create table if not exists silver.dim_customers (
  customer_id    bigint primary key,
  customer_key   text not null,
  first_name     text,
  last_name      text,
  marital_status text not null,
  gender         text not null,
  birth_date     date,
  created_on     date,
  run_id         bigint,
  updated_at     timestamptz not null default clock_timestamp(),
  constraint marital_status_is_known check (marital_status in ('Single', 'Married', 'n/a')),
  constraint gender_is_known check (gender in ('Male', 'Female', 'n/a'))
);
create index if not exists dim_customers_customer_key_idx on silver.dim_customers (customer_key);
alter table silver.dim_customers owner to etl_owner;
comment on table silver.dim_customers is 'Customers of the CRM, completed from the ERP; one row per customer_id.';
comment on column silver.dim_customers.customer_key is 'The key the CRM and the ERP share, such as AW00011000.';
comment on column silver.dim_customers.gender is 'What the CRM says, else what the ERP says, else n/a.';
comment on column silver.dim_customers.birth_date is 'From the ERP; null when it is missing, no date, or in the future.';
comment on column silver.dim_customers.run_id is 'The run that wrote this version of the row; null after a call by hand.';

create or replace function silver.load_customers(
  p_mode text default 'incremental', p_since timestamptz default null, p_until timestamptz default null,
  p_run_id bigint default null)
returns bigint language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  if p_mode = 'full' then
    delete from silver.dim_customers;
  end if;

  insert into silver.dim_customers as t
         (customer_id, customer_key, first_name, last_name, marital_status, gender, birth_date, created_on, run_id)
  with touched as (                                             -- customers with news in the CRM, or in the ERP
    select silver.to_id(c.cst_id) as customer_id
      from bronze.crm_cust_info c
     where (p_since is null or c.ingested_at >= p_since) and (p_until is null or c.ingested_at < p_until)
    union
    select silver.to_id(c.cst_id)
      from bronze.erp_cust_az12 e
      join bronze.crm_cust_info c on silver.to_customer_key(c.cst_key) = silver.to_customer_key(e.cid)
     where (p_since is null or e.ingested_at >= p_since) and (p_until is null or e.ingested_at < p_until)
  ), crm as (
    select distinct on (silver.to_id(c.cst_id))
           silver.to_id(c.cst_id) as customer_id, silver.to_customer_key(c.cst_key) as customer_key, c.*
      from bronze.crm_cust_info c
     where silver.to_id(c.cst_id) in (select t.customer_id from touched t) and silver.to_customer_key(c.cst_key) is not null
     order by silver.to_id(c.cst_id), silver.to_day(c.cst_create_date) desc nulls last, c.ingested_at desc, c.ctid desc
  ), erp as (
    select distinct on (silver.to_customer_key(e.cid))
           silver.to_customer_key(e.cid) as customer_key, silver.to_day(e.bdate) as birth_date, silver.to_gender(e.gen) as gender
      from bronze.erp_cust_az12 e
     where silver.to_customer_key(e.cid) in (select c.customer_key from crm c)
     order by silver.to_customer_key(e.cid), e.ingested_at desc, e.ctid desc
  )
  select crm.customer_id, crm.customer_key, silver.clean(crm.cst_firstname), silver.clean(crm.cst_lastname),
         case upper(silver.clean(crm.cst_marital_status)) when 'S' then 'Single' when 'M' then 'Married' else 'n/a' end,
         coalesce(silver.to_gender(crm.cst_gndr), erp.gender, 'n/a'),
         case when erp.birth_date <= current_date then erp.birth_date end,
         silver.to_day(crm.cst_create_date), p_run_id
    from crm
    left join erp using (customer_key)
  on conflict (customer_id) do update
    set customer_key = excluded.customer_key, first_name = excluded.first_name, last_name = excluded.last_name,
        marital_status = excluded.marital_status, gender = excluded.gender, birth_date = excluded.birth_date,
        created_on = excluded.created_on, run_id = excluded.run_id, updated_at = excluded.updated_at
  where (t.customer_key, t.first_name, t.last_name, t.marital_status, t.gender, t.birth_date, t.created_on)
        is distinct from (excluded.customer_key, excluded.first_name, excluded.last_name, excluded.marital_status,
                          excluded.gender, excluded.birth_date, excluded.created_on);
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
alter function silver.load_customers(text, timestamptz, timestamptz, bigint) owner to etl_owner;
comment on function silver.load_customers(text, timestamptz, timestamptz, bigint) is
  'Loads silver.dim_customers from the CRM and the ERP: the newest version of a customer, rows without a number dropped. '
  'Returns the rows written.';

-- dim_products -------------------------------------------------------------------------------------------------------------

create table if not exists silver.dim_products (
  product_id     bigint primary key,
  product_number text not null,
  category_id    text not null,
  product_name   text,
  cost           numeric(14, 2) not null,
  product_line   text not null,
  valid_from     date,
  valid_to       date,
  run_id         bigint,
  updated_at     timestamptz not null default clock_timestamp(),
  constraint cost_is_not_negative check (cost >= 0),
  constraint a_version_does_not_end_before_it_begins check (valid_to >= valid_from)
);
create index if not exists dim_products_product_number_idx on silver.dim_products (product_number);
alter table silver.dim_products owner to etl_owner;
comment on table silver.dim_products is
  'Versions of products: one row per product_id, several with the same product_number one after the other.';
comment on column silver.dim_products.product_number is
  'What an order line calls the product: prd_key without its first six characters.';
comment on column silver.dim_products.category_id is
  'The first five characters of prd_key, as silver.dim_categories writes them.';
comment on column silver.dim_products.valid_to is
  'The day before the next version begins; null while the version is current. The source''s own end dates are wrong.';
comment on column silver.dim_products.run_id is 'The run that wrote this version of the row; null after a call by hand.';

create or replace function silver.load_products(
  p_mode text default 'incremental', p_since timestamptz default null, p_until timestamptz default null,
  p_run_id bigint default null)
returns bigint language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  if p_mode = 'full' then
    delete from silver.dim_products;
  end if;

  insert into silver.dim_products as t
         (product_id, product_number, category_id, product_name, cost, product_line, valid_from, valid_to, run_id)
  with touched as (                                             -- a new version also ends the one before it: take all of a key
    select silver.clean(k.prd_key) as prd_key
      from bronze.crm_prd_info w
      join bronze.crm_prd_info k on silver.to_id(k.prd_id) = silver.to_id(w.prd_id)
     where (p_since is null or w.ingested_at >= p_since) and (p_until is null or w.ingested_at < p_until)
  ), newest as (
    select distinct on (silver.to_id(p.prd_id))
           silver.to_id(p.prd_id) as product_id, silver.to_day(p.prd_start_dt) as valid_from, p.*
      from bronze.crm_prd_info p
     where silver.to_id(p.prd_id) is not null and length(silver.clean(p.prd_key)) > 6
     order by silver.to_id(p.prd_id), p.ingested_at desc, p.ctid desc
  ), version as (
    select n.*, min(n.valid_from) over (partition by silver.clean(n.prd_key) order by n.valid_from
                  range between interval '1 day' following and unbounded following) - 1 as valid_to
      from newest n
  )
  select v.product_id, substr(silver.clean(v.prd_key), 7), replace(left(silver.clean(v.prd_key), 5), '-', '_'),
         silver.clean(v.prd_nm), greatest(coalesce(silver.to_number(v.prd_cost), 0), 0),
         case upper(silver.clean(v.prd_line))
           when 'M' then 'Mountain' when 'R' then 'Road' when 'S' then 'Other sales' when 'T' then 'Touring' else 'n/a' end,
         v.valid_from, v.valid_to, p_run_id
    from version v
   where silver.clean(v.prd_key) in (select k.prd_key from touched k)
  on conflict (product_id) do update
    set product_number = excluded.product_number, category_id = excluded.category_id, product_name = excluded.product_name,
        cost = excluded.cost, product_line = excluded.product_line, valid_from = excluded.valid_from,
        valid_to = excluded.valid_to, run_id = excluded.run_id, updated_at = excluded.updated_at
  where (t.product_number, t.category_id, t.product_name, t.cost, t.product_line, t.valid_from, t.valid_to)
        is distinct from (excluded.product_number, excluded.category_id, excluded.product_name, excluded.cost,
                          excluded.product_line, excluded.valid_from, excluded.valid_to);
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
alter function silver.load_products(text, timestamptz, timestamptz, bigint) owner to etl_owner;
comment on function silver.load_products(text, timestamptz, timestamptz, bigint) is
  'Loads silver.dim_products from bronze.crm_prd_info: keys split, codes spelled out, end dates derived. '
  'Returns the rows written.';

-- fact_sales ---------------------------------------------------------------------------------------------------------------

create table if not exists silver.fact_sales (
  order_number   text not null,
  product_number text not null,
  customer_id    bigint,
  order_date     date,
  ship_date      date,
  due_date       date,
  quantity       integer,
  unit_price     numeric(14, 2),
  sales_amount   numeric(18, 2),
  repairs        text[] not null,
  run_id         bigint,
  updated_at     timestamptz not null default clock_timestamp(),
  primary key (order_number, product_number),
  constraint quantity_is_positive check (quantity > 0),
  constraint unit_price_is_positive check (unit_price > 0),
  constraint sales_amount_is_positive check (sales_amount > 0)
);
create index if not exists fact_sales_customer_id_idx on silver.fact_sales (customer_id);
alter table silver.fact_sales owner to etl_owner;
comment on table silver.fact_sales is 'Order lines, one row per order and product.';
comment on column silver.fact_sales.repairs is
  'The columns whose value is not what the source sent; empty for a line taken as it came.';
comment on column silver.fact_sales.sales_amount is
  'quantity * unit_price; what the source sent, without sign, when it sent no usable price.';
comment on column silver.fact_sales.run_id is 'The run that wrote this version of the row; null after a call by hand.';

create or replace function silver.load_sales(
  p_mode text default 'incremental', p_since timestamptz default null, p_until timestamptz default null,
  p_run_id bigint default null, order_date_fallback text default 'none', max_quantity integer default 1000)
returns bigint language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  if p_mode = 'full' then
    delete from silver.fact_sales;
  end if;

  insert into silver.fact_sales as t
         (order_number, product_number, customer_id, order_date, ship_date, due_date,
          quantity, unit_price, sales_amount, repairs, run_id)
  with touched as (
    select w.sls_ord_num, w.sls_prd_key
      from bronze.crm_sales_details w
     where (p_since is null or w.ingested_at >= p_since) and (p_until is null or w.ingested_at < p_until)
  ), newest as (
    select distinct on (silver.clean(s.sls_ord_num), silver.clean(s.sls_prd_key))
           silver.clean(s.sls_ord_num) as order_number, silver.clean(s.sls_prd_key) as product_number,
           silver.to_id(s.sls_cust_id) as customer_id, silver.to_day(s.sls_order_dt) as order_date,
           silver.to_day(s.sls_ship_dt) as ship_date, silver.to_day(s.sls_due_dt) as due_date,
           silver.to_number(s.sls_quantity) as quantity, silver.to_number(s.sls_price) as price,
           silver.to_number(s.sls_sales) as sales
      from bronze.crm_sales_details s
     where (silver.clean(s.sls_ord_num), silver.clean(s.sls_prd_key)) in (
             select silver.clean(k.sls_ord_num), silver.clean(k.sls_prd_key) from touched k)
     order by silver.clean(s.sls_ord_num), silver.clean(s.sls_prd_key), s.ingested_at desc, s.ctid desc
  )
  select n.order_number, n.product_number, n.customer_id, d.order_date, n.ship_date, n.due_date,
         q.quantity, p.unit_price, a.sales_amount,
         array_remove(array[case when n.order_date is null then 'order_date' end,
                            case when n.ship_date is null then 'ship_date' end,
                            case when n.due_date is null then 'due_date' end,
                            case when n.quantity is distinct from q.quantity then 'quantity' end,
                            case when n.price is distinct from p.unit_price then 'unit_price' end,
                            case when n.sales is distinct from a.sales_amount then 'sales_amount' end], null),
         p_run_id
    from newest n
    cross join lateral (
      select coalesce(n.order_date, case when order_date_fallback = 'ship_date' then n.ship_date end) as order_date) d
    cross join lateral (select nullif(abs(n.price), 0) as price, nullif(abs(n.sales), 0) as sales) u
    cross join lateral (                                        -- an impossible quantity: what the amounts say, if possible
      select case when n.quantity between 1 and max_quantity and n.quantity % 1 = 0 then n.quantity
                  when u.sales / u.price between 1 and max_quantity and u.sales % u.price = 0 then u.sales / u.price
             end::integer as quantity) q
    cross join lateral (select round(coalesce(u.price, u.sales / q.quantity), 2) as unit_price) p
    cross join lateral (select coalesce(q.quantity * round(u.price, 2), round(u.sales, 2)) as sales_amount) a
  on conflict (order_number, product_number) do update
    set customer_id = excluded.customer_id, order_date = excluded.order_date, ship_date = excluded.ship_date,
        due_date = excluded.due_date, quantity = excluded.quantity, unit_price = excluded.unit_price,
        sales_amount = excluded.sales_amount, repairs = excluded.repairs, run_id = excluded.run_id,
        updated_at = excluded.updated_at
  where (t.customer_id, t.order_date, t.ship_date, t.due_date, t.quantity, t.unit_price, t.sales_amount, t.repairs)
        is distinct from (excluded.customer_id, excluded.order_date, excluded.ship_date, excluded.due_date, excluded.quantity,
                          excluded.unit_price, excluded.sales_amount, excluded.repairs);
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
alter function silver.load_sales(text, timestamptz, timestamptz, bigint, text, integer) owner to etl_owner;
comment on function silver.load_sales(text, timestamptz, timestamptz, bigint, text, integer) is
  'Loads silver.fact_sales from bronze.crm_sales_details and repairs dates and amounts. order_date_fallback ''ship_date'' puts the '
  'ship date where the order date is unusable; a quantity above max_quantity is taken for an error. Returns the rows written.';

create or replace function silver.sales_without_customer() returns bigint
language sql stable set search_path = '' as $$
  select count(*) from silver.fact_sales s
   where not exists (select from silver.dim_customers c where c.customer_id = s.customer_id)
$$;
alter function silver.sales_without_customer() owner to etl_owner;
comment on function silver.sales_without_customer() is
  'How many order lines name a customer that silver.dim_customers does not have: 0 is good.';

-- fact_orders --------------------------------------------------------------------------------------------------------------

create table if not exists silver.fact_orders (
  order_number     text primary key,
  customer_id      bigint not null,
  customer_count   integer not null,
  line_count       integer not null,
  quantity         bigint,
  order_amount     numeric(18, 2),
  first_order_date date,
  last_order_date  date,
  last_ship_date   date,
  is_repaired      boolean not null,
  run_id           bigint,
  updated_at       timestamptz not null default clock_timestamp(),
  constraint an_order_has_one_customer check (customer_count = 1),
  constraint an_order_has_lines check (line_count > 0)
);
create index if not exists fact_orders_customer_id_idx on silver.fact_orders (customer_id);
alter table silver.fact_orders owner to etl_owner;
comment on table silver.fact_orders is 'Orders, one row per order_number, summed up from silver.fact_sales.';
comment on column silver.fact_orders.customer_count is 'Different customers among the lines of the order; anything but one is refused.';
comment on column silver.fact_orders.is_repaired is 'True when at least one line of the order has repairs.';
comment on column silver.fact_orders.run_id is 'The run that wrote this version of the row; null after a call by hand.';

-- No window here either: the source is a Silver table, and what changed in it is found by comparing. So an order that could
-- not be written in one run is written by the next that succeeds, without anybody keeping a list.
create or replace function silver.load_orders(p_mode text default 'incremental', p_run_id bigint default null)
returns bigint language plpgsql set search_path = '' as $$
declare
  v_rows bigint;
begin
  if p_mode = 'full' then
    delete from silver.fact_orders;
  end if;

  insert into silver.fact_orders as t
         (order_number, customer_id, customer_count, line_count, quantity, order_amount,
          first_order_date, last_order_date, last_ship_date, is_repaired, run_id)
  select s.order_number, min(s.customer_id), count(distinct s.customer_id), count(*), sum(s.quantity), sum(s.sales_amount),
         min(s.order_date), max(s.order_date), max(s.ship_date), bool_or(s.repairs <> '{}'), p_run_id
    from silver.fact_sales s
   group by s.order_number
  on conflict (order_number) do update
    set customer_id = excluded.customer_id, customer_count = excluded.customer_count, line_count = excluded.line_count,
        quantity = excluded.quantity, order_amount = excluded.order_amount, first_order_date = excluded.first_order_date,
        last_order_date = excluded.last_order_date, last_ship_date = excluded.last_ship_date,
        is_repaired = excluded.is_repaired, run_id = excluded.run_id, updated_at = excluded.updated_at
  where (t.customer_id, t.customer_count, t.line_count, t.quantity, t.order_amount, t.first_order_date, t.last_order_date,
         t.last_ship_date, t.is_repaired)
        is distinct from (excluded.customer_id, excluded.customer_count, excluded.line_count, excluded.quantity,
                          excluded.order_amount, excluded.first_order_date, excluded.last_order_date,
                          excluded.last_ship_date, excluded.is_repaired);
  get diagnostics v_rows = row_count;
  return v_rows;
end $$;
alter function silver.load_orders(text, bigint) owner to etl_owner;
comment on function silver.load_orders(text, bigint) is
  'Loads silver.fact_orders from silver.fact_sales. Refuses an order whose lines name several customers. Returns the rows written.';

-- mart ---------------------------------------------------------------------------------------------------------------------

create materialized view if not exists mart.sales_by_month as
  select date_trunc('month', s.order_date)::date as month, coalesce(l.country, 'n/a') as country,
         count(distinct s.order_number) as order_count, sum(s.quantity) as quantity, sum(s.sales_amount) as revenue
    from silver.fact_sales s
    left join silver.dim_customers c using (customer_id)
    left join silver.dim_locations l using (customer_key)
   where s.order_date is not null
   group by 1, 2;
create unique index if not exists sales_by_month_key on mart.sales_by_month (month, country);
alter materialized view mart.sales_by_month owner to etl_owner;
comment on materialized view mart.sales_by_month is 'Sales per month and country; lines without an order date belong to no month.';

create materialized view if not exists mart.sales_trend as
  select m.month, sum(m.revenue) as revenue, sum(m.revenue) - lag(sum(m.revenue)) over (order by m.month) as change,
         sum(sum(m.revenue)) over (order by m.month) as revenue_to_date
    from mart.sales_by_month m
   group by m.month;
create unique index if not exists sales_trend_key on mart.sales_trend (month);
alter materialized view mart.sales_trend owner to etl_owner;
comment on materialized view mart.sales_trend is
  'Revenue per month beside the month before; reads mart.sales_by_month, so it is refreshed after it.';

-- The helpers belong to the owner as well, and nothing here is for everybody.
alter function silver.clean(text) owner to etl_owner;
alter function silver.to_id(text) owner to etl_owner;
alter function silver.to_number(text) owner to etl_owner;
alter function silver.to_day(text) owner to etl_owner;
alter function silver.to_customer_key(text) owner to etl_owner;
alter function silver.to_gender(text) owner to etl_owner;
alter function silver.to_country(text) owner to etl_owner;
revoke all on all routines in schema silver from public;
