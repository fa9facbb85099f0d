"""One file a stage kind."""
