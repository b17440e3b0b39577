"""What one request has done so far, and the witness around the application that tells its client."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any
from urllib.parse import parse_qs

from attrs import Factory, define
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from campaign.promise import ROUTES
from campaign.watch import Watch
from fastapi_async_sqlalchemy import PartialCommitError, PoolTimeoutError


class FaultError(Exception):
    """What a handler raises at the await point that its client chose."""


class ListenerError(Exception):
    """What a listener to a session raises."""


@define(eq=False)
class Case:
    """One request as the application's own code sees it."""

    route: str
    number: int
    fail_at: int = 0
    """The await point at which the handler raises; 0 for none."""
    steps: int = 0
    begun: Counter[str] = Factory(Counter[str])
    """How many COMMITs were begun, by database: SQLAlchemy's own event tells."""
    ended: Counter[str] = Factory(Counter[str])
    """How many of them are known to have been done, by database."""
    done: list[str] = Factory(list[str])
    """The transactions that the route has seen committed."""
    doubt: set[str] = Factory(set[str])
    """Databases whose COMMIT was cut short."""
    tasks: set[asyncio.Task[Any]] = Factory(set["asyncio.Task[Any]"])
    """What the handler has left to run."""

    async def step(self) -> None:
        """Stand between two statements; raise where the client wants it."""
        self.steps += 1
        if self.steps == self.fail_at:
            raise FaultError
        await asyncio.sleep(0)

    def leave(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin a task that may outlast the handler."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    def committed(self, name: str, database: str = "main") -> None:
        """Note a transaction that the route has seen committed."""
        self.done.append(name)
        self.ended[database] += 1

    def _committed_on(self, database: str) -> None:
        """Note the transaction of this route that a database has committed."""
        for transaction in ROUTES[self.route].transactions:
            if transaction.database == database and transaction.settled in {"response", "own"}:
                self.committed(transaction.name, database)

    def failed(self, error: BaseException) -> None:
        """Note what an error says of the COMMITs that were begun."""
        if isinstance(error, PartialCommitError):
            for name in error.committed:
                self._committed_on(_database(name))
            cause = error.__cause__
            if cause is not None:
                self.failed(cause)
        elif isinstance(error, ListenerError) and error.__context__ is not None:
            self.failed(error.__context__)  # it came in between
        elif cut_short(error):
            self.doubt |= {name for name in self.begun if self.begun[name] > self.ended[name]}


def cut_short(error: BaseException) -> bool:
    """Whether the connection broke, so that a COMMIT which was under way may have been done."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated
    return isinstance(error, OSError | EOFError) and not isinstance(error, PoolTimeoutError)


current: ContextVar[Case] = ContextVar("current")


_databases: dict[str, str] = {}
"""The databases by the end of their URLs, which errors show."""


def _database(name: str) -> str:
    """Return the database that an error names."""
    return next(database for end, database in _databases.items() if end in name)


def follow(database: str, engine: AsyncEngine) -> None:
    """Note each COMMIT that is begun on an engine in the case of its request."""

    def note(_: Connection) -> None:
        case = current.get(None)
        if case is not None:
            case.begun[database] += 1

    event.listen(engine.sync_engine, "commit", note)
    _databases[f"/{engine.url.database}"] = database


@define(eq=False)
class Witness:
    """Around the whole application: gives each request its case, and tells the client what is known of it."""

    app: ASGIApp
    watch: Watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] == "/state":
            await JSONResponse(self.watch.state())(scope, receive, send)
            return
        case = _case(scope)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {b"x-done": case.done, b"x-doubt": sorted(case.doubt)}
                told = [(header, ",".join(values).encode()) for header, values in names.items()]
                message = {**message, "headers": [*message.get("headers", ()), *told]}
            await send(message)

        token = current.set(case)
        self.watch.requests += 1
        self.watch.in_flight += 1
        try:
            await self.app(scope, receive, tell)
        finally:
            self.watch.in_flight -= 1
            current.reset(token)


def _case(scope: Scope) -> Case:
    route, _, number = scope["path"].strip("/").partition("/")
    fail_at = parse_qs(scope["query_string"].decode()).get("fail_at", ["0"])[0]
    return Case(route, int(number or 0), int(fail_at))
