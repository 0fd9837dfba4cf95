"""`b2s import`: from hand-written routines to a configuration that runs them as they are.

`inventory` gathers what there is, from a database or from files; `classify` tells transformations from
helpers, triggers and routines that cannot run under b2s; `windows` and `infer` find watermarks, names, types,
dependencies, cycles and refresh targets; `split` proposes how to cut a routine that loads many tables;
`document` and `report` write it down.
"""
