"""The three trainings as one writes them by hand with TRL 1.12 alone."""
