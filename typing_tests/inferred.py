"""What type checkers infer: each public name and member is asserted, and no line may be an error."""

from asyncio import Task
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Literal, Self, assert_type, overload

from fastapi import Depends, FastAPI
from opentelemetry.metrics import get_meter_provider
from opentelemetry.trace import get_tracer_provider
from sqlalchemy import URL, Connection, NullPool, func, inspect, select, text
from sqlalchemy.engine.interfaces import IsolationLevel as EngineIsolationLevel
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, AsyncSessionTransaction, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, raiseload
from sqlmodel import Field, SQLModel
from sqlmodel import select as sqlmodel_select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message
from typing_extensions import TypeVar

from fastapi_async_sqlalchemy import (
    Begin,
    BeginHook,
    CommitWhen,
    ConcurrentUseError,
    ConfigurationError,
    DBSessionMeta,
    EngineAlreadyBoundError,
    EngineArgs,
    FastAPIAsyncSQLAlchemyError,
    Hook,
    InDoubtError,
    IsolationLevel,
    LongHoldWarning,
    MissingSessionError,
    ModelSession,
    ObservedPool,
    ObservedTransaction,
    ObservedUnit,
    Observer,
    PartialCommitError,
    PoolStatus,
    PoolTimeoutError,
    Propagation,
    PropagationError,
    ReadOnlyError,
    ReplicaLagError,
    SessionArgs,
    SessionNotInitialisedError,
    SessionProxy,
    SQLAlchemyMiddleware,
    TransactionBegunError,
    TransactionOutcome,
    UnexpectedRollbackError,
    UnitClosedError,
    UnitOfWork,
    UnitStats,
    UnitTaskGroup,
    WalPosition,
    WrongDatabaseError,
    add_pool_timeout_handler,
    atomic,
    create_middleware_and_session_proxy,
    db,
    is_conflict,
    is_unavailable,
    pgbouncer_engine_args,
    violated_constraint,
)
from fastapi_async_sqlalchemy.opentelemetry import OpenTelemetryObserver
from fastapi_async_sqlalchemy.recovery import Resolved, main, recover
from fastapi_async_sqlalchemy.testing import CommitFailure, Sandbox, SandboxedApp, SandboxError, sandbox

S = TypeVar("S", bound=AsyncSession)
T = TypeVar("T")


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


class ReplicaSession(AsyncSession):
    """The session class of the orders' replica."""


class StockBase(DeclarativeBase):
    """The models of a database of its own."""


class Item(StockBase):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


class Bolt(Item):
    """A model that inherits from another one."""


StockModel = TypeVar("StockModel", bound=StockBase)


class StockSession(ModelSession[StockBase]):
    """The session class of that database, which takes its models alone."""


class EveryModelSession(ModelSession[Base | StockBase]):
    """A session class that takes the models of two bases."""


class HeroModelSession(ModelSession[SQLModel], SQLModelSession):
    """A session class of SQLModel's, which takes its models alone."""


# One pair for each database; its session class is its type.

