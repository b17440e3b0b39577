"""A shop whose products are edited in an admin interface: sqladmin or starlette-admin."""
