"""What type checkers refuse: every keyword has a mistake, and each line an ignore that fails when unused."""

from collections.abc import AsyncIterator

from inferred import (
    AuditSession,
    EveryModelSession,
    Hero,
    HeroModelSession,
    Item,
    Order,
    OrderMiddleware,
    OrderService,
    OrderSession,
    app,
    audit,
    by_coroutine_function,
    by_function,
    charge,
    customer_of,
    doubled,
    exists,
    on_connection,
    orders,
    place,
    replica,
    stock,
)
from sqlalchemy import create_engine, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session
from sqlmodel import select as sqlmodel_select
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    Begin,
    BeginHook,
    CommitWhen,
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    EngineArgs,
    Hook,
    InDoubtError,
    IsolationLevel,
    LongHoldWarning,
    MissingSessionError,
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
from fastapi_async_sqlalchemy.testing import Sandbox, SandboxedApp, SandboxError, sandbox

sync_engine: Engine = create_engine("sqlite://")


async def always(status: int, error: BaseException | None) -> bool:
    return status < 400 and error is None


def without_error(status: int) -> bool:
    return status < 400


def on_session(session: Session) -> None:
    session.flush()


def with_argument(number: int) -> None:
    str(number)


# The middleware, through Starlette's add_middleware and by hand.

