"""The ways in which a session comes to another engine than the one that is bound."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from attrs import define, field, frozen
from sqlalchemy import Engine, Executable, Result
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import SessionArgs, SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import Judge, JudgeFor
from tests.support.site import checked_out
from tests.support.tables import Note, engine_with_tables

Send = Callable[[AsyncSession, AsyncEngine, Executable], Awaitable[Result[Any]]]
ToArguments = Callable[[AsyncEngine], dict[str, Any]]


class Routing(Session):
    """SQLAlchemy's own recipe: the class chooses the engine."""

    def get_bind(self, *_: Any, **__: Any) -> Engine:
        """Return the other engine."""
        other: AsyncEngine = self.info["other"]
        return other.sync_engine


class RoutingByMapper(Session):
    """A class that asks nobody for a mapper's engine."""

    def get_bind(self, mapper: Any = None, **arguments: Any) -> Any:
        """Return the other engine for what is mapped, the session's own for the rest."""
        other: AsyncEngine = self.info["other"]
        return super().get_bind(mapper, **arguments) if mapper is None else other.sync_engine


def nothing(_: AsyncEngine) -> dict[str, Any]:
    """Give no arguments."""
    return {}


def routed(other: AsyncEngine) -> dict[str, Any]:
    """Give a class that routes all."""
    return {"sync_session_class": Routing, "info": {"other": other}}


def routed_by_mapper(other: AsyncEngine) -> dict[str, Any]:
    """Give a class that routes what is mapped."""
    return {"sync_session_class": RoutingByMapper, "info": {"other": other}}


def _one(*_: object, **__: object) -> str:
    return "one"


def _only(*_: object, **__: object) -> list[str]:
    return ["one"]


def sharded(other: AsyncEngine) -> dict[str, Any]:
    """Give SQLAlchemy's sharding, whose only shard is on the other engine."""
    return {
        "sync_session_class": ShardedSession,
        "shards": {"one": other.sync_engine},
        "shard_chooser": _one,
        "identity_chooser": _only,
        "execute_chooser": _only,
    }


def bound_by_class(other: AsyncEngine) -> dict[str, Any]:
    """Give an engine to a mapped class."""
    return {"binds": {Note: other}}


async def execute(session: AsyncSession, _: AsyncEngine, statement: Executable) -> Result[Any]:
    """Send a statement where the session sends it."""
    return await session.execute(statement)


async def by_bind_arguments(session: AsyncSession, other: AsyncEngine, statement: Executable) -> Result[Any]:
    """Name the engine with the statement."""
    return await session.execute(statement, bind_arguments={"bind": other.sync_engine})


async def by_connection(session: AsyncSession, other: AsyncEngine, statement: Executable) -> Result[Any]:
    """Name the engine for a connection."""
    connection = await session.connection(bind_arguments={"bind": other.sync_engine})
    return await connection.execute(statement)


async def by_connection_of_routing(
    session: AsyncSession, other: AsyncEngine, statement: Executable
) -> Result[Any]:
    """Name the engine for a connection of a class that would route to the own one."""
    session.info["other"] = cast("AsyncEngine", session.bind)
    return await by_connection(session, other, statement)


async def by_run_sync(session: AsyncSession, other: AsyncEngine, statement: Executable) -> Result[Any]:
    """Name the engine on the synchronous side."""
    arguments = {"bind": other.sync_engine}
    return await session.run_sync(lambda sync: sync.connection(bind_arguments=arguments).execute(statement))


async def by_bind_mapper(session: AsyncSession, other: AsyncEngine, statement: Executable) -> Result[Any]:
    """Bind a mapper when the session is there already."""
    session.sync_session.bind_mapper(Note, other.sync_engine)
    return await session.execute(statement)


async def by_options(session: AsyncSession, other: AsyncEngine, statement: Executable) -> Result[Any]:
    """Name an engine that is derived from the other one."""
    if "derived" not in session.info:
        session.info["derived"] = other.execution_options(compiled_cache=None)
    return await by_bind_arguments(session, session.info["derived"], statement)


@frozen
class Way:
    """How the sessions are made, and how they send."""

    arguments: ToArguments = nothing
    send: Send = execute


WAYS = {
    "get_bind": Way(routed),
    "get_bind by mapper": Way(routed_by_mapper),
    "sharded": Way(sharded),
    "binds": Way(bound_by_class),
    "bind_arguments": Way(send=by_bind_arguments),
    "connection": Way(send=by_connection),
    "connection of a routing class": Way(routed, by_connection_of_routing),
    "run_sync": Way(send=by_run_sync),
    "bind_mapper": Way(send=by_bind_mapper),
    "derived": Way(send=by_options),
}


@define(eq=False)
class Routed:
    """A proxy whose engine is one, and another engine to which its sessions come."""

    db: SessionProxy[AsyncSession]
    own: AsyncEngine
    other: AsyncEngine
    judge: Judge
    way: Way
    sent: list[str] = field(factory=list[str])

    async def send(self, statement: Executable) -> Result[Any]:
        """Send a statement to the other engine by the current session."""
        return await self.way.send(self.db.session, self.other, statement)

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed, in order."""
        return [text for (text,) in await self.judge.rows("SELECT text FROM note ORDER BY text")]

    def out(self) -> list[int]:
        """Return how many connections are out of both pools."""
        return [checked_out(engine.pool) for engine in (self.own, self.other)]


@asynccontextmanager
async def open_routed(
    way: Way, urls: tuple[str, str], judge_for: JudgeFor, **engine_args: Any
) -> AsyncGenerator[Routed]:
    """Bind a fresh pair to one of two databases; on exit no connection of either may be out."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    own_url, other_url = urls
    async with engine_with_tables(own_url) as own, engine_with_tables(other_url, **engine_args) as other:
        db.bind(own, session_args=cast("SessionArgs", way.arguments(other)))  # sharding has its own
        routed = Routed(db, own, other, await judge_for(other_url), way)
        yield routed
        assert routed.out() == [0, 0]
        db.unbind()
