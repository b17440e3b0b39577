"""What packages of the field do with a request's session, each in an environment of its own: `make compare`."""
