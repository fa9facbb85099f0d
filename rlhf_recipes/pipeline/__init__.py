"""Plan, check and run."""
