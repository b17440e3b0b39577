"""What each database and each driver does in its own way."""
