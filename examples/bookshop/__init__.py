"""A bookshop as a service: two databases, an outbox, a worker, migrations. README.md has a map of its files."""
