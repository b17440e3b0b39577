"""A primary and its replica; `make example NAME=replicas` starts both and an application on them."""
