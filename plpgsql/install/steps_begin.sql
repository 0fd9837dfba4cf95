-- From here to install/steps_end.sql routines are created by, and so belong to, the role as which steps run.
grant create on schema etl to etl_owner;
set local role etl_owner;
