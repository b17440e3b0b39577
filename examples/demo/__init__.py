"""The quickstart with a page that draws each request's transaction: `make demo` serves it."""
