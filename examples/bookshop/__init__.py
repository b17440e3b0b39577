"""A bookshop as a service: two databases, an outbox, a worker, migrations; README.md maps its files."""
