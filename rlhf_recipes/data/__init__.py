"""Rows and tokens."""
