"""One shop and its background work with four task queues, with and without an outbox."""
