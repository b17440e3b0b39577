"""One shop and its background work, by four task queues, with and without an outbox."""
