"""What units of work do, as observers, traces, metrics and logs see it."""
