"""An application for production, with several processes, health checks and a graceful shutdown."""
