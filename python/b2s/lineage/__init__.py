"""What procedures read and write, and whom to tell.

`static` reads it out of the SQL, down to columns (`columns`); the engine observes it and the catalog
completes it (plpgsql/engine/_observe.sql, _lineage.sql). `graph` draws it, `openlineage` makes events of it,
`sinks` send them.
"""
