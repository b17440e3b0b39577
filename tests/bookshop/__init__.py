"""The example of the bookshop: its routes, its databases, its worker, its migrations, its program."""
