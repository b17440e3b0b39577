"""Clusters whose leader or nodes are lost; `make test-cluster` runs these, `make test` does not."""
