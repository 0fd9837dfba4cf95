-- One procedure that loads all of Silver, as many warehouses on Postgres have it: it truncates and reloads table after
-- table, measures itself with notices, and swallows its own error.

create schema if not exists silver;

create table silver.crm_cust_info (cst_id int, cst_key text, cst_firstname text, cst_lastname text, cst_marital_status text, cst_gndr text,
                                   cst_create_date date, dwh_create_date timestamptz default now());
create table silver.crm_prd_info (prd_id int, cat_id text, prd_key text, prd_nm text, prd_cost numeric, prd_line text, prd_start_dt date, prd_end_dt date);
create table silver.crm_sales_details (sls_ord_num text, sls_prd_key text, sls_cust_id int, sls_order_dt date, sls_quantity int, sls_sales numeric);
create table silver.erp_cust_az12 (cid text, bdate date, gen text);
create table silver.erp_loc_a101 (cid text, cntry text);
create table silver.customer_totals (cst_id int, orders bigint, amount numeric);

create procedure silver.load_silver() language plpgsql as $$
declare
  start_time timestamptz;
  end_time timestamptz;
  batch_start_time timestamptz := clock_timestamp();
  cutoff date := date '2050-01-01';
begin
  raise notice '================================';
  raise notice 'Loading Silver Layer';

  -- CRM
  start_time := clock_timestamp();
  raise notice '>> Truncating Table: silver.crm_cust_info';
  truncate table silver.crm_cust_info;
  insert into silver.crm_cust_info (cst_id, cst_key, cst_firstname, cst_lastname, cst_marital_status, cst_gndr, cst_create_date)
  select cst_id::int, cst_key, trim(cst_firstname), trim(cst_lastname),
         case upper(trim(cst_marital_status)) when 'S' then 'Single' when 'M' then 'Married' else 'n/a' end,
         case upper(trim(cst_gndr)) when 'F' then 'Female' when 'M' then 'Male' else 'n/a' end,
         case when cst_create_date ~ '^\d{4}-\d\d-\d\d$' then cst_create_date::date end
    from (select *, row_number() over (partition by cst_id order by cst_create_date desc nulls last, cst_key) as flag_last
            from bronze.crm_cust_info where cst_id ~ '^\d+$') t
   where flag_last = 1;
  end_time := clock_timestamp();
  raise notice '>> Load Duration: % seconds', extract(epoch from end_time - start_time);

  start_time := clock_timestamp();
  truncate table silver.crm_prd_info;
  insert into silver.crm_prd_info (prd_id, cat_id, prd_key, prd_nm, prd_cost, prd_line, prd_start_dt, prd_end_dt)
  select prd_id::int, replace(substring(prd_key, 1, 5), '-', '_'), substring(prd_key, 7), prd_nm, coalesce(nullif(regexp_replace(prd_cost, '[^0-9.]', '', 'g'), '')::numeric, 0),
         case upper(trim(prd_line)) when 'M' then 'Mountain' when 'R' then 'Road' else 'n/a' end,
         case when prd_start_dt ~ '^\d{4}-\d\d-\d\d$' then prd_start_dt::date end,
         lead(case when prd_start_dt ~ '^\d{4}-\d\d-\d\d$' then prd_start_dt::date end) over (partition by prd_key order by prd_start_dt, prd_id) - 1
    from bronze.crm_prd_info where prd_id ~ '^\d+$';
  end_time := clock_timestamp();

  create temp table sales_clean on commit drop as
  select sls_ord_num, sls_prd_key, case when sls_cust_id ~ '^\d+$' then sls_cust_id::int end as cust,
         case when sls_order_dt ~ '^\d{8}$' and substr(sls_order_dt, 5, 2) between '01' and '12' and substr(sls_order_dt, 7, 2) between '01' and '28' then to_date(sls_order_dt, 'YYYYMMDD') end as order_dt,
         case when sls_quantity ~ '^\d+$' then sls_quantity::int else 0 end as qty,
         abs(case when sls_price ~ '^-?\d+(\.\d+)?$' then sls_price::numeric else 0 end) as price
    from bronze.crm_sales_details;
  truncate silver.crm_sales_details;
  insert into silver.crm_sales_details (sls_ord_num, sls_prd_key, sls_cust_id, sls_order_dt, sls_quantity, sls_sales)
  select s.sls_ord_num, s.sls_prd_key, s.cust, s.order_dt, s.qty, s.qty * s.price from sales_clean s;

  -- ERP, and one that reads what was just loaded
  truncate table silver.erp_cust_az12, silver.erp_loc_a101;
  insert into silver.erp_cust_az12 (cid, bdate, gen)
  select case when cid like 'NAS%' then substring(cid, 4) else cid end,
         case when bdate ~ '^\d{4}-\d\d-\d\d$' and bdate < cutoff::text then case when substr(bdate, 9, 2) <= '28' then bdate::date end end, gen
    from bronze.erp_cust_az12;
  insert into silver.erp_loc_a101 (cid, cntry)
  select replace(cid, '-', ''), case when trim(cntry) = 'DE' then 'Germany' when trim(cntry) in ('US', 'USA') then 'United States' else trim(cntry) end
    from bronze.erp_loc_a101;
  if extract(year from cutoff) > 2000 then
    truncate silver.customer_totals;
    insert into silver.customer_totals (cst_id, orders, amount)
    select c.cst_id, count(distinct s.sls_ord_num), sum(s.sls_sales)
      from silver.crm_cust_info c join silver.crm_sales_details s on s.sls_cust_id = c.cst_id group by c.cst_id;
  end if;
  raise notice 'Loading Silver Layer is Completed: % seconds', extract(epoch from clock_timestamp() - batch_start_time);
exception when others then
  raise notice 'ERROR OCCURED DURING LOADING SILVER LAYER: %', sqlerrm;
end $$;
