"""Several databases, and replicas."""
