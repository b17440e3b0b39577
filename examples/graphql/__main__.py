"""Serve the library until Ctrl-C: `make example NAME=graphql`."""

from examples.graphql.app import create_app
from examples.quickstart import serve

GUIDE = """
Open  {url}/graphql

Add an author and a book by one mutation, which is one transaction.
  {post} '{{"query": "mutation {{ addAuthor(name: \\"Jane Austen\\") {{ id }} \
addBook(title: \\"Emma\\", author: 1) {{ id }} }}"}}' {url}/graphql
Add another book, and the same author again: the response has an error, and the log here says which one.
  {post} '{{"query": "mutation {{ addBook(title: \\"Persuasion\\", author: 1) {{ id }} \
addAuthor(name: \\"Jane Austen\\") {{ id }} }}"}}' {url}/graphql
Read everything: the second book was not stored. The two resolvers ran in parallel, each in a separate unit.
  {post} '{{"query": "{{ count authors {{ name books {{ title }} }} }}"}}' {url}/graphql
"""

if __name__ == "__main__":
    serve(create_app, GUIDE)
