"""What a caller may ask for."""
