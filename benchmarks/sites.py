"""The applications that are measured: the same handlers on Starlette and FastAPI, called in process."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from time import perf_counter

from attrs import Factory, define, frozen
from fastapi import FastAPI
from sqlalchemy import URL, String, literal, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Scope

from benchmarks.contenders import BARE, Contender, Db, contenders

SELECT = select(literal(1))
TAIL_SECONDS = 0.1

Handler = Callable[[Request], Awaitable[Response]]


class Base(DeclarativeBase):
    """The tables of the benchmark."""


class Entry(Base):
    """What the measured INSERT writes."""

    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(10))


@define(eq=False)
class Gate:
    """Where requests are parked until it opens."""

    opened: asyncio.Event = Factory(asyncio.Event)
    turnstile: asyncio.Semaphore = Factory(lambda: asyncio.Semaphore(0))

    async def wait(self) -> None:
        """Be parked."""
        self.turnstile.release()
        await self.opened.wait()

    async def hold(self, count: int) -> None:
        """Wait until so many have come since the last time."""
        for _ in range(count):
            await self.turnstile.acquire()


@frozen(kw_only=True)
class Site:
    """One contender's application."""

    name: str
    contender: Contender | None
    app: Starlette
    gate: Gate

    async def get(self, path: str) -> None:
        """Send one request, in the caller's task."""
        await self.app(request(path), _receive, _send)

    async def time(self, path: str, times: int) -> float:
        """Return the microseconds of a request, after a warm-up that CPython's inline caches need too."""
        for _ in range(max(1, times // 4)):
            await self.get(path)
        start = perf_counter()
        for _ in range(times):
            await self.get(path)
        return (perf_counter() - start) / times * 1e6


@frozen(kw_only=True)
class Stand:
    """All sites of one framework on one database, by name; `bare` has no middleware and no database."""

    framework: str
    sites: dict[str, Site]

    @property
    def with_session(self) -> dict[str, Site]:
        """Those that give a session."""
        return {name: site for name, site in self.sites.items() if name != BARE}


@asynccontextmanager
async def stands(url: str | URL) -> AsyncGenerator[tuple[Stand, ...]]:
    """Make every site on one database, and its table."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    async with contenders(url) as all_contenders:
        frameworks: dict[str, type[Starlette]] = {"Starlette": Starlette, "FastAPI": FastAPI}
        yield tuple(
            Stand(
                framework=name,
                sites={site.name: site for site in _sites(class_, all_contenders)},
            )
            for name, class_ in frameworks.items()
        )


def _sites(class_: type[Starlette], all_contenders: tuple[Contender, ...]) -> Iterator[Site]:
    for contender in (None, *all_contenders):
        gate = Gate()
        app = class_()
        handlers = _untouching(gate)
        if contender is not None:
            contender.install(app)
            handlers |= _using(contender.db, gate)
        for path, handler in handlers.items():
            if isinstance(app, FastAPI):
                app.add_api_route(path, handler, methods=["GET"])
            else:
                app.add_route(path, handler, methods=["GET"])
        yield Site(name=contender.name if contender else BARE, contender=contender, app=app, gate=gate)


def _untouching(gate: Gate) -> dict[str, Handler]:
    response = Response(b"ok")

    async def untouched(request: Request) -> Response:  # noqa: ARG001  # the frameworks look at it
        return response

    async def parked(request: Request) -> Response:  # noqa: ARG001  # likewise
        await gate.wait()
        return response

    return {"/untouched": untouched, "/parked": parked}


def _using(db: Db, gate: Gate) -> dict[str, Handler]:
    response = Response(b"ok")

    async def taken(request: Request) -> Response:  # noqa: ARG001  # as above
        _ = db.session
        return response

    async def selected(request: Request) -> Response:  # noqa: ARG001  # as above
        (await db.session.execute(SELECT)).scalar_one()
        return response

    async def inserted(request: Request) -> Response:  # noqa: ARG001  # as above
        db.session.add(Entry(text="measured"))
        return response

    async def streamed(request: Request) -> Response:  # noqa: ARG001  # as above
        (await db.session.execute(SELECT)).scalar_one()
        return StreamingResponse(_slow_body())

    async def followed(request: Request) -> Response:  # noqa: ARG001  # as above
        (await db.session.execute(SELECT)).scalar_one()
        return Response(b"ok", background=BackgroundTask(asyncio.sleep, TAIL_SECONDS))

    async def parked_taken(request: Request) -> Response:  # noqa: ARG001  # as above
        _ = db.session
        await gate.wait()
        return response

    return {
        "/taken": taken,
        "/selected": selected,
        "/inserted": inserted,
        "/streamed": streamed,
        "/followed": followed,
        "/parked-taken": parked_taken,
    }


async def _slow_body() -> AsyncGenerator[bytes]:
    yield b"first"
    await asyncio.sleep(TAIL_SECONDS)
    yield b"last"


def request(path: str) -> Scope:
    """Return what a server hands over for a GET."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }


async def _receive() -> Message:
    """Be a client that has sent all it had to send and stays; no route here reads a body."""
    message: Message = await asyncio.get_running_loop().create_future()
    return message


async def _send(message: Message) -> None:
    pass
