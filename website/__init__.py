"""The documentation as a site: `make site` builds it, and `make docs-serve` shows it to those who write."""
