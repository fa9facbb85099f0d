"""A page of all runs in the browser: to watch, read, compare, label and chat."""
