"""The unit of work: its scope, its settings, its hooks and its end."""
