"""b2s report: one HTML file that explains a run, or a period, to a person without access to anything else.

`data` reads everything in a few queries, `graph` and `timeline` draw, `sections` makes tables, `page` puts
them together. Styles and the script stand in files of their own and are written into the page: it needs no
server and no network, and forbids itself to use any.
"""
