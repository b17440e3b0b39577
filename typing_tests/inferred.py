"""What type checkers infer: each public name and member is asserted, and no line may be an error."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, assert_type

from fastapi import FastAPI
from sqlalchemy import URL, NullPool, func, select
from sqlalchemy.engine.interfaces import IsolationLevel
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, AsyncSessionTransaction, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlmodel import Field, SQLModel
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp
from typing_extensions import TypeVar

from fastapi_async_sqlalchemy import (
    CommitWhen,
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    EngineArgs,
    FastAPIAsyncSQLAlchemyError,
    Hook,
    MissingSessionError,
    PartialCommitError,
    SessionArgs,
    SessionNotInitialisedError,
    SessionProxy,
    SQLAlchemyMiddleware,
    UnexpectedRollbackError,
    UnitClosedError,
    UnitOfWork,
    create_middleware_and_session_proxy,
    db,
)

S = TypeVar("S", bound=AsyncSession)


class Base(DeclarativeBase):
    """SQLAlchemy's models."""


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]


class Hero(SQLModel, table=True):
    """A model of SQLModel's."""

    id: int = Field(primary_key=True)
    name: str


class OrderSession(AsyncSession):
    """The orders' session class, which tells their database apart."""

    async def count(self) -> int:
        return await self.scalar(select(func.count(Order.id))) or 0


class AuditSession(AsyncSession):
    """The audit log's session class."""


class HeroSession(SQLModelSession):
    """A session class on top of SQLModel's."""


# One pair for each database; its session class is its type.

OrderMiddleware, orders = create_middleware_and_session_proxy(OrderSession)
AuditMiddleware, audit = create_middleware_and_session_proxy(session_class=AuditSession)
HeroMiddleware, heroes = create_middleware_and_session_proxy(HeroSession)
SQLModelMiddleware, sqlmodel_db = create_middleware_and_session_proxy(SQLModelSession)
PlainMiddleware, plain = create_middleware_and_session_proxy()
assert_type(OrderMiddleware, type[SQLAlchemyMiddleware[OrderSession]])
assert_type(HeroMiddleware, type[SQLAlchemyMiddleware[HeroSession]])
assert_type(orders, SessionProxy[OrderSession])
assert_type(audit, SessionProxy[AuditSession])
assert_type(heroes, SessionProxy[HeroSession])
assert_type(sqlmodel_db, SessionProxy[SQLModelSession])
assert_type(plain, SessionProxy[AsyncSession])
assert_type(db, SessionProxy[AsyncSession])
assert_type(
    create_middleware_and_session_proxy(None),
    tuple[type[SQLAlchemyMiddleware[AsyncSession]], SessionProxy[AsyncSession]],
)


# Arguments: complete, or a plain mapping where they go through add_middleware.


async def open_connection() -> object: ...


engine_args = EngineArgs(
    async_creator=open_connection,
    connect_args={"server_settings": {"jit": "off"}},
    echo="debug",
    isolation_level="REPEATABLE READ",
    max_overflow=10,
    pool_pre_ping=True,
    pool_size=5,
    pool_timeout=0.5,
    poolclass=NullPool,
)
session_args = SessionArgs(
    autoflush=False,
    binds={Order: create_async_engine("sqlite+aiosqlite://")},
    class_=OrderSession,
    expire_on_commit=True,
    join_transaction_mode="create_savepoint",
    sync_session_class=Session,
)
assert_type(engine_args, EngineArgs)
assert_type(engine_args.get("pool_timeout", 30.0), float)
assert_type(engine_args.get("echo"), bool | Literal["debug"] | None)
assert_type(engine_args.get("isolation_level"), IsolationLevel | None)
assert_type(session_args, SessionArgs)
assert_type(session_args.get("class_"), type[AsyncSession] | None)
assert_type(session_args.get("expire_on_commit"), bool | None)


def even_on_conflict(status: int, error: BaseException | None) -> bool:
    return error is None and (status < 400 or status == 409)


