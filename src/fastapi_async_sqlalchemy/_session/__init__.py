"""The watched subclass of the user's session."""
