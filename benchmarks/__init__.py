"""Benchmarks against TRL 1.12: see README.md here. Run as `python -m benchmarks.NAME`."""
