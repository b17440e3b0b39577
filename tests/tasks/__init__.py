"""Units for tasks: gathered, in task groups, or in functions that are retried."""
