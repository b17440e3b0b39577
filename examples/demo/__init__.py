"""The quickstart with a page that draws the transaction of each request; `make demo` serves it."""
