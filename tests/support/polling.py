"""The deployed application, with two routes that poll whether their client has left."""

import asyncio

from fastapi import Request

from examples.deployment.app import app, place

__all__ = ["app"]


@app.post("/still-there")
async def still_there(request: Request) -> bool:
    """Return whether five polls agree that the client, who waits for the answer, has not left."""
    await request.body()
    return not any([await request.is_disconnected() for _ in range(5)])


@app.post("/once-left")
async def once_left(item: str, request: Request) -> None:
    """Place an order, which is committed when a poll has seen the client leave."""
    await request.body()
    await place(item)
    while not await request.is_disconnected():  # noqa: ASYNC110  # polling is what is looked at
        await asyncio.sleep(0.01)
