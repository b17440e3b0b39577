"""What packages of the field do with a request's session, each in a separate environment: `make compare`."""