def rules(rule: CommitWhen) -> list[CommitWhen]:
    assert_type(rule, CommitWhen)
    assert_type(rule, Callable[[int, BaseException | None], bool])
    return [rule, even_on_conflict, lambda status, error: status < 300 and error is None]


def by_function() -> int:
    return 1


async def by_coroutine_function() -> None: ...


hooks: list[Hook] = [by_function, by_coroutine_function, lambda: None]
assert_type(hooks, list[Hook])
assert_type(hooks, list[Callable[[], Awaitable[object] | object]])


# Every keyword of the middleware, in FastAPI, in Starlette, in a list of middlewares, and by hand.

app = FastAPI()
app.add_middleware(
    SQLAlchemyMiddleware,
    db_url="sqlite+aiosqlite://",
    engine_args={"echo": True, "pool_pre_ping": True, "pool_size": 5, "connect_args": {}},
    session_args={"autoflush": False},
    commit_on_exit=True,
    exclude_paths=["/health"],
)
app.add_middleware(OrderMiddleware, db_url=URL.create("sqlite+aiosqlite"), engine_args=engine_args)
app.add_middleware(AuditMiddleware, custom_engine=create_async_engine("sqlite+aiosqlite://"))
app.add_middleware(HeroMiddleware, session_args=session_args, commit_when=even_on_conflict)
app.add_middleware(PlainMiddleware, commit_when=lambda status, error: status < 300 and error is None)
Starlette(middleware=[Middleware(OrderMiddleware, db_url="sqlite+aiosqlite://", exclude_paths={"/health"})])
by_hand = OrderMiddleware(app, "sqlite+aiosqlite://", None, engine_args, session_args, True)
assert_type(by_hand, SQLAlchemyMiddleware[OrderSession])
assert_type(by_hand.app, ASGIApp)
served: ASGIApp = by_hand


# Helpers: for one database, for any, and for any with its own type kept.


async def charge(unit: UnitOfWork[OrderSession], customer: str) -> Order:
    order = Order(customer=customer)
    unit.session.add(order)
    await unit.commit()
    return order


async def first_order(proxy: SessionProxy[AsyncSession]) -> Order | None:
    """Serve any database: a proxy only hands its session out, so that its type is covariant."""
    return await proxy.session.scalar(select(Order))


def session_of(proxy: SessionProxy[S]) -> S:
    return proxy.session


async def first_hero(proxy: SessionProxy[SQLModelSession]) -> Hero | None:
    """Serve any database whose session class is SQLModel's or derives from it."""
    return (await proxy.session.exec(sqlmodel_select(Hero))).first()


class Repository:
    """Holds a unit of any database."""

    def __init__(self, unit: UnitOfWork[AsyncSession]) -> None:
        self.unit = unit


async def any_database() -> None:
    for proxy in (db, orders, audit, heroes, sqlmodel_db):
        assert_type(await first_order(proxy), Order | None)
    Repository(orders.unit)
    Repository(heroes.unit)
    assert_type(session_of(orders), OrderSession)
    assert_type(session_of(heroes), HeroSession)
    by_name: dict[str, SessionProxy[AsyncSession]] = {"orders": orders, "heroes": heroes}
    assert_type(by_name["orders"], SessionProxy[AsyncSession])
    await first_hero(heroes)
    await first_hero(sqlmodel_db)


# The proxy.


