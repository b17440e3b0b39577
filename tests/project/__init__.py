"""The project around the package: documentation, examples, benchmarks, campaign and types."""
