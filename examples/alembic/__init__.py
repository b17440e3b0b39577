"""A shop with two databases that are migrated by Alembic."""
