"""Writes to two databases as one; `python -m tests.support.two_databases SIDE URL URL` dies in the middle.

It dies when both are prepared and neither is committed.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.field.ground import ask
from fastapi_async_sqlalchemy import atomic, create_middleware_and_session_proxy
from tests.support.crash import die
from tests.support.tables import Note, Reply


def create_app(side: str, first: AsyncEngine, second: AsyncEngine, text: str, note_id: int) -> FastAPI:
    """Create an application whose route writes a note to the first database and a reply to the second."""
    app = FastAPI()
    if side == "package":
        first_middleware, first_db = create_middleware_and_session_proxy(AsyncSession)
        second_middleware, second_db = create_middleware_and_session_proxy(AsyncSession)
        app.add_middleware(first_middleware, custom_engine=first)
        app.add_middleware(second_middleware, custom_engine=second)

        @app.get("/")
        async def of_package() -> None:
            async with atomic(first_db, second_db):
                first_db.session.add(Note(text=text))
                second_db.session.add(Reply(note_id=note_id))

    else:
        make_session = async_sessionmaker(twophase=True, binds={Note: first, Reply: second})
        by_function: dict[str, Any] = {"scope": "function"}

        async def session() -> AsyncGenerator[AsyncSession]:
            async with make_session.begin() as session:
                yield session

        @app.get("/")
        async def of_dependency(session: Annotated[AsyncSession, Depends(session, **by_function)]) -> None:
            session.add_all([Note(text=text), Reply(note_id=note_id)])

    return app


async def main(side: str, *urls: str) -> None:
    """Write to both databases, and die before the first COMMIT."""
    first, second = map(create_async_engine, urls)
    for engine in (first, second):
        event.listen(engine.sync_engine, "commit_twophase", die)
    await ask(create_app(side, first, second, "crashed", 1))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
