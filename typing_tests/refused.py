"""What type checkers refuse: every keyword has a mistake, and each line an ignore that fails when unused."""

from inferred import (
    AuditSession,
    Hero,
    Order,
    OrderMiddleware,
    OrderSession,
    app,
    audit,
    by_coroutine_function,
    by_function,
    charge,
    orders,
)
from sqlalchemy import create_engine, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session
from sqlmodel import select as sqlmodel_select
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    CommitWhen,
    ConcurrentUseError,
    ConfigurationError,
    EngineAlreadyBoundError,
    EngineArgs,
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

sync_engine: Engine = create_engine("sqlite://")


async def always(status: int, error: BaseException | None) -> bool:
    return status < 400 and error is None


def without_error(status: int) -> bool:
    return status < 400


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
app.add_middleware(OrderMiddleware, db_url="x", engine_args=EngineArgs(pool_sise=1))  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportCallIssue]
app.add_middleware(orders)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
Middleware(OrderMiddleware, db_ulr="x")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
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
create_middleware_and_session_proxy(AuditSession, "audit")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
other: SessionProxy[AuditSession] = orders  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
narrower: SessionProxy[OrderSession] = db  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
no_session: SessionProxy[int]  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeArguments]
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
    db(commit_on_exitt=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.connect()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    db.connect(url=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect(url=sync_engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", engine_args={"pool_sise": 2})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", engine_args={"pool_size": "2"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    db.connect("x", session_args={"expire_on_comit": False})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
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
    (await unit.session.scalars(select(Order.id))).one().upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# The aliases.

rule: CommitWhen = always  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
looser: CommitWhen = without_error  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
hook: Hook = with_argument  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
hooked: Hook = 3  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


# The errors.

ConfigurationError("what").remedy  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
EngineAlreadyBoundError(database=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionNotInitialisedError(database=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
SessionNotInitialisedError()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MissingSessionError(database=5, place="here", remedy="open one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MissingSessionError(database="orders", place=5, remedy="open one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
MissingSessionError(database="orders", place="here", remedy=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnitClosedError(database=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(holder=5, operation="flush", intruder="b", attempted="commit")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(holder="a", operation=5, intruder="b", attempted="commit")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(holder="a", operation="flush", intruder=5, attempted="commit")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
ConcurrentUseError(holder="a", operation="flush", intruder="b", attempted=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UnexpectedRollbackError(reason=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
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
