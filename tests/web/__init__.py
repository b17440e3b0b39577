"""Requests: one unit of work each, settled before the response starts."""
