"""Services that a container makes, and sessions that it hands out without owning them."""