async def proxies() -> None:
    assert_type(db.session, AsyncSession)
    assert_type(db.unit, UnitOfWork[AsyncSession])
    assert_type(db.engine, AsyncEngine)
    assert_type(orders.session, OrderSession)
    assert_type(orders.unit, UnitOfWork[OrderSession])
    assert_type(await orders.session.count(), int)
    assert_type(db(), AbstractAsyncContextManager[UnitOfWork[AsyncSession], None])
    assert_type(orders(session_args, True), AbstractAsyncContextManager[UnitOfWork[OrderSession], None])
    assert_type(orders.bind(db.engine, session_args={"autoflush": False}), None)
    assert_type(orders.unbind(), None)
    assert_type(orders.connect(db.engine), AbstractAsyncContextManager[SessionProxy[OrderSession], None])
    async with orders.connect(
        "sqlite+aiosqlite://", engine_args={"echo": "debug"}, session_args={"info": {"job": 1}}
    ) as connected:
        assert_type(connected, SessionProxy[OrderSession])
    async with orders(session_args={"expire_on_commit": True}, commit_on_exit=True) as unit:
        assert_type(unit, UnitOfWork[OrderSession])
        assert_type(await charge(unit, "Ada"), Order)


async def returns_from_within() -> int:
    """A block never swallows an exception, so that no return is missing after it."""
    async with orders.connect(db.engine), orders() as unit:
        return await unit.session.count()


# The unit of work.


async def units() -> None:
    unit = orders.unit
    assert_type(unit.session, OrderSession)
    assert_type(unit.opened, OrderSession | None)
    assert_type(unit.closed, bool)
    assert_type(unit.info, dict[str, Any])
    assert_type(await unit.commit(), None)
    assert_type(await unit.rollback(), None)
    assert_type(unit.savepoint(), AsyncSessionTransaction)
    async with unit.savepoint() as savepoint:
        assert_type(savepoint, AsyncSessionTransaction)
    assert_type(unit.on_commit(by_function), None)
    assert_type(unit.on_rollback(by_coroutine_function), None)
    unit.on_commit(hook=unit.info.clear)


# What the session returns is what SQLAlchemy and SQLModel say.


async def results() -> None:
    assert_type(await orders.session.get(Order, 1), Order | None)
    assert_type((await orders.session.scalars(select(Order.customer))).all(), Sequence[str])
    assert_type((await orders.session.execute(select(Order))).scalar_one(), Order)
    async for order in await orders.session.stream_scalars(select(Order)):
        assert_type(order, Order)
    assert_type((await heroes.session.exec(sqlmodel_select(Hero))).all(), Sequence[Hero])
    assert_type((await sqlmodel_db.session.exec(sqlmodel_select(Hero.name))).first(), str | None)
    async with heroes() as unit:
        assert_type((await unit.session.exec(sqlmodel_select(Hero))).one(), Hero)


# Errors: their own attributes, and the builtin that each is.


def errors() -> None:
    partial = PartialCommitError(["orders"], "audit")
    assert_type(partial.committed, tuple[str, ...])
    assert_type(partial.failed, str)
    assert_type(partial.__cause__, BaseException | None)
    every: list[FastAPIAsyncSQLAlchemyError] = [partial, ConfigurationError("what, and the remedy")]
    assert_type(every[0], FastAPIAsyncSQLAlchemyError)
    concurrent = ConcurrentUseError(holder="a", operation="flush", intruder="b", attempted="commit")
    unexpected = UnexpectedRollbackError(reason="a statement failed")
    lookup: LookupError = MissingSessionError(database="orders", place="here", remedy="open one")
    value: ValueError = EngineAlreadyBoundError(database="orders")
    runtime: list[RuntimeError] = [partial, concurrent, unexpected, UnitClosedError(database="orders")]
    try:
        raise lookup or value or runtime[0]
    except MissingSessionError as error:
        assert_type(error, MissingSessionError)
    except EngineAlreadyBoundError as error:
        assert_type(error, EngineAlreadyBoundError)
    except ConfigurationError as error:
        assert_type(error, ConfigurationError)
    except (UnitClosedError, SessionNotInitialisedError) as error:
        assert_type(error, UnitClosedError | SessionNotInitialisedError)
    except ConcurrentUseError as error:
        assert_type(error, ConcurrentUseError)
    except UnexpectedRollbackError as error:
        assert_type(error, UnexpectedRollbackError)
    except PartialCommitError as error:
        assert_type(error, PartialCommitError)
