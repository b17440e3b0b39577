"""A shop whose two databases Alembic migrates."""
