"""Services created by a container, which provides sessions without owning them."""
