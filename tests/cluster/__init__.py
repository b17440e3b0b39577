"""Several databases: one outcome for all of them, replicas, failover and PgBouncer."""
