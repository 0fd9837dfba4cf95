-- Nothing more is created by the role as which steps run, nor by a step.
set local role etl_engine;
revoke create on schema etl from etl_owner;
