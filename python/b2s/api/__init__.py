"""The HTTP API (extra `b2s[api]`): it checks who asks, hands the request to the database, and returns.

The database is the one authority: each request is a transaction in the role that the token stands for, and
what that role may do is what it was granted. Runs are executed by workers (`b2s worker`), never here.
"""
