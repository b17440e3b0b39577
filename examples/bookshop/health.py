"""Liveness, which queries no database, and readiness, which needs both databases and their schemas."""

import logging

from fastapi import APIRouter, HTTPException
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from examples.bookshop import migrating
from examples.bookshop.databases import reporting, shop
from fastapi_async_sqlalchemy import SessionProxy

LIVE, READY = "/health/live", "/health/ready"
FULL = 0.95

logger = logging.getLogger(__name__)
health = APIRouter()
HEADS = {database: migrating.head(database) for database in ("shop", "reporting")}


@health.get(LIVE)
async def live() -> str:
    """Report that the process is alive."""
    return "alive"


@health.get(READY)
async def ready() -> str:
    """Answer 503 while this process should receive no requests."""
    await check(shop, HEADS["shop"])
    await check(reporting, HEADS["reporting"])
    return "ready"


async def check(database: SessionProxy[AsyncSession], head: str | None) -> None:
    """Raise a 503 unless a database answers, its pool has room, and its schema matches this code."""
    if (database.pool_status().saturation or 0) >= FULL:
        raise HTTPException(503, "the pool is full")
    try:
        async with database.connection(timeout=1) as session:
            schema = await session.scalar(text("SELECT version_num FROM alembic_version"))
    except Exception as error:
        logger.warning("Not ready", exc_info=error)  # the response must not reveal the database's address
        raise HTTPException(503, "the database does not answer") from error
    if schema != head:
        raise HTTPException(503, f"the schema is {schema} and not {head}")
