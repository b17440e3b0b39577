"""Who is compared: what each needs in its environment, and how it is opened."""

from collections.abc import Callable
from typing import Any

from attrs import frozen
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.field import adapters
from benchmarks.field.ground import Open

_IMPORTS = "from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine\n"
_OF_DB = "from {} import db\nreveal_type(db.session)"
_OF_DEPENDENCY = """
from collections.abc import AsyncIterator
from typing import Annotated
from fastapi import Depends
maker = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))
async def session() -> AsyncIterator[AsyncSession]:
    async with maker.begin() as session:
        yield session
async def route(session: Annotated[AsyncSession, Depends(session)]) -> None:
    reveal_type(session)
"""
_OF_CONTEXT = """
from context_async_sqlalchemy import DBConnect, db_session
async def route(connect: DBConnect) -> None:
    reveal_type(await db_session(connect))
"""
_OF_SQLA = """
from fastapi_sqla import AsyncSession
async def route(session: AsyncSession) -> None:
    reveal_type(session)
"""
_OF_ALCHEMY = """
from advanced_alchemy.extensions.fastapi import AdvancedAlchemy
from fastapi import Request
def route(alchemy: AdvancedAlchemy, request: Request) -> None:
    reveal_type(alchemy.provide_async_session()(request))
"""


@frozen
class Contender:
    """A package, or a program of a reader's own."""

    title: str
    """The head of its column; `{}` is its version."""
    distribution: str
    """What is compared, and whose version is shown."""
    opened: Callable[[], Open]
    typed: str
    """A program that has mypy reveal the type of its session."""
    requirements: tuple[str, ...] = ()
    """What is installed for it beside what all have; a pin here takes the place of requirements/dev.txt's."""
    unsettled: Callable[[], Open] | None = None
    """Opens it so that nothing commits by itself; None where it always commits."""
    synchronous: bool = False


CONTENDERS: dict[str, Contender] = {
    "package": Contender(
        "this package, {}",
        "fastapi-async-sqlalchemy",
        lambda: adapters.package(AsyncSession),
        _OF_DB.format("fastapi_async_sqlalchemy"),
        unsettled=lambda: adapters.package(AsyncSession, commit=False),
    ),
    "function": Contender(
        'dependency, `scope="function"`, FastAPI {}',
        "fastapi",
        adapters.dependency,
        _IMPORTS + _OF_DEPENDENCY,
        unsettled=lambda: adapters.dependency(commit=False),
    ),
    "dependency": Contender(
        "dependency, default scope, FastAPI {}",
        "fastapi",
        lambda: adapters.dependency(scope=None),
        _IMPORTS + _OF_DEPENDENCY,
        unsettled=lambda: adapters.dependency(scope=None, commit=False),
    ),
    "release": Contender(
        "release {}",
        "fastapi-async-sqlalchemy",
        adapters.package,
        _OF_DB.format("fastapi_async_sqlalchemy"),
        ("fastapi-async-sqlalchemy==0.8.1",),
        unsettled=lambda: adapters.package(commit=False),
    ),
    "context": Contender(
        "context-async-sqlalchemy {}",
        "context-async-sqlalchemy",
        lambda: adapters.context(pure_asgi=False),
        _OF_CONTEXT,
        ("context-async-sqlalchemy==2.1.9",),
    ),
    "context-asgi": Contender(
        "the same with its ASGI middleware",
        "context-async-sqlalchemy",
        lambda: adapters.context(pure_asgi=True),
        _OF_CONTEXT,
        ("context-async-sqlalchemy==2.1.9",),
    ),
    "sqla": Contender(
        "fastapi-sqla {}",
        "fastapi-sqla",
        adapters.fastapi_sqla,
        _OF_SQLA,
        ("fastapi-sqla==4.0.1", "fastapi==0.141.1", "asyncpg==0.31.0"),
    ),
    "alchemy": Contender(
        "advanced-alchemy {}",
        "advanced-alchemy",
        adapters.advanced_alchemy,
        _OF_ALCHEMY,
        ("advanced-alchemy==1.12.0",),
        unsettled=lambda: adapters.advanced_alchemy(commit=False),
    ),
    "synchronous": Contender(
        "fastapi-sqlalchemy {}",
        "fastapi-sqlalchemy",
        adapters.fastapi_sqlalchemy,
        _OF_DB.format("fastapi_sqlalchemy"),
        ("fastapi-sqlalchemy==0.2.1", "psycopg[binary]"),
        unsettled=lambda: adapters.fastapi_sqlalchemy(commit=False),
        synchronous=True,
    ),
}
Results = dict[str, dict[str, Any]]
"""By contender: its versions, and by scenario what came of it."""
