"""Two pairs in one application: one COMMIT of the two fails, in the request or in its tail."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import PartialCommitError
from tests.support.databases import JudgeFor
from tests.support.pairs import (
    DRIVERS,
    ON_COMMIT,
    InnerSession,
    OuterSession,
    Pair,
    Side,
    app_of,
    every_combination,
    id_of,
    open_side,
)
from tests.support.serving import asgi_client
from tests.support.site import complaints


class OutermostSession(AsyncSession):
    """The session of a third database, whose middleware is outside of both."""


# A COMMIT fails.


def breaking_app(pair: Pair, broken: Side, **options: Any) -> FastAPI:
    """Make an application that writes to both; COMMIT fails on one side."""
    app = pair.app(**options)

    @app.get("/")
    async def write() -> str:
        await pair.add("note")
        broken.break_commit()
        return "written"

    return app


@every_combination
@pytest.mark.parametrize("status", [409, 200])
async def test_inner_commit_fails(pair: Pair, status: int) -> None:
    """The inner COMMIT fails: nothing is committed anywhere, whatever the handler's answer."""
    app = breaking_app(pair, pair.inner)

    @app.exception_handler(DBAPIError)
    async def answer(request: Request, error: DBAPIError) -> JSONResponse:
        return JSONResponse("refused", status_code=status)

    async with asgi_client(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.json()) == (status, "refused")
    assert await pair.notes() == ([], [])


@every_combination
async def test_inner_commit_fails_and_nobody_answers(pair: Pair) -> None:
    """Without a handler the inner side's own error reaches the server; nothing is committed anywhere."""
    async with asgi_client(breaking_app(pair, pair.inner)) as client:
        with pytest.raises(DBAPIError, match=ON_COMMIT):
            await client.get("/")
    assert await pair.notes() == ([], [])


