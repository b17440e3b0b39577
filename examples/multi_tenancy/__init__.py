"""Tenants that share a database, separated by rows or by schemas."""
