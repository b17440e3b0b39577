"""The fixtures and helpers of this test suite keep their own promises."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from httpx2 import AsyncClient
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import connect

from tests.support.databases import Judge, JudgeFor
from tests.support.pages import ROOT, Block, headless, quoted_parts
from tests.support.serving import asgi_client, raw_get, serve


@pytest.mark.parametrize("attempt", ["first", "second"])
async def test_each_test_gets_an_empty_database(database_url: str, attempt: str) -> None:
    """A table made by one test is not there in another, whichever of them runs first."""
    async with Judge(database_url) as judge:
        await judge.execute("CREATE TABLE only_mine (id INTEGER PRIMARY KEY)")
        assert await judge.scalar("SELECT count(*) FROM only_mine") == 0


async def test_judge_sees_committed_rows_only(database_url: str, judge_for: JudgeFor) -> None:
    """A row is seen by the judge after its commit and not before."""
    judge = await judge_for(database_url)
    await judge.execute("CREATE TABLE ledger (id INTEGER PRIMARY KEY)")
    engine = create_async_engine(database_url)
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO ledger VALUES (1)"))
        assert await judge.rows("SELECT id FROM ledger") == []
        await connection.commit()
        assert await judge.rows("SELECT id FROM ledger") == [(1,)]
    await engine.dispose()


async def test_judge_takes_values(judge_for: JudgeFor, database_url: str) -> None:
    """Values are bound by name, and a missing row is None; the fixtures may be asked for in any order."""
    judge = await judge_for(database_url)
    await judge.execute("CREATE TABLE ledger (id INTEGER PRIMARY KEY)")
    await judge.execute("INSERT INTO ledger VALUES (:id)", id=7)
    assert await judge.scalar("SELECT id FROM ledger WHERE id = :id", id=7) == 7
    assert await judge.scalar("SELECT id FROM ledger WHERE id = :id", id=8) is None


QUOTES: dict[str, tuple[str, list[str] | None]] = {
    "whole": ("@broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)\nasync def disconnect(", []),
    "no decorator": ("async def disconnect(state: TaskiqState) -> None:\n", ["disconnect"]),
    "docstring": ('    """Dispose the engine."""\n', ["disconnect"]),
    "body": ("    await state.resources.aclose()\n", []),
    "body after others": (
        "broker = TaskBroker(\n    # ...\n    await state.resources.aclose()\n",
        ["disconnect"],
    ),
    "body in part": (
        "class TaskBroker(RedisStreamBroker):\n    # ...\n            while True:\n",
        ["listen"],
    ),
    "other file": ("no such line\n", None),
}


@pytest.mark.parametrize(("text", "headless_names"), QUOTES.values(), ids=QUOTES)
def test_quotes_without_a_head_are_found(text: str, headless_names: list[str] | None) -> None:
    """A docstring and a body after left-out lines need their `def`, which needs its decorators."""
    block = Block(ROOT, 1, "python", text, None, ROOT / "examples/task_queues/with_taskiq.py")
    assert (list(headless(block)) if quoted_parts(block) else None) == headless_names


async def test_redis_answers(redis_url: str) -> None:
    """The Redis of the test run answers on the loopback, and writes nothing to a disk."""
    url = make_url(redis_url)
    expected = b"+PONG\r\n*2\r\n$4\r\nsave\r\n$0\r\n\r\n"
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"PING\r\nCONFIG GET save\r\nQUIT\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer == expected + b"+OK\r\n"


async def test_asyncmy_reaches_the_same_database(
    asyncmy_url: str, mariadb_url: str, judge_for: JudgeFor
) -> None:
    """What is written through asyncmy is read through aiomysql."""
    writer, reader = await judge_for(asyncmy_url), await judge_for(mariadb_url)
    await writer.execute("CREATE TABLE ledger (id INTEGER PRIMARY KEY)")
    await writer.execute("INSERT INTO ledger VALUES (3)")
    assert await reader.scalar("SELECT id FROM ledger") == 3


async def test_postgresql_is_set_up_for_many_connections(postgresql_url: str, judge_for: JudgeFor) -> None:
    """The settings of the test run's own PostgreSQL are in force."""
    judge = await judge_for(postgresql_url)
    assert await judge.scalar("SHOW max_connections") == "300"
    assert await judge.scalar("SHOW max_prepared_transactions") == "20"
    assert await judge.scalar("SELECT current_database()") == make_url(postgresql_url).database