@every_combination
async def test_outer_commit_fails(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The outer COMMIT fails after the inner one: the error and the log name both sides, in this order."""
    async with asgi_client(breaking_app(pair, pair.outer)) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
            await client.get("/")
    error = raised.value
    (committed,) = error.committed
    assert committed.startswith(pair.inner.label)
    assert error.failed.startswith(pair.outer.label)
    assert isinstance(error.__cause__, DBAPIError)
    assert f"ERROR: COMMIT failed on {error.failed} after {committed} had committed" in str(
        complaints(caplog)
    )
    assert await pair.notes() == (["note"], [])


@every_combination
async def test_response_of_a_partial_commit(pair: Pair) -> None:
    """The client of a partial commit gets 500, or what a handler makes of the error; never the 2xx."""
    async with asgi_client(breaking_app(pair, pair.outer), raise_app_exceptions=False) as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert await pair.notes() == (["note"], [])
    await pair.inner.judge.execute("DELETE FROM note")
    app = breaking_app(pair, pair.outer)

    @app.exception_handler(PartialCommitError)
    async def repair(request: Request, error: PartialCommitError) -> JSONResponse:
        async with pair.inner.db(commit_on_exit=True) as unit:
            await unit.session.execute(text("DELETE FROM note"))
        return JSONResponse([*error.committed, error.failed], status_code=503)

    async with asgi_client(app) as client:
        response = await client.get("/")
    assert response.status_code == 503
    for side, name in zip(pair.sides, response.json(), strict=True):
        assert name.startswith(side.label)
    assert await pair.notes() == ([], [])


@every_combination
@pytest.mark.parametrize("inner", ["read", "untouched"])
async def test_outer_commit_fails_alone(pair: Pair, inner: str) -> None:
    """Where the inner side wrote nothing, a failing outer COMMIT is the database's plain error."""
    app = pair.app()

    @app.get("/")
    async def write() -> str:
        if inner == "read":
            await pair.inner.read()
        await pair.outer.add("note")
        pair.outer.break_commit()
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(DBAPIError, match=ON_COMMIT):
            await client.get("/")
    assert await pair.notes() == ([], [])


@every_combination
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_commit_by_hand_counts_as_committed(pair: Pair, *, commit_on_exit: bool) -> None:
    """An inner side whose route committed by hand is named, too, when the outer COMMIT fails."""
    app = app_of(pair.outer.mounted(), pair.inner.mounted(commit_on_exit=commit_on_exit))

    @app.get("/")
    async def write() -> str:
        await pair.inner.add("note")
        await pair.inner.db.session.commit()
        await pair.outer.add("note")
        pair.outer.break_commit()
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
            await client.get("/")
    assert [name.partition(" ")[0] for name in raised.value.committed] == ["InnerSession"]
    assert await pair.notes() == (["note"], [])


class CopiesTheScope:
    """A middleware that hands a copy of the scope on, as some do in order to add to it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application."""
        await self.app({**scope}, receive, send)


@every_combination
async def test_partial_commit_through_a_copied_scope(pair: Pair) -> None:
    """A middleware between the two that copies the scope does not hide the inner side's COMMIT."""
    app = app_of(pair.outer.mounted(), Middleware(CopiesTheScope), pair.inner.mounted())

    @app.get("/")
    async def write() -> str:
        await pair.add("note")
        pair.outer.break_commit()
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair"):
            await client.get("/")
    assert await pair.notes() == (["note"], [])


@pytest.mark.parametrize("kinds", [(*DRIVERS, *DRIVERS)[start : start + 3] for start in range(4)], ids=id_of)
@pytest.mark.parametrize("broken", ["middle", "outermost"])
async def test_three_pairs(urls: list[str], judge_for: JudgeFor, broken: str) -> None:
    """With three pairs the error names all that have committed, the innermost first, and one that failed."""
    async with AsyncExitStack() as stack:
        classes = (InnerSession, OuterSession, OutermostSession)
        sides = [
            await stack.enter_async_context(open_side(class_, url, judge_for))
            for class_, url in zip(classes, urls, strict=True)
        ]
        failing = sides[1 if broken == "middle" else 2]
        app = app_of(*(side.mounted() for side in reversed(sides)))

        @app.get("/")
        async def write() -> None:
            for side in sides:
                await side.add("note")
            failing.break_commit()

        async with asgi_client(app) as client:
            with pytest.raises(PartialCommitError, match="had committed: repair") as raised:
                await client.get("/")
        count = sides.index(failing)
        assert raised.value.failed.startswith(failing.label)
        assert len(raised.value.committed) == count
        for name, side in zip(raised.value.committed, sides, strict=False):
            assert name.startswith(side.label)
        assert [await side.notes() for side in sides] == [["note"]] * count + [[]] * (3 - count)


# The tail of a request.


@every_combination
async def test_stream_and_background_task_use_both(pair: Pair) -> None:
    """What a stream and a background task write to both is committed when the application returns."""
    app = pair.app()

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            assert await pair.notes() == (["1 head"], ["1 head"])
            assert pair.checked_out() == [0, 0]
            yield b"some"
            await pair.add("2 stream")
            yield b"thing"

        await pair.add("1 head")
        tasks.add_task(pair.add, "3 task")
        return StreamingResponse(chunks(), background=tasks)

    async with asgi_client(app) as client:
        assert (await client.get("/")).text == "something"
    assert await pair.notes() == (["1 head", "2 stream", "3 task"],) * 2


@every_combination
async def test_failing_tail_undoes_its_own_part_of_both(pair: Pair) -> None:
    """A background task that fails loses the tail on both sides; what the client was told of stays."""
    app = pair.app()

    async def fail() -> None:
        await pair.add("2 task")
        raise LookupError

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> str:
        await pair.add("1 head")
        tasks.add_task(fail)
        return "written"

    async with asgi_client(app, raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 200
    assert await pair.notes() == (["1 head"], ["1 head"])


@every_combination
@pytest.mark.parametrize("broken", ["inner", "outer"])
async def test_commit_of_the_tail_fails(pair: Pair, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    """A tail's COMMIT that fails is logged with its side; the inner side's failure undoes the outer tail."""
    app = pair.app()
    failing = pair.inner if broken == "inner" else pair.outer

    async def write_more() -> None:
        await pair.add("2 task")
        failing.break_commit()

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> str:
        await pair.add("1 head")
        tasks.add_task(write_more)
        return "written"

    async with asgi_client(app, raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 200
    inner = ["1 head"] if broken == "inner" else ["1 head", "2 task"]
    assert await pair.notes() == (inner, ["1 head"])
    said = [text for text in complaints(caplog) if text.startswith(f"ERROR: COMMIT on {failing.label}")]
    assert "failed after the response had started" in said[-1]


@every_combination
async def test_partial_commit_of_the_tail(pair: Pair) -> None:
    """The outer side's COMMIT of the tail fails after the inner side's: the error names both, too."""
    app = pair.app()

    async def write_more() -> None:
        await pair.add("note")
        pair.outer.break_commit()

    @app.get("/")
    async def write(tasks: BackgroundTasks) -> str:
        tasks.add_task(write_more)
        return "written"

    async with asgi_client(app) as client:
        with pytest.raises(PartialCommitError, match="had committed: repair"):
            await client.get("/")
    assert await pair.notes() == (["note"], [])
