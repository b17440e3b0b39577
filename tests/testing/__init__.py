"""The test sandbox: what holds inside it, what it undoes, and what it refuses."""
