"""A shop whose products are edited by an admin interface: sqladmin's, and starlette-admin's."""
