"""One base model, many roles."""
