"""`b2s lint`: reads the SQL of a pipeline and says, before anything runs, what will hurt.

From the text to the finding: `sqltext` cuts files into statements, `parser` (the only module that knows
pglast) parses them, `frontend` and `plpgsql` make routines of them whose every expression knows its place,
`access`, `dynamic` and `flow` say what is read and written, by which text, and under which mode; `rules`
judge.
"""
