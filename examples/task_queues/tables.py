"""Create the shop's tables, with pens in stock the first time: `python -m examples.task_queues.tables`."""

import asyncio

from examples.task_queues import shop
from fastapi_async_sqlalchemy import db


async def main() -> None:
    """Create what is missing."""
    async with db.connect(shop.DATABASE_URL):
        await db.create_all(shop.Base.metadata)
        async with db.begin() as unit:
            if await unit.session.get(shop.Product, "pen") is None:
                unit.session.add(shop.Product(name="pen", stock=1000))


if __name__ == "__main__":
    asyncio.run(main())