app.add_middleware(SQLAlchemyMiddleware, db_ulr="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
app.add_middleware(OrderMiddleware, comit_on_exit=True)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
app.add_middleware(OrderMiddleware, "sqlite+aiosqlite://", None, None, None, False, ["/health"])  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
app.add_middleware(SQLAlchemyMiddleware, db_url=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, custom_engine=sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, custom_engine="sqlite+aiosqlite://")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, engine_args=[("echo", True)])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, session_args=["autoflush"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, exclude_paths=[1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, commit_when=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, commit_when=always)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, commit_when=without_error)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, max_concurrent_requests=2.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, max_concurrent_requests="20")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, request_queue_timeout="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, pool_warn_threshold="80%")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, pool_warn_interval="30")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, pool_warn_interval=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, begin="on_first_read")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, pool_warm_up="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(OrderMiddleware, db_url="x", engine_args=EngineArgs(pool_sise=1))  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]
app.add_middleware(orders)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
Middleware(OrderMiddleware, db_ulr="x")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
add_pool_timeout_handler(app=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
add_pool_timeout_handler(OrderMiddleware)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SQLAlchemyMiddleware(app=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SQLAlchemyMiddleware(db_url="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SQLAlchemyMiddleware(app, "x", exlude_paths=[])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
middleware = OrderMiddleware(app, db_url="sqlite+aiosqlite://")


async def by_hand(scope: Scope, receive: Receive, send: Send) -> None:
    await middleware(scope=1, receive=receive, send=send)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await middleware(scope=scope, receive=1, send=send)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await middleware(scope=scope, receive=receive, send=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    middleware.application  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# The pair: each database's own type.

create_middleware_and_session_proxy(session_class=int)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(session_class=Session)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(session_class=AuditSession())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(AuditSession, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
create_middleware_and_session_proxy(AuditSession, read_only="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.add_middleware(SQLAlchemyMiddleware, concurrent_use="queue")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(concurrent_use=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(read_only=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
create_middleware_and_session_proxy(begin="on_first_read")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
other: SessionProxy[AuditSession] = orders  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
narrower: SessionProxy[OrderSession] = db  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
no_session: SessionProxy[int]  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeArguments]
SessionProxy()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SessionProxy[AuditSession]()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
SessionProxy(made_by_the_library=AuditSession)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
UnitOfWork[AuditSession]()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
UnitOfWork(AuditSession())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnitOfWork(made_by_the_library=AuditSession())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
UnitTaskGroup[AuditSession]()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
UnitTaskGroup(made_by_the_library=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
other_unit: UnitOfWork[AuditSession] = orders.unit  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


async def two_databases() -> None:
    async with audit() as unit:
        await charge(unit, "Ada")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await unit.session.count()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# The proxy.


async def proxies() -> None:
    db.sesion  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    db.session = AuditSession()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    db.engine = orders.engine  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    db.session.exec(sqlmodel_select(Hero))  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    db(session_args=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(session_args={"autoflsh": False})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(session_args={"autoflush": "no"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(propagation="reqired")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(propagation=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(read_only="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(isolation_level="serializable")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(deferrable="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(begin="on_first_read")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(begin=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(multi_sessions="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(max_concurrent="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(max_concurrent=2.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(pool_timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db(None, True, "required")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db(commit_on_exitt=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.connect()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.connect(url=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect(url=sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", engine_args={"pool_sise": 2})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", engine_args={"pool_size": "2"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", session_args={"expire_on_comit": False})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", begin="on_first_read")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", pool_warm_up="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", {"echo": True})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.connect("x", db_url="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.bind(engine="sqlite+aiosqlite://")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.bind(engine=sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.bind(db.engine, session_args={"bind": db.engine})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.bind(db.engine, {"autoflush": False})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.unbind(db.engine)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with db():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    with db.connect("x"):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    async with db:  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    async with db.connect("x") as unit:
        unit.commit()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# Blocks by their own names.


async def blocks() -> None:
    db.begin(session_args=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(propagation="reqired")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(read_only="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(deferrable="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(begin="later")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(begin="later")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(pool_timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(max_concurrent="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(session_args=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(read_only="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(deferrable="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.per_task(pool_timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await db.create_all(metadata=Order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await db.drop_all(metadata=Order)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await db.unit_dependency(connection=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.begin(commit_on_exit=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.per_task(propagation="required")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with db.begin():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


# A model of another database.


def order_session(session: OrderSession) -> None: ...


async def models(every: EveryModelSession, hero: HeroModelSession) -> None:
    session = stock.session
    session.add(instance=Order())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.add(Item)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.add("item")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.add(Item(), _warn="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    session.add_all(instances=[Item(), Order()])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    session.add_all(Item())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.delete(instance=Order())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.refresh(instance=Order())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.refresh(Item(), attribute_names=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.refresh(Item(), with_for_update="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    session.expire(instance=Order())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    session.expire(Item(), attribute_names=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    session.expunge(instance=Order())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get(entity=Order, ident=1, identity_token=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get(Item(), 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get(Item, 1, options=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get(Item, 1, populate_existing="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get(Item, 1, with_for_update="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get(Item, 1, execution_options=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get_one(entity=Order, ident=1, identity_token=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get_one(Item, 1, options=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get_one(Item, 1, populate_existing="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get_one(Item, 1, with_for_update="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await session.get_one(Item, 1, execution_options=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    every.add(Hero(id=1, name="Ada"))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await every.get(Hero, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    hero.add(Item())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await hero.get(Item, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    order_session(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


WrongDatabaseError(database=5, fact="x", bases=["x"], owner=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
WrongDatabaseError(database="x", fact=5, bases=["x"], owner=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
WrongDatabaseError(database="x", fact="x", bases=5, owner=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
WrongDatabaseError(database="x", fact="x", bases=["x"], owner=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# A replica: a position is no text of any kind, and a fallback is a proxy.


async def replicas(position: WalPosition) -> None:
    db.after("0/1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(orders.commit_position())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position="0/1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position, session_args=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position, isolation_level="AUTOCOMMIT")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position, pool_timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position, timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position, fallback=orders.engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.after(position, fallback="primary")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    replica(wait_fr=position)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db(wait_for=position)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    orders.connection(position=position)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    orders.commit_position()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await orders.commit_position(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    async with replica.after(position, fallback=orders) as unit:
        await charge(unit, "Ada")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


WalPosition(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ReplicaLagError(database=5, position="0/1", replayed=None, timeout=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ReplicaLagError(database="replica", position=5, replayed=None, timeout=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ReplicaLagError(database="replica", position="0/1", replayed=5, timeout=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ReplicaLagError(database="replica", position="0/1", replayed=None, timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
is_conflict(error="deadlock")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
is_unavailable(error="refused")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
violated_constraint(error="duplicate key")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
pgbouncer_engine_args({"timeout": 5})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# One outcome for several databases.


async def both() -> None:
    atomic()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    atomic(orders)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    atomic(first=orders, second=audit)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    atomic(orders, OrderMiddleware)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    atomic(orders.engine, audit.engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    atomic([orders, audit])  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    atomic(orders(), audit())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    atomic(databases=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with atomic(orders, audit):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    async with atomic(orders, audit) as unit:
        unit.session  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    recover(db.engine, orders.engine)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await recover()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await recover(db.engine)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await recover(first=db.engine, second=orders.engine)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await recover(db.engine, "postgresql+asyncpg://")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, db)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, orders.engine, older_than="60")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, orders.engine, older_than=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, orders.engine, group=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, orders.engine, dry_run="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await recover(db.engine, orders.engine, 60.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    [found] = await recover(db.engine, orders.engine)
    found.committed = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


main(arguments=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
main(arguments=[5])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
Resolved(name=5, database="shop", committed=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Resolved(name="uow_1", database=5, committed=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Resolved(name="uow_1", database="shop", committed="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
InDoubtError(transaction=5, committed=["orders"], in_doubt=["audit"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
InDoubtError(transaction="0123", committed=5, in_doubt=["audit"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
InDoubtError(transaction="0123", committed=["orders"], in_doubt=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
InDoubtError("0123", ["orders"], ["audit"]).in_doubt.append("x")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# Functions in a unit of work.


def no_coroutine_function() -> int:
    return 1


async def generator() -> AsyncIterator[int]:
    yield 1


db.transactional(generator)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportCallIssue]
db.transactional(retries=3)(generator)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
db.transactional(OrderService)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportCallIssue]
db.transactional(no_coroutine_function)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType, reportCallIssue]
db.transactional(function=by_coroutine_function)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
db.transactional(by_coroutine_function, retries=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional("required")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
db.transactional(propagation="reqired")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional(read_only="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional(isolation_level="AUTOCOMMIT")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional(deferrable="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional(retries="3")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional(retries=1.5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
db.transactional(retrys=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
db.transactional(retries=3)(no_coroutine_function)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


async def transactional_functions() -> None:
    await place(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await place("Ada", urgent="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    place("Ada")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await OrderService.find(1)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    await OrderService.made("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await OrderService.first(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await doubled(1.5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    (await place("Ada")).upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    await db.dependency(connection=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await db.ping(timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.pool_status(5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


# Many tasks.

other_group: UnitTaskGroup[AuditSession] = orders.task_group()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


async def tasks(group: UnitTaskGroup[OrderSession]) -> None:
    await db.gather(1, 2)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(customer_of)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather([customer_of(1)])  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(coroutine1=exists(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await db.gather(exists(1), coroutine2=exists(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await db.gather(exists(1), exists(1), coroutine3=exists(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await db.gather(exists(1), exists(1), exists(1), coroutine4=exists(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await db.gather(exists(1), exists(1), exists(1), exists(1), coroutine5=exists(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await db.gather(exists(1), exists(1), exists(1), exists(1), exists(1), coroutine6=exists(1))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    await db.gather(exists(1), return_exceptions="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(exists(1), max_concurrent="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(exists(1), max_concurrent=2.5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(exists(1), commit_on_exit="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(exists(1), session_args=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(exists(1), session_args={"autoflsh": False})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await db.gather(exists(1), limit=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    db.gather(exists(1), customer_of(1))  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    with_argument(await db.gather(exists(1), customer_of(1)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with_argument((await db.gather(exists(1), customer_of(1)))[1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (await db.gather(exists(1), customer_of(1), return_exceptions=True))[1].upper()  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    (await db.gather(*[exists(1)]))[0].upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    db.task_group(max_concurrent="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.task_group(commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.task_group(session_args=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.task_group(2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    group.create_task(coroutine=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    group.create_task(coroutine=customer_of)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    group.create_task(exists(1), name=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    group.create_task(exists(1), "name")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    (await group.create_task(exists(1))).upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    await group.__aexit__(kind=5, error=None, trace=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await group.__aexit__(kind=None, error=5, trace=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await group.__aexit__(kind=None, error=None, trace=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connection(timeout="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connection(commit_on_exit="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connection(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    async with db.connection() as session:
        await session.count()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    with db.task_group():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    with db.connection():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


# The pool's state.

status = PoolStatus(pool_class="QueuePool")
PoolStatus("QueuePool")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
PoolStatus(pool_class=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", size="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", max_overflow="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", capacity="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", checked_in="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", checked_out="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", available="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolStatus(pool_class="QueuePool", saturation="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
status.size = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
status["size"] = 5  # type: ignore[index]  # pyright: ignore[reportIndexIssue]
status.__getitem__(name=5)  # type: ignore[call-arg]  # pyright: ignore[reportArgumentType]


# The unit of work.


async def units(unit: UnitOfWork[OrderSession]) -> None:
    await unit.comit()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    unit.commit()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    unit.rollback()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await unit.commit(force=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await unit.savepoint("name")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with unit.savepoint():  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    unit.info[5] = "a note"  # type: ignore[index]  # pyright: ignore[reportArgumentType]
    await unit.opened.count()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
    unit.opened = None  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.closed = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.session = OrderSession()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.info = {}  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    unit.on_commit(hook=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_commit(hook=with_argument)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_commit(hook=by_coroutine_function())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_rollback(hook="notify")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_rollback(hook=by_function())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_rollback(by_function, by_function)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    unit.before_commit(hook=with_argument)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.before_commit(hook=by_coroutine_function())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_begin(hook=by_function)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.on_begin(hook=on_session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    unit.set_rollback_only(True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    (await unit.session.scalars(select(Order.id))).one().upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# The aliases.

rule: CommitWhen = always  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
looser: CommitWhen = without_error  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
hook: Hook = with_argument  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
begin_hook: BeginHook = by_function  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
level: IsolationLevel = "AUTOCOMMIT"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
beginning: Begin = "on_first_read"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
joining: Propagation = "supports"  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
on_connection(db.engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
hooked: Hook = 3  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


# The errors.

ConfigurationError("what").remedy  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
EngineAlreadyBoundError(database=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
EngineAlreadyBoundError(database="orders", holder=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
EngineAlreadyBoundError(database="orders", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
EngineAlreadyBoundError(database="orders", needless=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionNotInitialisedError(database=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionNotInitialisedError()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MissingSessionError(database=5, place="here", remedy="open one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MissingSessionError(database="orders", place=5, remedy="open one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MissingSessionError(database="orders", place="here", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnitClosedError(database=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConfigurationError(parameter=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConfigurationError(parameter="a", wanted=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConfigurationError(value=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
ConcurrentUseError(database=5, attempt="b", busy="c")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(database="a", attempt=5, busy="c")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(database="a", attempt="b", busy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(database="a", attempt="b", busy="c", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnexpectedRollbackError(database=5, reason="b")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnexpectedRollbackError(database="shop", reason="x", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnitClosedError(database="shop", opening=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnexpectedRollbackError(database="a", reason=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PropagationError(database=5, reason="a conflict", remedy="join nothing")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PropagationError(database="orders", reason=5, remedy="join nothing")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PropagationError(database="orders", reason="a conflict", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ReadOnlyError(database=5, objects=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ReadOnlyError(database="orders", objects="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
TransactionBegunError(database=5, remedy="commit first")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
TransactionBegunError(database="orders", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
TransactionBegunError(database="orders")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
PoolTimeoutError(database=5, timeout=0.5, pool_status=status, remedy="wait")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolTimeoutError(database="orders", timeout="0.5", pool_status=status, remedy="wait")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolTimeoutError(database="orders", timeout=0.5, pool_status=5, remedy="wait")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolTimeoutError(database="orders", timeout=0.5, pool_status=status, remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PoolTimeoutError("orders", 0.5, status, "wait", holders=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PartialCommitError(committed=5, failed="audit")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PartialCommitError(committed=["orders"], failed=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
PartialCommitError(["orders"], "audit").committed.append("x")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
PartialCommitError(["orders"], "audit").database  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# The arguments of engines, one by one.

EngineArgs(pool_sise=1)  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]
EngineArgs(server_side_cursors=True)  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]
EngineArgs(async_creator=by_function)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(connect_args=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(creator="postgresql")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(echo="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(echo_pool="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(enable_from_linting="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(execution_options=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(hide_parameters="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(implicit_returning=False)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(insertmanyvalues_page_size="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(isolation_level="REPEATABLE")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(json_deserializer=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(json_serializer=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(label_length="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(logging_name=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(max_identifier_length="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(max_overflow="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(module=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(paramstyle="percent")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(plugins="tracer")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_logging_name=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_pre_ping="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_recycle="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_reset_on_return="begin")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_size="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_timeout="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(pool_use_lifo="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(poolclass=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(query_cache_size="5")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(skip_autocommit_rollback="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
EngineArgs(use_insertmanyvalues="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]


# The arguments of sessions, one by one.

SessionArgs(expire_on_comit=False)  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]
SessionArgs(bind=db.engine)  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]
SessionArgs(autobegin="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(autoflush="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(binds={Order: sync_engine})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(class_=Session)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(close_resets_only="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(enable_baked_queries="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(execution_options=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(expire_on_commit="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(info=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(join_transaction_mode="savepoint")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(query_cls=5)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(sync_session_class=OrderSession)  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
SessionArgs(twophase="yes")  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]


# The sandbox of tests.


async def tested(app: ASGIApp, box: Sandbox, sandboxed: SandboxedApp, receive: Receive, send: Send) -> None:
    sandbox("db")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sandbox(sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sandbox(db, timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with sandbox(db):  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass
    Sandbox(made_by_the_library=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Sandbox()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    box.commits = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    box.assert_statements(at_most="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    box.assert_statements(3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    box.fail_commit(failure="boom")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    box.fail_commit(constraint=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    box.fail_commit(on=sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    box.lose_connection(on="db")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SandboxedApp(app=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SandboxedApp(app, db, timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sandboxed(scope=5, receive=receive, send=send)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sandboxed(scope={}, receive=5, send=send)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sandboxed(scope={}, receive=receive, send=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SandboxError(reason=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Observers.


class Mistaken(Observer):
    def unit_opened(self, unit: int) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        pass

    async def unit_closed(self, unit: ObservedUnit) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        pass


def for_audit(unit: UnitOfWork[AuditSession]) -> None:
    pass


create_middleware_and_session_proxy(observers=[Observer])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
Middleware(SQLAlchemyMiddleware, server_timing="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
LongHoldWarning(seconds="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Middleware(SQLAlchemyMiddleware, observers=Observer())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
db.connect(url="", observers=Observer())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
orders.on_open(callback=for_audit)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().pool_bound(pool=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().pool_released(pool=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().unit_opened(unit=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().wait_began(unit=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().wait_ended(unit=5, seconds="1", error=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().transaction_ended(unit=5, transaction=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().hooks_ran(unit=5, count="1", seconds="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Observer().unit_closed(unit=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnitStats(made_by_the_library=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
ObservedPool(made_by_the_library=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
ObservedTransaction(made_by_the_library=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
ObservedUnit(made_by_the_library=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
OpenTelemetryObserver(pool_name="orders")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
OpenTelemetryObserver(tracer_provider=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
OpenTelemetryObserver(meter_provider=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
