"""The pages about migrating: a package's sessions and those of this one work in one application."""

from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.field.contenders import CONTENDERS
from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client
from tests.support.tables import Note

PACKAGES = {
    "context": "context_async_sqlalchemy",
    "context-asgi": "context_async_sqlalchemy",
    "alchemy": "advanced_alchemy",
    "synchronous": "fastapi_sqlalchemy",
}
"""By contender; fastapi-sqla is not here, because it refuses the newest FastAPI."""


@pytest.mark.parametrize("name", PACKAGES)
async def test_both_at_the_same_time(name: str, postgresql_url: str, judge_for: JudgeFor) -> None:
    """Old and new routes of an application commit, and a request that uses both sessions commits both."""
    pytest.importorskip(PACKAGES[name], reason="requirements/guides.in is not in the lowest row")
    contender = CONTENDERS[name]
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()

    async with contender.opened()(app, postgresql_url) as ground:
        # An asynchronous package shares its engine, as the pages say.
        url, engine = (postgresql_url, None) if contender.synchronous else (None, ground.engine)
        app.add_middleware(middleware, db_url=url, custom_engine=engine, commit_on_exit=True)

        @app.post("/old")
        async def old(session: Any = ground.session) -> None:
            session.add(Note(text="old"))

        @app.post("/new")
        async def new() -> None:
            db.session.add(Note(text="new"))

        @app.post("/both")
        async def both(session: Any = ground.session) -> None:
            assert session is not db.session
            session.add(Note(text="old of both"))
            db.session.add(Note(text="new of both"))

        async with asgi_client(app) as client:
            for path in ("/old", "/new", "/both"):
                assert (await client.post(path)).status_code == 200
    judge = await judge_for(postgresql_url)
    notes = await judge.rows("SELECT text FROM note ORDER BY text")
    assert notes == [("new",), ("new of both",), ("old",), ("old of both",)]
