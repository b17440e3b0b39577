"""A request whose client leaves, or whose task is cancelled: its unit rolls back or is in doubt."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import Depends, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import SessionProxy
from tests.support.interruption import Exchange
from tests.support.request_end import Returned
from tests.support.serving import raw_get, serve
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note


class CancelOnDisconnect:
    """Cancels a request whose client has gone, as some servers do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application in a task, and cancel it when the client goes."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        serving = asyncio.ensure_future(self.app(scope, receive, send))
        while (await receive())["type"] != "http.disconnect":
            pass
        serving.cancel()
        await asyncio.wait({serving})
        if not serving.cancelled():
            serving.result()


async def cancel(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and see that the cancellation goes all the way."""
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


# Client gone, or the task cancelled


Wait = Callable[[], Awaitable[object]]
Doing = Callable[[SessionProxy[AsyncSession], Wait], Awaitable[None]]


async def nothing(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Do not touch the database."""
    await wait()


async def reading(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Have read."""
    await db.session.scalars(select(Note))
    await wait()


async def writing(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Have written."""
    db.session.add(Note(text="new"))
    await db.session.flush()
    await wait()


async def holding(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Be inside `begin()`."""
    async with db.session.begin():
        await writing(db, wait)


async def saving(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Be inside a savepoint."""
    await db.session.scalars(select(Note))
    async with db.unit.savepoint():
        await writing(db, wait)


async def streaming(db: SessionProxy[AsyncSession], wait: Wait) -> None:
    """Be in the middle of a result."""
    await writing(db, lambda: asyncio.sleep(0))
    async for _ in await db.session.stream_scalars(select(Note)):
        await wait()


DOINGS = [nothing, reading, writing, holding, saving, streaming]


def blocked_route(site: Site, doing: Doing, where: str) -> asyncio.Event:
    """Give the site a route that never ends, and return what tells that it has come to that point."""
    reached = asyncio.Event()

    async def wait() -> None:
        reached.set()
        await asyncio.Event().wait()

    async def at(place: str) -> None:
        if place == where:
            await doing(site.db, wait)

    async def dependency() -> AsyncGenerator[None]:
        await at("dependency")
        yield
        await at("teardown")

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await at("body")
        yield b"last"

    @site.app.get("/", dependencies=[Depends(dependency)])
    async def route() -> Response:
        await at("route")
        return StreamingResponse(body())

    @site.app.get("/next")
    async def following() -> None:
        site.db.session.add(Note(text="next"))

    @site.app.get("/read")
    async def read() -> list[str]:
        return list(await site.db.session.scalars(select(Note.text)))

    return reached


@pytest.mark.parametrize("doing", DOINGS)
@pytest.mark.parametrize("where", ["dependency", "route", "body", "teardown"])
async def test_cancelled_request(make_site: MakeSite, database_url: str, doing: Doing, where: str) -> None:
    """A cancelled request rolls back and gives its connection back, and the cancellation goes on."""
    site = await make_site(database_url, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    reached = blocked_route(site, doing, where)
    async with site.client() as client:
        request = asyncio.create_task(client.get("/"))
        await reached.wait()
        await cancel(request)
        assert site.checked_out() == 0
        assert await site.notes() == ["old"]
        assert (await client.get("/next")).status_code == 200
    assert await site.notes() == ["next", "old"]


@pytest.mark.parametrize("doing", DOINGS)
async def test_client_that_leaves_a_waiting_route(
    make_site: MakeSite, database_url: str, doing: Doing
) -> None:
    """Where a client's leaving cancels the request, the connection comes back and nothing is written."""
    returned = asyncio.Event()
    outside = [Middleware(CancelOnDisconnect), Middleware(Returned, event=returned)]
    site = await make_site(database_url, outside=outside, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    reached = blocked_route(site, doing, "route")
    async with serve(site.app) as address:
        async with raw_get(address, "/") as response:
            await reached.wait()
            response.cut()
            await returned.wait()
            assert site.checked_out() == 0
        async with raw_get(address, "/next") as response:
            assert await response.status() == 200
    assert await site.notes() == ["next", "old"]


@pytest.mark.parametrize("doing", DOINGS)
async def test_client_that_leaves_a_stream(make_site: MakeSite, database_url: str, doing: Doing) -> None:
    """A stream whose client left is no success: what its body wrote is rolled back, what was before stays."""
    returned = asyncio.Event()
    site = await make_site(database_url, outside=[Middleware(Returned, event=returned)], commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    reached = blocked_route(site, doing, "body")
    async with serve(site.app) as address:
        async with raw_get(address, "/") as response:
            assert await response.status() == 200
            await reached.wait()
            response.cut()
            await returned.wait()
            assert site.checked_out() == 0
            assert await site.notes() == ["old"]
        async with raw_get(address, "/next") as response:
            assert await response.status() == 200


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_stream_that_returns_as_if_it_were_done(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """A background task that runs after its stream was cut off shares the stream's fate."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)
    ran: list[str] = []

    async def background() -> None:
        ran.append("background")
        site.db.session.add(Note(text="background"))
        await site.db.session.flush()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.Event().wait()

    @site.app.get("/")
    async def route() -> Response:
        site.db.session.add(Note(text="head"))
        await site.db.session.commit()
        return StreamingResponse(body(), background=BackgroundTask(background))

    exchange = Exchange("/", spec_version="2.3")
    exchange.gone.set()
    await exchange.call(site.app)
    assert ran == ["background"]
    assert not exchange.complete
    assert await site.notes() == ["head"]
    assert len(complaints(caplog)) == (not commit_on_exit)


BLOCKED = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    "mysql": "SELECT count(*) FROM information_schema.processlist"
    " WHERE db = database() AND id <> connection_id() AND info LIKE 'INSERT%'",
}
"""How many connections of a database wait for a lock, or on MariaDB are about to."""


async def blocked(site: Site) -> None:
    """Wait until a connection waits for a lock; each look is a round trip to the server."""
    while not await site.judge.scalar(BLOCKED[site.engine.dialect.name]):
        pass


@pytest.mark.parametrize("where", ["route", "body"])
async def test_end_in_the_middle_of_a_statement(make_site: MakeSite, locking_url: str, where: str) -> None:
    """A request that ends while the database works for it hands no damaged connection to the next ones."""
    returned = asyncio.Event()
    outside = [
        *([Middleware(CancelOnDisconnect)] if where == "route" else []),
        Middleware(Returned, event=returned),
    ]
    site = await make_site(locking_url, outside=outside, commit_on_exit=True)
    await site.judge.execute("BEGIN")
    await site.judge.execute("INSERT INTO note (text) VALUES ('locked')")

    async def insert_locked(db: SessionProxy[AsyncSession], wait: Wait) -> None:
        db.session.add(Note(text="locked"))
        await db.session.flush()

    blocked_route(site, insert_locked, where)
    async with serve(site.app) as address:
        async with raw_get(address, "/") as response:
            await blocked(site)
            response.cut()
            await returned.wait()
            assert site.checked_out() == 0
        await site.judge.execute("ROLLBACK")
        async with raw_get(address, "/next") as response:
            assert await response.status() == 200
        async with raw_get(address, "/read") as response:
            assert (await response.rest()).endswith(b'["next"]')
    assert await site.notes() == ["next"]


# Cancelled during COMMIT


@define(eq=False)
class CommitWatch:
    """Which hooks ran, and which driver connections were used."""

    site: Site
    hooks: list[str] = Factory(list[str])
    connections: list[object] = Factory(list[object])

    def __attrs_post_init__(self) -> None:
        event.listen(self.site.engine.pool, "checkout", self._note)

    def _note(self, connection: object, *args: object) -> None:
        self.connections.append(connection)

    def write(self) -> None:
        """Write a note, with hooks for either outcome."""
        self.site.db.session.add(Note(text="new"))
        self.site.db.unit.on_commit(lambda: self.hooks.append("commit"))
        self.site.db.unit.on_rollback(lambda: self.hooks.append("rollback"))

    async def check(self, caplog: pytest.LogCaptureFixture) -> None:
        """See that nobody claims to know the outcome, and that the connection is never used again."""
        (complaint,) = complaints(caplog)
        assert complaint.startswith("ERROR: COMMIT on ")
        assert "outcome is unknown" in complaint
        assert self.hooks == []
        assert self.site.checked_out() == 0
        assert await self.site.notes() in ([], ["new"])
        used = self.connections[-1]
        async with self.site.client() as client:
            assert (await client.get("/next")).status_code == 200
        assert self.connections[-1] is not used


@pytest.mark.parametrize("where", ["response", "route", "background task"])
async def test_cancelled_during_commit(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """After a cancellation during COMMIT the outcome is unknown: the log says so, and no hook runs."""
    site = await make_site(database_url, commit_on_exit=True)
    watch = CommitWatch(site)

    def cancel_this_task(connection: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    def write() -> None:
        watch.write()
        event.listen(site.engine.sync_engine, "commit", cancel_this_task, once=True)

    async def background() -> None:
        write()

    @site.app.get("/")
    async def route() -> Response:
        if where == "background task":
            return Response(background=BackgroundTask(background))
        write()
        if where == "route":
            await site.db.session.commit()
        return Response()

    @site.app.get("/next")
    async def following() -> None:
        await site.db.session.scalars(select(Note))

    async with site.client() as client:
        request = asyncio.create_task(client.get("/"))
        await asyncio.wait({request})
        assert request.cancelled()
    await watch.check(caplog)


async def test_client_that_leaves_while_the_server_commits(
    make_site: MakeSite, postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that leaves while the server works on COMMIT leaves the outcome unknown just so."""
    returned = asyncio.Event()
    outside = [Middleware(CancelOnDisconnect), Middleware(Returned, event=returned)]
    site = await make_site(postgresql_url, outside=outside, commit_on_exit=True)
    watch = CommitWatch(site)
    await site.judge.execute(
        "CREATE FUNCTION wait_for_judge() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
    )
    await site.judge.execute(
        "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait_for_judge()"
    )
    await site.judge.execute("SELECT pg_advisory_lock(1)")

    @site.app.get("/")
    async def route() -> None:
        watch.write()

    @site.app.get("/next")
    async def following() -> None:
        await site.db.session.scalars(select(Note))

    async with serve(site.app) as address, raw_get(address, "/") as response:
        await blocked(site)
        response.cut()
        await returned.wait()
    await watch.check(caplog)
