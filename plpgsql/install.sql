-- b2s, installed or upgraded with psql alone:
--
--   psql -v ON_ERROR_STOP=1 -d DATABASE -f plpgsql/install.sql
--
-- One transaction: everything or nothing. b2s migrate does the same from Python and reads this file as its manifest.
--
-- The model. A PIPELINE is a set of configured PROCEDURES; a RUN executes some of them, each as a STEP. Steps are grouped
-- into SCOPES, one transaction each. etl._plan turns a request into scopes in topological order; etl._create_run stores
-- them with counters of what they wait for; etl._walk, the only code that commits, claims one scope after another
-- (etl._claim), executes it in one subtransaction (etl._execute_scope) and commits data, watermark and outcome together,
-- or rolls back and records why (etl._record_failure). A run lock held by the session that walks tells the living from
-- the dead. Tables are history: migrations/, each applied once and frozen. Routines are a snapshot: all are written anew
-- by every install, and those that a release no longer has are dropped.
\set ON_ERROR_STOP on
\set ON_ERROR_ROLLBACK off
\set QUIET on
\set version 0.2.0

begin;
select pg_catalog.set_config('b2s.version', :'version', true) \g /dev/null
\ir install/begin.sql

-- Tables
\set migration 0001_catalog
\set sha256 b3ef4dd9ca6aa0ba6fd39b8b60507b3fddd2e39114f4efa8e3db0b49db4ca832
\ir install/migration.sql
\set migration 0002_runtime
\set sha256 c2718a5cfbb8e856c6a964d5e6bd7dd7c28a80b01f382442bc71373c7fe10cea
\ir install/migration.sql
\set migration 0003_workers
\set sha256 73ad87489f22b66fb3f3aab6f848e0565c9d2a06459a3d80173c0a82e3f97835
\ir install/migration.sql
\set migration 0004_access
\set sha256 506adcb9b732e37de3c6de9dd1d13ca0fe7fa97ba28fb05102a73446cd209b39
\ir install/migration.sql
\set migration 0005_clock
\set sha256 8cee9691b9fb5b1ab2f9e8415277c2a224bb6fa434951d89fcbad2ac24d5c0ac
\ir install/migration.sql
\set migration 0006_monitoring
\set sha256 6f9064a646b544c2370d773601cd3856e20d7532e82b9320c87ee25d268f625e
\ir install/migration.sql
\set migration 0007_lineage
\set sha256 cac2d3e30f84103a681401aac5154a146900ba408c4a99cdc8152308646bc6c6
\ir install/migration.sql
\set migration 0008_scheduling
\set sha256 74d2360459140cb985e2f364d87b0b37fbb271281b92f44b2a66c295518a09b0
\ir install/migration.sql

-- Engine
\ir engine/_fail.sql
\ir engine/_fail_altered.sql
\ir engine/_requester.sql
\ir engine/_approvals.sql
\ir engine/_atomic_message.sql
\ir engine/_fail_in_transaction.sql
\ir engine/_lock.sql
\ir engine/_protect_history.sql
\ir engine/_parameters.sql
\ir engine/_graph.sql
\ir engine/_order_procedures.sql
\ir engine/_select_procedures.sql
\ir engine/_check_full_refresh.sql
\ir engine/_place_refreshes.sql
\ir engine/_plan.sql
\ir engine/_request.sql
\ir engine/_render_call.sql
\ir engine/_observe.sql
\ir engine/_create_run.sql
\ir engine/_backfill.sql
\ir engine/_begin_backfill.sql
\ir engine/_horizon.sql
\ir engine/_window.sql
\ir engine/_slice.sql
\ir engine/_upgrade_hint.sql
\ir engine/_rank_scopes.sql
\ir engine/_claim.sql
\ir engine/_errors.sql
\ir engine/_metrics.sql
\ir engine/_activity.sql
\ir engine/_logs.sql
\ir engine/_events.sql
\ir engine/_count_changes.sql
\ir engine/_run_checks.sql
\ir engine/_execute_scope.sql
\ir engine/_execute_refresh.sql
\ir engine/_record_failure.sql
\ir engine/_finish_run.sql
\ir engine/_work.sql
\ir engine/_helpers.sql
\ir engine/_resume.sql
\ir engine/_rehearse.sql
\ir engine/_compile_call.sql
\ir engine/_compile_check.sql
\ir engine/_config_problems.sql
\ir engine/_config.sql
\ir engine/_check_config.sql
\ir engine/_store_config.sql
\ir engine/_contract.sql
\ir engine/_contract_window.sql
\ir engine/_contract_copy.sql
\ir engine/_contract_checks.sql
\ir engine/_contract_findings.sql
\ir engine/_diagnose_engine.sql
\ir engine/_cron.sql
\ir engine/_schedules.sql
\ir engine/_purge.sql
\ir engine/_diagnose_clock.sql
\ir engine/_lineage.sql
\ir engine/_lineage_findings.sql

-- What runs as etl_owner
\ir install/steps_begin.sql
\ir steps/_call_routine.sql
\ir steps/_read_source.sql
\ir steps/_refresh_view.sql
\ir steps/_restamp_source.sql
\ir steps/_test_contract.sql
\ir install/steps_end.sql

-- Verbs
\ir api/arrived.sql
\ir api/touch_xid.sql
\ir api/start_run.sql
\ir api/plan_run.sql
\ir api/backfill.sql
\ir api/plan_backfill.sql
\ir api/get_run.sql
\ir api/list_procedures.sql
\ir api/list_runs.sql
\ir api/cancel_run.sql
\ir api/submit_run.sql
\ir api/approve_run.sql
\ir api/work.sql
\ir api/resume_run.sql
\ir api/reap.sql
\ir api/watchdog.sql
\ir api/freeze_full_refresh.sql
\ir api/set_watermark.sql
\ir api/rebase_watermark.sql
\ir api/tick_watermarks.sql
\ir api/fire_schedules.sql
\ir api/run_due.sql
\ir api/list_jobs.sql
\ir api/purge.sql
\ir api/plan_config.sql
\ir api/apply_config.sql
\ir api/store_lineage.sql
\ir api/move_lineage_cursor.sql
\ir api/diagnose.sql
\ir api/test_procedure.sql
\ir api/log.sql

-- Views
\ir views.sql
\ir metrics.sql
\ir watermarks.sql
\ir lineage.sql

\ir install/finish.sql
commit;
\echo b2s :version is installed
