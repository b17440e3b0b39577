"""Arguments of callers, and their validation."""
