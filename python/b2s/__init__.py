"""b2s: Bronze to Silver transformations that run inside Postgres."""

__version__ = "0.2.0"
