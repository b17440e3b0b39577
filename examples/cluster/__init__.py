"""PostgreSQL under Patroni, HAProxy in front of it, and an application that survives failovers."""
