"""PostgreSQL under Patroni, HAProxy before it, and an application that lives through failovers."""
