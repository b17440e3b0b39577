"""Databases whose units commit together: looked at from outside, and broken at every step of the commit."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Literal

from asyncpg.exceptions import InternalClientError  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]  # it has no types
from attrs import Factory, define
from sqlalchemy import URL, Connection, event
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import await_only

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.recovery import Resolved, recover
from tests.support.databases import Judge, JudgeFor, fresh_database
from tests.support.site import checked_out
from tests.support.tables import Note, engine_with_tables

Step = Literal["prepare_twophase", "commit_twophase"]
"""SQLAlchemy's events before the two statements of a two-phase commit."""
BROKEN = (DBAPIError, InternalClientError)
"""How a broken connection shows; SQLAlchemy 2.0 passes some of asyncpg's own errors on."""
BROKEN_TEXT = r"(?i)closed|lost connection|gone away|terminat|another operation"
STEPS: tuple[Step, ...] = ("prepare_twophase", "commit_twophase")
YOUNG = 1e-9
"""As `older_than`: resolve whatever there is."""
STATEMENTS: dict[Step, tuple[str, str]] = {
    "prepare_twophase": ("PREPARE TRANSACTION", "XA PREPARE"),
    "commit_twophase": ("COMMIT PREPARED", "XA COMMIT"),
}
"""What does a step, on PostgreSQL and on MariaDB; it sends XA END before it prepares."""


@define(eq=False)
class Side:
    """One database: its pair, and a judge of it."""

    middleware: Any
    db: SessionProxy[AsyncSession]
    engine: AsyncEngine
    judge: Judge
    names: set[str] = Factory(set[str])
    """The names of the two-phase transactions that were to be prepared: MariaDB lists those of everybody."""

    @property
    def url(self) -> str:
        """The database, with its password."""
        return self.engine.url.render_as_string(hide_password=False)

    @property
    def place(self) -> str:
        """The database, as messages name it."""
        url = self.engine.url
        return str(URL.create(url.drivername, host=url.host, port=url.port, database=url.database))

    @property
    def is_postgresql(self) -> bool:
        """Else it is a MariaDB."""
        return self.engine.dialect.name == "postgresql"

    async def add(self, note: str) -> None:
        """Write a note by the current unit."""
        self.db.session.add(Note(text=note))
        await self.db.session.flush()

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed, in order."""
        return [note for (note,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]

    async def prepared(self) -> list[str]:
        """Return the names of what is prepared."""
        if self.is_postgresql:
            listed = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY gid"
            return [str(name) for (name,) in await self.judge.rows(listed)]
        rows = await self.judge.rows("XA RECOVER")
        listed_names = (row[3].decode() if isinstance(row[3], bytes) else str(row[3]) for row in rows)
        return sorted(self.names.intersection(listed_names))

    async def age(self) -> float:
        """Return for how many seconds the only transaction here has been prepared, or begun on MariaDB."""
        (name,) = await self.prepared()
        if self.is_postgresql:
            since = f"SELECT extract(epoch FROM prepared) FROM pg_prepared_xacts WHERE gid = '{name}'"
            began, clock = await self.judge.scalar(since), "SELECT extract(epoch FROM clock_timestamp())"
        else:
            began, clock = name.split("_")[1], "SELECT @@timestamp"
        return float(str(await self.judge.scalar(clock))) - float(str(began))

    async def roll_back_prepared(self) -> None:
        """Leave nothing prepared: its locks would keep the database from being dropped."""
        statement = "ROLLBACK PREPARED '{}'" if self.is_postgresql else "XA ROLLBACK '{}'"
        names = await self.prepared()
        if names:
            await self.engine.dispose()
            await self.alone()
        for name in names:
            await self.judge.execute(statement.format(name))

    async def kill(self, connection: Connection) -> None:
        """End the server's side of a connection, and wait until it has ended."""
        driver: Any = connection.connection.driver_connection
        if self.is_postgresql:
            by_psycopg = self.engine.driver == "psycopg"
            backend: int = driver.info.backend_pid if by_psycopg else driver.get_server_pid()
            await self.judge.execute(f"SELECT pg_terminate_backend({backend}, 10000)")
        else:
            await self.judge.execute(f"KILL {driver.thread_id()}")
            await self.alone(driver.thread_id())

    async def alone(self, connection: int | None = None) -> None:
        """Wait until MariaDB has noticed that a connection was closed, or all but the judge's."""
        listed = "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id"
        which = "<> connection_id()" if connection is None else f"= {connection}"
        while not self.is_postgresql and await self.judge.scalar(f"{listed} {which}"):
            pass


