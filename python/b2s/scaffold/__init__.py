"""`b2s new` and `b2s init`: routines by a pattern, their entries in the file, and a project around them.

`patterns` writes the SQL, `source` finds out about columns and keys, `entry` puts the procedure into
transformations.yaml, `project` makes the files of a new one.
"""
