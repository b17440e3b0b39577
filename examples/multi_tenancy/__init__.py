"""Tenants that share a database, by rows or by schemas."""
