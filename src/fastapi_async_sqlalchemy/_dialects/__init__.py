"""The differences between databases and drivers."""
