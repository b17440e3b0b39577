"""What a caller may ask for, and how a mistake is refused."""
