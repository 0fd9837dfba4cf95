-- Bronze of the worked pipeline: what a CRM and an ERP send, kept exactly as it came.
--
-- Every column is text and no table has a key: Bronze never refuses a row, and a row is never changed or removed.
-- What is sent again (a correction, a duplicate) is one more row; the newest `ingested_at` wins in Silver.
-- `ingested_at` is what the watermarks read, so it is filled by the server's clock and it is indexed.
-- The file can be run again at any time. Run it as a superuser, or as a member of etl_owner.

create schema if not exists bronze;
alter schema bronze owner to etl_owner;
comment on schema bronze is 'Rows as the source systems sent them: text, duplicates and errors included.';

create table if not exists bronze.crm_cust_info (
  cst_id             text,
  cst_key            text,
  cst_firstname      text,
  cst_lastname       text,
  cst_marital_status text,
  cst_gndr           text,
  cst_create_date    text,
  ingested_at        timestamptz not null default clock_timestamp()
);
create index if not exists crm_cust_info_ingested_at_idx on bronze.crm_cust_info (ingested_at);
alter table bronze.crm_cust_info owner to etl_owner;
comment on table bronze.crm_cust_info is 'CRM: customers, one row per version sent.';

create table if not exists bronze.crm_prd_info (
  prd_id       text,
  prd_key      text,
  prd_nm       text,
  prd_cost     text,
  prd_line     text,
  prd_start_dt text,
  prd_end_dt   text,
  ingested_at  timestamptz not null default clock_timestamp()
);
create index if not exists crm_prd_info_ingested_at_idx on bronze.crm_prd_info (ingested_at);
alter table bronze.crm_prd_info owner to etl_owner;
comment on table bronze.crm_prd_info is 'CRM: products, one row per price period; prd_key is category and product number in one.';

create table if not exists bronze.crm_sales_details (
  sls_ord_num  text,
  sls_prd_key  text,
  sls_cust_id  text,
  sls_order_dt text,
  sls_ship_dt  text,
  sls_due_dt   text,
  sls_sales    text,
  sls_quantity text,
  sls_price    text,
  ingested_at  timestamptz not null default clock_timestamp()
);
create index if not exists crm_sales_details_ingested_at_idx on bronze.crm_sales_details (ingested_at);
alter table bronze.crm_sales_details owner to etl_owner;
comment on table bronze.crm_sales_details is 'CRM: order lines; dates are numbers of the form YYYYMMDD.';

create table if not exists bronze.erp_cust_az12 (
  cid         text,
  bdate       text,
  gen         text,
  ingested_at timestamptz not null default clock_timestamp()
);
create index if not exists erp_cust_az12_ingested_at_idx on bronze.erp_cust_az12 (ingested_at);
alter table bronze.erp_cust_az12 owner to etl_owner;
comment on table bronze.erp_cust_az12 is 'ERP: birth date and gender of a customer; cid may carry the prefix NAS.';

create table if not exists bronze.erp_loc_a101 (
  cid         text,
  cntry       text,
  ingested_at timestamptz not null default clock_timestamp()
);
create index if not exists erp_loc_a101_ingested_at_idx on bronze.erp_loc_a101 (ingested_at);
alter table bronze.erp_loc_a101 owner to etl_owner;
comment on table bronze.erp_loc_a101 is 'ERP: country of a customer; cid has a hyphen that the CRM does not use.';

create table if not exists bronze.erp_px_cat_g1v2 (
  id          text,
  cat         text,
  subcat      text,
  maintenance text,
  ingested_at timestamptz not null default clock_timestamp()
);
create index if not exists erp_px_cat_g1v2_ingested_at_idx on bronze.erp_px_cat_g1v2 (ingested_at);
alter table bronze.erp_px_cat_g1v2 owner to etl_owner;
comment on table bronze.erp_px_cat_g1v2 is 'ERP: product categories.';
