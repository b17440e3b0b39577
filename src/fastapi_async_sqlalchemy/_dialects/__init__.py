"""What databases and drivers do differently."""
