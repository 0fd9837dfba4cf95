"""The rules, one a file; each file registers itself."""
