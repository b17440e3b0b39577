"""The session: one task at a time, cut off, streaming, or waiting for a connection."""
