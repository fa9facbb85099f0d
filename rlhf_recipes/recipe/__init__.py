"""The recipe language: tables, keys, checks."""
