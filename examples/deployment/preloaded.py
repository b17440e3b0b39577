"""An application that reads from the database while it is loaded, for `gunicorn --preload`.

DATABASE_URL names the database, as for app.py. The engine has a connection before the workers are forked;
each worker opens separate ones.
"""

import asyncio
import os

from fastapi import FastAPI
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import create_async_engine

from examples.deployment.tables import Stock
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=5, max_overflow=0)


async def read_items() -> frozenset[str]:
    """Return the names of all items."""
    async with db.connect(engine), db() as unit:
        return frozenset(await unit.session.scalars(select(Stock.item)))


ITEMS = asyncio.run(read_items())

app = FastAPI()
app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine, commit_on_exit=True)


@app.get("/items")
async def items() -> frozenset[str]:
    """Return the items that were read before the fork."""
    return ITEMS


@app.get("/process")
async def process() -> tuple[int, int]:
    """Return the id of this process and of its PostgreSQL process."""
    backend = await db.session.scalar(select(func.pg_backend_pid()))
    return os.getpid(), backend or 0
