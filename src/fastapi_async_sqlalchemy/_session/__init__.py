"""The user's session, watched."""
