"""What units of work do, reported to observers."""
