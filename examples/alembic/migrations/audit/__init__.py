"""The migrations of the audit."""
