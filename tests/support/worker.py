"""A worker: a process without an application, whose fresh pair serves an engine of the test's own."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import engine_with_tables


@asynccontextmanager
async def open_worker(url: str, judge_for: JudgeFor) -> AsyncGenerator[Site]:
    """Bind a fresh pair to a database with tables; on exit no connection may be out."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url) as engine:
        db.bind(engine)
        worker = Site(FastAPI(), db, engine, await judge_for(url))
        yield worker
        assert worker.checked_out() == 0
        db.unbind()