def lifespan_app(log: list[str]) -> FastAPI:
    """An application that writes down in which task its startup, its route and its shutdown run."""

    def note(event: str) -> None:
        task = asyncio.current_task()
        log.append(f"{event} in {task.get_name() if task else 'no task'}")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        note("startup")
        yield {"greeting": "hello"}
        note("shutdown")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def greet(request: Request) -> str:
        greeting: str = request.state.greeting
        return greeting

    return app


async def test_asgi_client_runs_the_lifespan_in_one_task() -> None:
    """Startup and shutdown share a task, and a request sees the lifespan's state."""
    log: list[str] = []
    async with asgi_client(lifespan_app(log)) as client:
        assert log == ["startup in lifespan"]
        assert (await client.get("/")).json() == "hello"
    assert log == ["startup in lifespan", "shutdown in lifespan"]


async def fail(request: Request) -> PlainTextResponse:
    """Fail as a route."""
    message = "boom"
    raise ValueError(message)


failing_app = Starlette(routes=[Route("/", fail)])


async def test_asgi_client_raises_what_the_application_raises() -> None:
    """By default an error of the application reaches the test."""
    async with asgi_client(failing_app) as client:
        with pytest.raises(ValueError, match="boom"):
            await client.get("/")


async def test_asgi_client_can_answer_500_instead() -> None:
    """With raise_app_exceptions=False the test gets what a client would get."""
    async with asgi_client(failing_app, raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 500


@asynccontextmanager
async def broken_lifespan(app: Starlette) -> AsyncGenerator[None]:
    """Fail at startup."""
    message = "no start"
    raise OSError(message)
    yield


async def test_asgi_client_raises_what_startup_raises() -> None:
    """An error at startup is the application's own error."""
    with pytest.raises(OSError, match="no start"):
        async with asgi_client(Starlette(lifespan=broken_lifespan)):
            pass


async def test_server_that_cannot_start_says_so() -> None:
    """A failed startup ends the server and not the test run."""
    with pytest.raises(RuntimeError, match="failed to start"):
        async with serve(Starlette(lifespan=broken_lifespan)):
            pass


async def test_server_starts_and_stops() -> None:
    """A real server runs the lifespan, answers over TCP, and is gone afterwards."""
    log: list[str] = []
    async with serve(lifespan_app(log)) as address, AsyncClient(base_url=address.url, timeout=30) as client:
        assert (await client.get("/")).json() == "hello"
    assert [line.split()[0] for line in log] == ["startup", "shutdown"]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(address.host, address.port)


async def test_server_speaks_websocket() -> None:
    """A websocket goes through the real server."""

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", echo)])
    async with serve(app) as address, connect(f"ws://{address.host}:{address.port}/") as websocket:
        await websocket.send("hello")
        assert await websocket.recv() == "hello"


async def test_raw_get_reads_a_whole_response() -> None:
    """A response can be read piece by piece off the socket."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("one two")

    async with serve(Starlette(routes=[Route("/", answer)])) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        assert await response.until(b"one") == b"one"
        assert await response.rest() == b" two"


async def test_cut_connection_is_seen_by_the_application() -> None:
    """A stream arrives while the application still runs, and the application learns of the cut."""
    ended = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(chunks())

    async with serve(Starlette(routes=[Route("/", stream)])) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        await response.until(b"first")
        response.cut()
        await ended.wait()