OrderMiddleware, orders = create_middleware_and_session_proxy(OrderSession)
AuditMiddleware, audit = create_middleware_and_session_proxy(session_class=AuditSession)
HeroMiddleware, heroes = create_middleware_and_session_proxy(HeroSession)
SQLModelMiddleware, sqlmodel_db = create_middleware_and_session_proxy(SQLModelSession)
PlainMiddleware, plain = create_middleware_and_session_proxy()
StockMiddleware, stock = create_middleware_and_session_proxy(StockSession)
ReplicaMiddleware, replica = create_middleware_and_session_proxy(ReplicaSession, read_only=True)
assert_type(OrderMiddleware, type[SQLAlchemyMiddleware[OrderSession]])
assert_type(HeroMiddleware, type[SQLAlchemyMiddleware[HeroSession]])
assert_type(orders, SessionProxy[OrderSession])
assert_type(orders, DBSessionMeta[OrderSession])
assert_type(audit, SessionProxy[AuditSession])
assert_type(heroes, SessionProxy[HeroSession])
assert_type(sqlmodel_db, SessionProxy[SQLModelSession])
assert_type(plain, SessionProxy[AsyncSession])
assert_type(ReplicaMiddleware, type[SQLAlchemyMiddleware[ReplicaSession]])
assert_type(replica, SessionProxy[ReplicaSession])
assert_type(db, SessionProxy[AsyncSession])
assert_type(
    create_middleware_and_session_proxy(None, read_only=False, commit_on_exit=True, concurrent_use="wait"),
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
assert_type(pgbouncer_engine_args(), EngineArgs)
assert_type(is_conflict(ValueError()), bool)
assert_type(is_unavailable(ValueError()), bool)
assert_type(violated_constraint(ValueError()), str | None)
behind_pgbouncer: EngineArgs = {**pgbouncer_engine_args(timeout=5), "pool_size": 5}
assert_type(engine_args.get("pool_timeout", 30.0), float)
assert_type(engine_args.get("echo"), bool | Literal["debug"] | None)
assert_type(engine_args.get("isolation_level"), EngineIsolationLevel | None)
assert_type(engine_args.get("connect_args"), Mapping[str, object] | None)
assert_type(engine_args.get("json_deserializer"), Callable[[str], object] | None)
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


def on_connection(connection: Connection) -> None:
    connection.execute(text("SET LOCAL statement_timeout = '1s'"))


begin_hooks: list[BeginHook] = [on_connection, lambda connection: connection.info.clear()]
assert_type(begin_hooks, list[BeginHook])
assert_type(begin_hooks, list[Callable[[Connection], object]])


def settings(propagation: Propagation, level: IsolationLevel, begin: Begin) -> None:
    assert_type(propagation, Propagation)
    assert_type(propagation, Literal["requires_new", "required", "nested", "mandatory", "never"])
    assert_type(level, IsolationLevel)
    assert_type(level, Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    EngineArgs(isolation_level=level)
    assert_type(begin, Begin)
    assert_type(begin, Literal["on_first_use", "on_first_write"])
    db(propagation=propagation, isolation_level=level, begin=begin)
    db.connect("sqlite+aiosqlite://", begin=begin, pool_warm_up=3)
    create_middleware_and_session_proxy(begin=begin)


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
app.add_middleware(
    SQLModelMiddleware,
    max_concurrent_requests=20,
    request_queue_timeout=2,
    pool_warn_threshold=0.8,
    pool_warn_interval=30.0,
    concurrent_use="wait",
    begin="on_first_write",
    pool_warm_up=3,
)
shared: dict[str, Any] = {"commit_on_exit": True}
app.add_middleware(SQLAlchemyMiddleware, db_url="sqlite+aiosqlite://", **shared)
app.add_middleware(OrderMiddleware, db_url="sqlite+aiosqlite://", **shared)  # type: ignore[arg-type]  # docs/typing.md
assert_type(add_pool_timeout_handler(app), None)
Starlette(middleware=[Middleware(OrderMiddleware, db_url="sqlite+aiosqlite://", exclude_paths={"/health"})])


def add(middleware: type[SQLAlchemyMiddleware[AsyncSession]], url: str) -> None:
    """Share keywords between middlewares: the remedy in docs/typing.md."""
    app.add_middleware(middleware, db_url=url, commit_on_exit=True)


add(SQLAlchemyMiddleware, "sqlite+aiosqlite://")
add(OrderMiddleware, "sqlite+aiosqlite://")
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
    async with orders.begin(session_args={"autoflush": False}, read_only=True, pool_timeout=1) as unit:
        assert_type(unit, UnitOfWork[OrderSession])
    assert_type(orders.begin(), AbstractAsyncContextManager[UnitOfWork[OrderSession], None])
    by_task = orders.per_task(max_concurrent=3, commit_on_exit=True)
    assert_type(by_task, AbstractAsyncContextManager[UnitOfWork[OrderSession], None])
    assert_type(orders.per_task(), AbstractAsyncContextManager[UnitOfWork[OrderSession], None])
    assert_type(await orders.create_all(Base.metadata), None)
    assert_type(await orders.drop_all(SQLModel.metadata), None)
    assert_type(await orders.unit_dependency(), UnitOfWork[OrderSession])
    assert_type(await orders.dependency(), OrderSession)
    report = orders(propagation="required", read_only=True, isolation_level="SERIALIZABLE", deferrable=True)
    assert_type(report, AbstractAsyncContextManager[UnitOfWork[OrderSession], None])


# A session that takes the models of its own database alone.


def keep(session: ModelSession[Item], item: Item) -> None:
    assert_type(session, ModelSession[Item])
    session.add(item)


async def found(session: AsyncSession, model: type[StockModel], key: int) -> StockModel | None:
    """Find an object of any of the base's models: the bound refuses the others."""
    return await session.get(model, key)


async def one(session: ModelSession[StockBase], model: type[StockModel], key: int) -> StockModel:
    """Mypy sees the bound of a type variable alone in a protocol; docs/typing.md has the remedy above."""
    return await session.get_one(model, key)  # type: ignore[arg-type]


async def models(every: EveryModelSession, hero: HeroModelSession) -> None:
    session = stock.session
    keep(session, Bolt())
    keep(every, Item())
    assert_type(session.add(Item()), None)
    assert_type(session.add_all([Item(), Bolt()]), None)
    session.add_all(bolt for bolt in [Bolt()])
    assert_type(await session.delete(Bolt()), None)
    assert_type(await session.refresh(Item(), ["id"], with_for_update=True), None)
    assert_type(session.expire(Item(), ["id"]), None)
    assert_type(session.expunge(Item()), None)
    assert_type(await session.get(Item, 1), Item | None)
    assert_type(await session.get(Bolt, {"id": 1}, populate_existing=True), Bolt | None)
    assert_type(await session.get(inspect(Item), 1, execution_options={"yield_per": 1}), Item | None)
    assert_type(
        await session.get_one(Bolt, 1, options=[raiseload("*")], with_for_update={"nowait": True}), Bolt
    )
    assert_type(await session.merge(Bolt()), Bolt)
    assert_type(Item() in session, bool)
    assert_type(await every.get(Order, 1), Order | None)
    assert_type(await every.get(Bolt, 1), Bolt | None)
    every.add_all([Order(customer="Ada"), Item()])
    assert_type(await hero.get(Hero, 1), Hero | None)
    assert_type((await hero.exec(sqlmodel_select(Hero))).first(), Hero | None)
    assert_type(await found(session, Bolt, 1), Bolt | None)
    assert_type(await one(session, Item, 1), Item)
    await first_order(stock)
    wrong = WrongDatabaseError(database="stock", fact="Order is", bases=["StockBase"], owner=None)
    assert_type(wrong, WrongDatabaseError)
    assert_type(wrong.owner, str | None)
    type_error: TypeError = wrong
    raise type_error


# A replica: its units stay its own, wherever they are opened.


async def replicas(header: str) -> None:
    position = await orders.commit_position()
    assert_type(position, WalPosition)
    assert_type(await orders.commit_position(), WalPosition)
    text_for_a_cookie: str = position
    waiting = replica.after(position, timeout=1, fallback=orders)
    assert_type(waiting, AbstractAsyncContextManager[UnitOfWork[ReplicaSession], None])
    async with replica.after(WalPosition(header or text_for_a_cookie), fallback=None) as unit:
        assert_type(unit, UnitOfWork[ReplicaSession])
        assert_type(unit.session, ReplicaSession)
    stable = replica.after(position, isolation_level="REPEATABLE READ", pool_timeout=1, session_args=None)
    assert_type(stable, AbstractAsyncContextManager[UnitOfWork[ReplicaSession], None])
    assert_type(replica.after(position), AbstractAsyncContextManager[UnitOfWork[ReplicaSession], None])
    late = ReplicaLagError(database="replica", position=position, replayed=None, timeout=0.5)
    assert_type(late.position, str)
    assert_type(late.replayed, str | None)
    assert_type(late.timeout, float)
    timeout: TimeoutError = late
    try:
        raise timeout
    except ReplicaLagError as error:
        assert_type(error, ReplicaLagError)


# One outcome for several databases, and what finishes it after a crash.


async def both(ledger: SessionProxy[AuditSession]) -> int:
    assert_type(atomic(orders, ledger), AbstractAsyncContextManager[None, None])
    databases: list[SessionProxy[AsyncSession]] = [orders, ledger, heroes]
    assert_type(atomic(*databases), AbstractAsyncContextManager[None, None])
    assert_type(atomic(orders, *databases), AbstractAsyncContextManager[None, None])
    async with atomic(orders, ledger) as nothing_:
        assert_type(nothing_, None)
        assert_type(ledger.session, AuditSession)
        return await orders.session.count()


async def recovered(engines: list[AsyncEngine]) -> None:
    found = await recover(*engines, older_than=60, dry_run=True, group=None)
    assert_type(found, list[Resolved])
    assert_type(await recover(db.engine, orders.engine), list[Resolved])
    assert_type(await recover(db.engine, *engines), list[Resolved])
    one = Resolved(name="uow_1", database="postgresql+asyncpg://db1/shop", committed=False)
    assert_type(one.name, str)
    assert_type(one.database, str)
    assert_type(one.committed, bool)


def command_lines() -> None:
    assert_type(main(), None)
    assert_type(main(arguments=("--dry-run", "env:SHOP", "env:LEDGER")), None)


# Many tasks: results keep their types one by one, and sessions that of the database.


async def customer_of(number: int) -> str:
    return (await orders.session.get_one(Order, number)).customer


async def exists(number: int) -> bool:
    return await orders.session.get(Order, number) is not None


async def gathered() -> None:
    """Up to six coroutines give a tuple, a list of coroutines gives a list."""
    o = orders
    assert_type(await o.gather(exists(1)), tuple[bool])
    assert_type(await o.gather(exists(1), customer_of(1)), tuple[bool, str])
    assert_type(await o.gather(exists(1), customer_of(1), nothing()), tuple[bool, str, None])
    assert_type(
        await o.gather(exists(1), customer_of(1), nothing(), place("Ada")), tuple[bool, str, None, Order]
    )
    assert_type(
        await o.gather(exists(1), customer_of(1), nothing(), place("Ada"), count_orders()),
        tuple[bool, str, None, Order, int],
    )
    assert_type(
        await o.gather(exists(1), customer_of(1), nothing(), place("Ada"), count_orders(), exists(2)),
        tuple[bool, str, None, Order, int, bool],
    )
    assert_type(await o.gather(*[customer_of(number) for number in range(3)]), list[str])
    assert_type(await o.gather(*(exists(number) for number in range(3)), max_concurrent=2), list[bool])
    assert_type(
        await o.gather(
            exists(1),
            customer_of(1),
            return_exceptions=False,
            max_concurrent=None,
            commit_on_exit=True,
            session_args={"autoflush": False},
        ),
        tuple[bool, str],
    )
    assert_type(await o.gather(o.gather(exists(1)), customer_of(1)), tuple[tuple[bool], str])
    assert_type(await o.gather(*[o.gather(exists(1), customer_of(1))]), list[tuple[bool, str]])
    number, text_ = await o.gather(count_orders(), customer_of(1))
    assert_type(number, int)
    assert_type(text_, str)
    await kept_errors(keep=True)


async def kept_errors(*, keep: bool) -> None:
    """Where errors are results, or may be, each result may be one."""
    o = orders
    assert_type(await o.gather(exists(1), return_exceptions=True), tuple[bool | BaseException])
    assert_type(
        await o.gather(exists(1), customer_of(1), return_exceptions=True),
        tuple[bool | BaseException, str | BaseException],
    )
    assert_type(
        await o.gather(exists(1), customer_of(1), nothing(), return_exceptions=keep),
        tuple[bool | BaseException, str | BaseException, BaseException | None],
    )
    assert_type(
        await o.gather(exists(1), customer_of(1), nothing(), place("Ada"), return_exceptions=True),
        tuple[bool | BaseException, str | BaseException, BaseException | None, Order | BaseException],
    )
    assert_type(
        await o.gather(
            exists(1), customer_of(1), nothing(), place("Ada"), count_orders(), return_exceptions=True
        ),
        tuple[
            bool | BaseException,
            str | BaseException,
            BaseException | None,
            Order | BaseException,
            int | BaseException,
        ],
    )
    assert_type(
        await o.gather(
            exists(1),
            customer_of(1),
            nothing(),
            place("Ada"),
            count_orders(),
            exists(2),
            return_exceptions=keep,
        ),
        tuple[
            bool | BaseException,
            str | BaseException,
            BaseException | None,
            Order | BaseException,
            int | BaseException,
            bool | BaseException,
        ],
    )
    await assert_type(
        o.gather(exists(1), exists(2), nothing(), nothing(), return_exceptions=keep),
        Coroutine[
            None,
            None,
            tuple[bool | BaseException, bool | BaseException, BaseException | None, BaseException | None],
        ],
    )
    several = [customer_of(number) for number in range(3)]
    assert_type(await o.gather(*several, return_exceptions=True), list[str | BaseException])
    assert_type(await o.gather(*several, return_exceptions=keep), list[str | BaseException])


async def grouped() -> None:
    """A group's tasks have the types of their coroutines."""
    assert_type(orders.task_group(), UnitTaskGroup[OrderSession])
    group = db.task_group(max_concurrent=10, commit_on_exit=True, session_args={"autoflush": False})
    assert_type(group, UnitTaskGroup[AsyncSession])
    async with orders.task_group(max_concurrent=None, commit_on_exit=None, session_args=None) as tasks:
        assert_type(tasks, UnitTaskGroup[OrderSession])
        assert_type(tasks.create_task(customer_of(1)), Task[str])
        assert_type(tasks.create_task(nothing(), name="nothing"), Task[None])
    groups: list[UnitTaskGroup[AsyncSession]] = [db.task_group(), orders.task_group()]
    assert_type(groups[0], UnitTaskGroup[AsyncSession])


async def connected() -> None:
    """A connection is a session of the database's own class."""
    assert_type(orders.connection(), AbstractAsyncContextManager[OrderSession, None])
    async with orders.connection(timeout=1, commit_on_exit=True) as session:
        assert_type(session, OrderSession)
    async with db.connection(timeout=0.5) as plain_session:
        assert_type(plain_session, AsyncSession)
    async with orders(multi_sessions=True, max_concurrent=3, pool_timeout=0.5, commit_on_exit=True) as unit:
        assert_type(unit, UnitOfWork[OrderSession])


async def pools() -> None:
    """A pool's state is an object and a mapping."""
    assert_type(await orders.ping(timeout=1), None)
    status = orders.pool_status()
    assert_type(status, PoolStatus)
    assert_type(status.pool_class, str)
    assert_type(status.size, int | None)
    assert_type(status.max_overflow, int | None)
    assert_type(status.capacity, int | None)
    assert_type(status.checked_in, int | None)
    assert_type(status.checked_out, int | None)
    assert_type(status.available, int | None)
    assert_type(status.saturation, float | None)
    assert_type(status["saturation"], str | int | float | None)
    assert_type(dict(status), dict[str, str | int | float | None])
    assert_type({**status}, dict[str, str | int | float | None])
    served: Mapping[str, str | int | float | None] = PoolStatus(pool_class="NullPool", size=5, saturation=0.2)
    assert_type(len(served), int)


# Functions in a unit of work keep their own type.


@orders.transactional
async def place(customer: str, *, urgent: bool = False) -> Order:
    return await charge(orders.unit, customer if urgent else customer.lower())


@db.transactional(propagation="never", isolation_level="SERIALIZABLE", retries=3)
async def count_orders() -> int:
    return len((await db.session.scalars(select(Order))).all())


@db.transactional()
async def nothing() -> None: ...


class OrderService:
    """A method keeps its type too."""

    @orders.transactional(read_only=True, deferrable=False)
    async def find(self, number: int) -> Order | None:
        return await orders.session.get(Order, number)

    @classmethod
    @orders.transactional
    async def made(cls, number: int) -> Self:
        assert await exists(number)
        return cls()

    @staticmethod
    @orders.transactional(retries=1)
    async def first(kind: type[T]) -> T | None:
        return await orders.session.scalar(select(kind))


@overload
async def doubled(value: int) -> int: ...
@overload
async def doubled(value: str) -> str: ...
@orders.transactional
async def doubled(value: int | str) -> int | str:
    return value * 2


async def transactional_functions() -> None:
    assert_type(await place("Ada", urgent=True), Order)
    assert_type(await count_orders(), int)
    assert_type(await OrderService().find(1), Order | None)
    assert_type(await OrderService.made(1), OrderService)
    assert_type(await OrderService.first(Order), Order | None)
    assert_type(await doubled(1), int)
    assert_type(await doubled("Ada"), str)
    assert_type(await orders.transactional(charge)(orders.unit, "Ada"), Order)
    nothing_again: Callable[[], Awaitable[None]] = db.transactional(retries=1)(nothing)
    await nothing_again()


# FastAPI's dependency: the session by its own type.


@app.get("/orders/count")
async def serve_count(session: Annotated[OrderSession, Depends(orders.dependency)]) -> int:
    return await session.count()


async def dependencies(connection: HTTPConnection) -> None:
    assert_type(await orders.dependency(connection), OrderSession)
    assert_type(await db.dependency(connection), AsyncSession)


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
    assert_type(unit.stats, UnitStats)
    assert_type(await unit.commit(), None)
    assert_type(await unit.rollback(), None)
    assert_type(unit.savepoint(), AsyncSessionTransaction)
    async with unit.savepoint() as savepoint:
        assert_type(savepoint, AsyncSessionTransaction)
    assert_type(unit.on_commit(by_function), None)
    assert_type(unit.on_rollback(by_coroutine_function), None)
    unit.on_commit(hook=unit.info.clear)
    assert_type(unit.before_commit(by_coroutine_function), None)
    assert_type(unit.on_begin(on_connection), None)
    assert_type(unit.set_rollback_only(), None)


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
    concurrent = ConcurrentUseError(database="a", attempt="b called commit()", busy="c is at work")
    unexpected = UnexpectedRollbackError(database="a", reason="a statement failed")
    late = PoolTimeoutError("orders", 0.5, db.pool_status(), remedy="wait", holders=["task 'a'"])
    assert_type(late.holders, tuple[str, ...])
    assert_type(late.timeout, float)
    assert_type(late.retry_after, int)
    assert_type(late.pool_status, PoolStatus)
    timeout: TimeoutError = late
    in_doubt = InDoubtError("0123", committed=["orders"], in_doubt=["audit"])
    assert_type(in_doubt.transaction, str)
    assert_type(in_doubt.committed, tuple[str, ...])
    assert_type(in_doubt.in_doubt, tuple[str, ...])
    refused: list[RuntimeError] = [
        PropagationError(database="orders", reason="a conflict", remedy="join nothing"),
        ReadOnlyError(database="orders", objects=1),
        TransactionBegunError(database="orders", remedy="commit first"),
        in_doubt,
    ]
    lookup: LookupError = MissingSessionError(database="orders", place="here", remedy="open one")
    value: ValueError = EngineAlreadyBoundError(database="orders")
    runtime: list[RuntimeError] = [partial, concurrent, unexpected, UnitClosedError(database="orders")]
    try:
        raise lookup or value or timeout or runtime[0] or refused[0]
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
    except PoolTimeoutError as error:
        assert_type(error, PoolTimeoutError)
    except (PropagationError, ReadOnlyError, TransactionBegunError) as error:
        assert_type(error, PropagationError | ReadOnlyError | TransactionBegunError)
    except (PartialCommitError, InDoubtError) as error:
        assert_type(error, PartialCommitError | InDoubtError)
        assert_type(error.committed, tuple[str, ...])


async def tested(app: ASGIApp, failure: CommitFailure) -> None:
    assert_type(failure, CommitFailure)
    async with sandbox(db, orders, db.engine, timeout=1) as box:
        assert_type(box, Sandbox)
        assert_type(box.statements, list[str])
        assert_type(box.commits, int)
        assert_type(box.rollbacks, int)
        assert_type(box.hooks_run, int)
        assert_type(box.assert_statements(at_most=3), None)
        assert_type(box.reset(), None)
        assert_type(box.fail_commit(), None)
        assert_type(box.fail_commit(failure, on=orders), None)
        assert_type(box.fail_commit(constraint="order_number"), None)
        assert_type(box.lose_connection(on=db), None)
    assert_type(sandbox(db), AbstractAsyncContextManager[Sandbox, None])
    served = SandboxedApp(app, db, orders, timeout=1)
    assert_type(served, SandboxedApp)
    assert_type(served.box, Sandbox)
    as_app: ASGIApp = served
    try:
        await as_app({}, _receive, _send)
    except SandboxError as error:
        assert_type(error, SandboxError)
        runtime: RuntimeError = error
        raise runtime from None


async def _receive() -> Message:
    return {}


async def _send(message: Message) -> None:
    message.clear()


class Watching(Observer):
    """An observer overrides the moments that it wants."""

    def pool_bound(self, pool: ObservedPool) -> None:
        assert_type(pool.database, str)
        assert_type(pool.name, str)
        assert_type(pool.system, str)
        assert_type(pool.status(), PoolStatus)

    def unit_opened(self, unit: ObservedUnit) -> None:
        assert_type(unit.number, int)
        assert_type(unit.pool, ObservedPool)
        assert_type(unit.request, str | None)
        assert_type(unit.task, str)
        assert_type(unit.place, str | None)
        assert_type(unit.stats.statements, int)
        assert_type(unit.stats.rows, int)
        assert_type(unit.stats.transactions, int)
        assert_type(unit.stats.waited, float)
        assert_type(unit.stats.held, float)
        assert_type(unit.stats.committing, float)
        assert_type(unit.stats.last_statement, str)

    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        assert_type(transaction.outcome, TransactionOutcome)
        assert_type(transaction.statements, int)
        assert_type(transaction.rows, int)
        assert_type(transaction.held, float)
        assert_type(transaction.committing, float)
        assert_type(transaction.commit_error, str | None)


def observing(pool: ObservedPool, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
    """Observers go to a pair, a middleware or a block; each of their methods can be called alone."""
    watching = Watching()
    assert_type(pool, ObservedPool)
    assert_type(unit, ObservedUnit)
    assert_type(transaction, ObservedTransaction)
    assert_type(Observer(), Observer)
    assert_type(LongHoldWarning(seconds=5), LongHoldWarning)
    assert_type(LongHoldWarning(5.0).seconds, float)
    app.add_middleware(OrderMiddleware, db_url="", observers=[LongHoldWarning(5)], server_timing=True)
    telemetry = OpenTelemetryObserver(
        pool_name=lambda pool: pool.database,
        tracer_provider=get_tracer_provider(),
        meter_provider=get_meter_provider(),
    )
    assert_type(telemetry, OpenTelemetryObserver)
    orders.connect("", observers=[telemetry])
    assert_type(watching.pool_bound(pool=pool), None)
    assert_type(watching.pool_released(pool=pool), None)
    assert_type(watching.unit_opened(unit=unit), None)
    assert_type(watching.wait_began(unit=unit), None)
    assert_type(watching.wait_ended(unit=unit, seconds=0.1, error=TimeoutError()), None)
    assert_type(watching.transaction_ended(unit=unit, transaction=transaction), None)
    assert_type(watching.hooks_ran(unit=unit, count=1, seconds=0.1), None)
    assert_type(watching.unit_closed(unit=unit), None)
    create_middleware_and_session_proxy(OrderSession, observers=[watching, Observer()])
    app.add_middleware(OrderMiddleware, db_url="", observers=(watching,))
    orders.connect("", observers={watching})

    def prepare(unit: UnitOfWork[OrderSession]) -> None:
        unit.on_begin(on_connection)

    assert_type(orders.on_open(prepare), None)
    orders.on_open(callback=lambda unit: unit.info.clear())
