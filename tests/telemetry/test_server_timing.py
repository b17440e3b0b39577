"""`Server-Timing`: the database's part of a request, in a header."""

import re

import pytest
from fastapi import FastAPI, HTTPException
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import ConfigurationError, create_middleware_and_session_proxy
from tests.support.site import MakeSite
from tests.support.tables import Note

TIMING = re.compile(
    r'db;dur=(?P<held>[\d.]+);desc="(?P<statements>\d+) statements", '
    r"db-wait;dur=(?P<wait>[\d.]+), db-commit;dur=(?P<commit>[\d.]+)"
)


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_header_of_a_request(database_url: str, make_site: MakeSite, *, commit_on_exit: bool) -> None:
    """The response's start has the times of all that came before it, COMMIT included."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit, server_timing=True)

    @site.app.get("/")
    async def route() -> None:
        site.db.session.add(Note(text="a"))
        await site.db.session.flush()
        await site.db.session.scalar(select(Note.text))

    response = await site.get()
    found = TIMING.fullmatch(response.headers["server-timing"])
    assert found
    assert found["statements"] == "2"
    assert float(found["held"]) > 0
    assert (float(found["commit"]) > 0) <= commit_on_exit
    assert response.headers["content-type"] == "application/json"


async def test_no_header_without_the_database(sqlite_url: str, make_site: MakeSite) -> None:
    """A request that never asked for a session has nothing to say; an error has its times."""
    site = await make_site(sqlite_url, server_timing=True)

    @site.app.get("/untouched")
    async def untouched() -> None:
        pass

    @site.app.get("/error")
    async def error() -> None:
        await site.db.session.scalar(select(Note.text))
        raise HTTPException(409)

    async with site.client() as client:
        assert "server-timing" not in (await client.get("/untouched")).headers
        response = await client.get("/error")
    assert response.status_code == 409
    assert TIMING.fullmatch(response.headers["server-timing"])


async def test_off_by_default(sqlite_url: str, make_site: MakeSite) -> None:
    """Nobody is told who has not asked."""
    site = await make_site(sqlite_url)

    @site.app.get("/")
    async def route() -> None:
        await site.db.session.scalar(select(Note.text))

    assert "server-timing" not in (await site.get()).headers


def test_flag_is_a_flag() -> None:
    """What is no bool is refused."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match="server_timing must be True or False, not 1"):
        middleware(FastAPI(), db_url="sqlite+aiosqlite:///", server_timing=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # that is the mistake
