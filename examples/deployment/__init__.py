"""An application as it is deployed: several processes, health checks, and an end that loses nothing."""