@define(eq=False)
class Group:
    """The databases of a test, in the order in which they are given to `atomic()`."""

    sides: list[Side]

    @property
    def proxies(self) -> list[SessionProxy[AsyncSession]]:
        """What `atomic()` is given."""
        return [side.db for side in self.sides]

    async def add(self, note: str) -> None:
        """Write a note to each, by the current units."""
        for side in self.sides:
            await side.add(note)

    async def notes(self) -> list[list[object]]:
        """Return what is committed on each."""
        return [await side.notes() for side in self.sides]

    async def prepared(self) -> int:
        """Count what is prepared anywhere."""
        return sum([len(await side.prepared()) for side in self.sides])

    def everywhere(self, *notes: str) -> list[list[str]]:
        """Return what `notes()` returns where each has these."""
        return [list(notes)] * len(self.sides)

    def checked_out(self) -> list[int]:
        """Return how many connections are out of each pool."""
        return [checked_out(side.engine.pool) for side in self.sides]

    async def recover(self, *, older_than: float = YOUNG, dry_run: bool = False) -> list[Resolved]:
        """Finish what is prepared, young as it is, when the servers have noticed what was disconnected."""
        for side in self.sides:
            await side.engine.dispose()
            await side.alone()
        engines = [side.engine for side in self.sides]
        return await recover(*engines, older_than=older_than, dry_run=dry_run)

    @contextmanager
    def on(self, place: int, name: str, call: Callable[..., None]) -> Generator[None]:
        """Inside the block, call a function at an event of one side's engine."""
        engine = self.sides[place].engine.sync_engine
        event.listen(engine, name, call)
        try:
            yield
        finally:
            event.remove(engine, name, call)

    @contextmanager
    def killing(self, place: int, step: Step, victim: int, *, done: bool = False) -> Generator[None]:
        """Inside the block, kill a side's connection before the statement of a step, or when it is `done`."""
        connections: dict[int, Connection] = {}

        def kill(_: Connection, cursor: DBAPICursor, statement: str, parameters: Any, *__: object) -> None:
            if statement.startswith(STATEMENTS[step]) and victim in connections:
                if done:
                    cursor.execute(statement, parameters)
                await_only(self.sides[victim].kill(connections.pop(victim)))

        with ExitStack() as stack:
            for at in range(len(self.sides)):
                stack.enter_context(self.on(at, "begin_twophase", partial(_keep, connections, at)))
            stack.enter_context(self.on(place, "before_cursor_execute", kill))
            yield


def _keep(connections: dict[int, Connection], at: int, connection: Connection, _: str) -> None:
    connections[at] = connection


def _remember(names: set[str], _: Connection, name: str) -> None:
    names.add(name)


@asynccontextmanager
async def open_group(urls: Iterable[str], judge_for: JudgeFor, **engine_args: Any) -> AsyncGenerator[Group]:
    """Make the pairs, bound; on exit no connection is out, and nothing stays prepared whatever happened."""
    async with AsyncExitStack() as stack:
        group = Group([])
        for url in urls:
            engine = await stack.enter_async_context(engine_with_tables(url, **engine_args))
            middleware, db = create_middleware_and_session_proxy(AsyncSession)
            side = Side(middleware, db, engine, await judge_for(url))
            event.listen(engine.sync_engine, "prepare_twophase", partial(_remember, side.names))
            db.bind(engine)
            group.sides.append(side)
            stack.push_async_callback(side.roll_back_prepared)
        yield group
        assert set(group.checked_out()) == {0}
        for side in group.sides:
            side.db.unbind()


def urls_of(kinds: Iterable[str], databases: ExitStack, server_of: Callable[[str], URL]) -> Iterator[str]:
    """Make an empty database of each kind."""
    for kind in kinds:
        yield databases.enter_context(fresh_database(server_of(f"{kind}_server")))


async def ended(task: asyncio.Task[Any]) -> bool:
    """Wait for a task's end; return whether it was cancelled."""
    await asyncio.wait({task})
    return task.cancelled()
