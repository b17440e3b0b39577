"""A bookshop service with two databases, an outbox, a worker and migrations; README.md lists its files."""
