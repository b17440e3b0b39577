"""The fault campaign: an acknowledged write is never lost, a refused one never appears: `make campaign`."""
