"""Helpers of the tests: databases, servers, applications and ways to break them."""
