"""Units for tasks and functions."""
