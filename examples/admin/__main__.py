"""Serve the shop with both admin interfaces until Ctrl-C: `make example NAME=admin`."""

import logging
import secrets

from fastapi import FastAPI

from examples.admin import by_sqladmin
from examples.admin.by_starlette_admin import ProductView, UnitAdmin
from examples.admin.tables import Product
from examples.quickstart import serve

GUIDE = """
Open  {url}/admin                   for sqladmin
Open  {url}/starlette-admin         for starlette-admin

Create a product in one of them: it appears in the other, and here, once it is committed.
Give a product a price of 0: the database refuses it, and the error is logged here.
"""


def create_app(db_url: str) -> FastAPI:
    """Create the application with sqladmin, and add starlette-admin."""
    app = by_sqladmin.create_app(db_url)
    admin = UnitAdmin(
        base_url="/starlette-admin", route_name="starlette-admin", secret_key=secrets.token_hex()
    )
    admin.add_view(ProductView(Product))
    admin.mount_to(app)
    return app


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("examples").setLevel(logging.INFO)
    serve(create_app, GUIDE)
