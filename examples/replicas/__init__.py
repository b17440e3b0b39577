"""A primary and its replica; `python -m examples.replicas` starts both and an application on them."""
