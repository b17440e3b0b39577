"""A thousand requests on a small pool: what was acknowledged is there, and nothing else is."""

import asyncio
import gc
import random
from collections import Counter
from contextvars import ContextVar

import pytest
from attrs import Factory, define
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import Response

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.interruption import Exchange, Interrupted, Moment
from tests.support.site import checked_out
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

pytestmark = survives_cancellation

REQUESTS = 1000
AT_ONCE = 50
POOL_SIZE = 5
STATUSES = {"plain": 200, "raises": 500, "refuses": 409, "commits": 200, "maps": 200, "background": 200}
WRITING = {"plain", "commits", "background"}


class DomainError(Exception):
    """An error that the application answers with 200."""


@define(eq=False)
class Client:
    """One request, perhaps cancelled, and what it may rely on."""

    number: int
    kind: str
    cancelled_at: int
    """The suspension at which it is cancelled; 0 for none."""
    moment: Moment
    commits: int = 0
    """How many COMMITs were begun for it."""
    cancelled: bool = False
    exchange: Exchange = Factory(lambda self: Exchange(f"/{self.kind}/{self.number}"), takes_self=True)

    async def run(self, app: FastAPI) -> None:
        """Make the request in the current task."""
        current_client.set(self)
        task = asyncio.current_task()
        assert task is not None
        at = {self.cancelled_at} if self.cancelled_at else frozenset[int]()
        try:
            await Interrupted(self.exchange.call(app), at, task.cancel, self.moment)
        except asyncio.CancelledError:
            self.cancelled = True
        except ValueError:
            assert self.kind == "raises"

    def expected(self) -> set[str]:
        """Return the rows that must be there."""
        acknowledged = self.exchange.status == 200 and self.kind in WRITING
        tail = self.kind == "background" and acknowledged and not self.cancelled
        return {f"{self.number}" for _ in range(acknowledged)} | {f"{self.number}-tail" for _ in range(tail)}

    def possible(self) -> set[str]:
        """Return the rows that may be there: those whose COMMIT was begun."""
        rows = [f"{self.number}", f"{self.number}-tail"] if self.kind == "background" else [f"{self.number}"]
        return set(rows[: self.commits])


current_client: ContextVar[Client] = ContextVar("current_client")


def build(db: SessionProxy[AsyncSession], app: FastAPI) -> None:
    """Give the application its routes."""

    async def write(text: str) -> None:
        db.session.add(Note(text=text))
        await db.session.flush()

    @app.exception_handler(DomainError)
    async def answer(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"accepted": False})

    @app.get("/{kind}/{number}")
    async def route(kind: str, number: int, tasks: BackgroundTasks) -> Response:
        await write(f"{number}")
        if kind == "raises":
            message = "the route failed"
            raise ValueError(message)
        if kind == "refuses":
            raise HTTPException(409)
        if kind == "maps":
            raise DomainError
        if kind == "commits":
            await db.session.commit()
        if kind == "background":
            tasks.add_task(write, f"{number}-tail")
        return Response(background=tasks)


def draw(seed: int) -> list[Client]:
    """Draw the requests: about one in three is cancelled at some suspension."""
    rng = random.Random(seed)  # noqa: S311  # a mix that can be had again, not a secret
    return [
        Client(
            number,
            rng.choice(list(STATUSES)),
            rng.choice([0, 0, rng.randint(1, 12)]),
            rng.choice(["waiting", "done"]),
        )
        for number in range(REQUESTS)
    ]


async def run_all(clients: list[Client], app: FastAPI) -> None:
    """Run the requests in order, each in a task of its own, so many at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def run(client: Client) -> None:
        async with places:
            await asyncio.create_task(client.run(app))

    async with asyncio.timeout(50):
        await asyncio.gather(*(run(client) for client in clients))


def summary(clients: list[Client]) -> dict[str, int]:
    """Count what became of the requests."""
    counts = Counter(f"status {client.exchange.status}" for client in clients)
    counts["cancelled"] = sum(client.cancelled for client in clients)
    counts["cancelled, COMMIT begun"] = sum(client.cancelled and client.commits > 0 for client in clients)
    counts["rows acknowledged"] = sum(len(client.expected()) for client in clients)
    counts["rows in doubt"] = sum(len(client.possible() - client.expected()) for client in clients)
    return dict(counts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_load(
    seed: int,
    postgresql_url: str,
    judge_for: JudgeFor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a random mix every acknowledged row is there, no refused one is, and the pool is whole."""
    gc.collect()  # what is left of other tests has its say before this one listens
    caplog.clear()
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    build(db, app)
    clients = draw(seed)
    taken: list[int] = []
    async with engine_with_tables(postgresql_url, pool_size=POOL_SIZE, max_overflow=0) as engine:
        app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)

        def note_commit(connection: Connection) -> None:
            current_client.get().commits += 1

        event.listen(engine.sync_engine, "commit", note_commit)
        event.listen(engine.pool, "checkout", lambda *_: taken.append(checked_out(engine.pool)))
        await run_all(clients, app)
        assert checked_out(engine.pool) == 0
        assert max(taken) == POOL_SIZE

    for client in clients:
        assert client.cancelled or client.exchange.status == STATUSES[client.kind]
        assert client.commits == 0 or client.kind in WRITING
    judge = await judge_for(postgresql_url)
    rows = {str(text) for (text,) in await judge.rows("SELECT text FROM note")}
    expected = {text for client in clients for text in client.expected()}
    possible = {text for client in clients for text in client.possible()}
    assert expected - rows == set()
    assert rows - expected - possible == set()
    gc.collect()
    assert not [record for record in caplog.records if record.name.startswith(("sqlalchemy", "asyncio"))]
    print(summary(clients))  # noqa: T201  # to quote; pytest -rP shows it
