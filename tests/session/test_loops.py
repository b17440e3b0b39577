"""Event loops that use one engine: one after the other, in turns, and at the same time."""

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, NullPool, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import ConcurrentUseError, create_middleware_and_session_proxy
from tests.support.databases import Judge
from tests.support.jobs import KINDS
from tests.support.serving import asgi_client
from tests.support.tables import Note, create_tables

PROJECT = Path(__file__).parents[2]
DEADLINE = 60


async def play(*arguments: str) -> None:
    """Run jobs in a process of their own, which must end well and in time."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.jobs", *arguments),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, output.decode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_loop_after_loop(driver_url: str, kind: str) -> None:
    """Each `asyncio.run()` is served, also where tasks must wait, with pre-ping and without."""
    for size, ping in ((1, True), (1, False), (5, True), (5, False)):
        await play(driver_url, kind, str(size), str(ping))


@pytest.mark.parametrize("early", [True, False], ids=["used early", "empty pool"])
@pytest.mark.parametrize("by", ["bind", "custom_engine"])
async def test_other_loop_at_the_same_time(  # noqa: C901  # one application
    driver_url: str, by: str, *, early: bool
) -> None:
    """`asyncio.run()` in a `def` route is refused from its first use on, and innocents keep their rows."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    engine = create_async_engine(
        driver_url, poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0, pool_timeout=20
    )
    async with Judge(driver_url) as judge:
        await create_tables(engine)
        if not early:
            await engine.dispose()
        options: dict[str, Any] = {"custom_engine": engine} if by == "custom_engine" else {}
        app, errors = FastAPI(), list[BaseException]()
        app.add_middleware(cast("Any", middleware), commit_on_exit=True, **options)
        if by == "bind":
            await asyncio.to_thread(db.bind, engine)  # where no loop runs

        async def write(note: str) -> None:
            db.session.add(Note(text=note))
            await db.session.flush()

        async def write_twice() -> None:
            async with asyncio.TaskGroup() as group:
                for at in range(2):
                    group.create_task(in_a_unit(f"other {threading.get_ident()} {at}"))

        async def in_a_unit(note: str) -> None:
            async with db(commit_on_exit=True):
                await write(note)

        @app.post("/other")
        def other() -> None:
            try:
                asyncio.run(write_twice())
            except BaseExceptionGroup as group:
                errors.extend(group.exceptions)

        @app.post("/innocent/{number}")
        async def innocent(number: int) -> None:
            await write(f"innocent {number:02}")

        async with asgi_client(app, raise_app_exceptions=False) as client:
            for number in range(0, 20, 4):
                posts = [client.post(f"/innocent/{one}") for one in range(number, number + 4)]
                answers = await asyncio.gather(client.post("/other"), *posts)
                assert [answer.status_code for answer in answers[1:]] == [200] * 4
        notes = await judge.rows("SELECT text FROM note ORDER BY text")
        await engine.dispose()
    assert [note for (note,) in notes] == [f"innocent {number:02}" for number in range(20)]
    assert {type(error) for error in errors} == {ConcurrentUseError}
    assert len(errors) >= 5


async def test_null_pool_serves_any_loop(postgresql_url: str) -> None:
    """Without a pool a second loop has connections of its own."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    db.bind(create_async_engine(postgresql_url, poolclass=NullPool))

    async def ask() -> object:
        async with db() as unit:
            return await unit.session.scalar(text("SELECT 1"))

    assert await ask() == 1
    assert await asyncio.to_thread(asyncio.run, ask()) == 1
    assert await ask() == 1
