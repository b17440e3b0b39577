"""How each contender gives a request its session, as its documentation says."""

import logging
import os
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any, cast

from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from benchmarks.field.ground import Ground, Open
from tests.support.tables import engine_with_tables

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 2}


def package(*session_class: type[AsyncSession], commit: bool = True) -> Open:
    """Return what opens `fastapi_async_sqlalchemy`: this one, or release 0.8.1, which takes no class."""

    @asynccontextmanager
    async def opened(app: FastAPI, url: str) -> AsyncGenerator[Ground]:
        names: Any = import_module("fastapi_async_sqlalchemy")
        middleware, db = names.create_middleware_and_session_proxy(*session_class)

        async def session() -> AsyncSession:
            return cast("AsyncSession", db.session)

        @asynccontextmanager
        async def block() -> AsyncGenerator[AsyncSession]:
            async with db(commit_on_exit=True):
                yield db.session

        async with engine_with_tables(url, **POOL) as engine:
            app.add_middleware(middleware, custom_engine=engine, commit_on_exit=commit)
            yield Ground(app, engine, Depends(session), block, session)

    return opened


def dependency(*, scope: str | None = "function", commit: bool = True) -> Open:
    """Return what opens the dependency that a reader writes: three lines around `async_sessionmaker`."""

    @asynccontextmanager
    async def opened(app: FastAPI, url: str) -> AsyncGenerator[Ground]:
        async with engine_with_tables(url, **POOL) as engine:
            maker = async_sessionmaker(engine, expire_on_commit=False)

            async def session() -> AsyncGenerator[AsyncSession]:
                async with maker.begin() if commit else maker() as session:
                    yield session

            options: dict[str, Any] = {} if scope is None else {"scope": scope}
            yield Ground(app, engine, Depends(session, **options), maker.begin)

    return opened


def context(*, pure_asgi: bool) -> Open:
    """Return what opens context-async-sqlalchemy, by its helper for FastAPI or by its ASGI middleware."""

    @asynccontextmanager
    async def opened(app: FastAPI, url: str) -> AsyncGenerator[Ground]:
        names: Any = import_module("context_async_sqlalchemy")

        def maker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
            return async_sessionmaker(engine, expire_on_commit=False)

        async with engine_with_tables(url, **POOL) as engine:

            def made(_: str) -> AsyncEngine:
                return engine

            connect = names.DBConnect(made, maker, host="the one")

            async def session() -> AsyncSession:
                return cast("AsyncSession", await names.db_session(connect))

            def block() -> AbstractAsyncContextManager[AsyncSession]:
                return cast(
                    "AbstractAsyncContextManager[AsyncSession]", names.new_non_ctx_atomic_session(connect)
                )

            if pure_asgi:
                app.add_middleware(names.ASGIHTTPDBSessionMiddleware)
            else:
                helpers: Any = import_module("context_async_sqlalchemy.fastapi_utils")
                helpers.add_fastapi_http_db_session_middleware(app)
            yield Ground(app, engine, Depends(session), block, session)

    return opened


def fastapi_sqla() -> Open:
    """Return what opens fastapi-sqla, which makes its engine from the environment."""

    @asynccontextmanager
    async def opened(app: FastAPI, url: str) -> AsyncGenerator[Ground]:
        structlog: Any = import_module("structlog")
        structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())
        async with engine_with_tables(url):
            pass  # the tables are made
        os.environ.update({"sqlalchemy_url": url})
        os.environ.update({f"sqlalchemy_{name}": str(value) for name, value in POOL.items()})
        names: Any = import_module("fastapi_sqla")
        asynchronous: Any = import_module("fastapi_sqla.async_sqla")
        names.setup_middlewares(app)
        await names.startup()
        engine: AsyncEngine = asynchronous._async_session_factories["default"].kw["bind"]  # noqa: SLF001  # it shows its engine nowhere else
        try:
            yield Ground(
                app, engine, Depends(asynchronous.default_async_session_dep), names.open_async_session
            )
        finally:
            await engine.dispose()

    return opened


def advanced_alchemy(*, commit: bool = True) -> Open:
    """Return what opens the FastAPI extension of advanced-alchemy, by `provide_session()`."""

    @asynccontextmanager
    async def opened(app: FastAPI, url: str) -> AsyncGenerator[Ground]:
        names: Any = import_module("advanced_alchemy.extensions.fastapi")
        async with engine_with_tables(url, **POOL) as engine:
            config = names.SQLAlchemyAsyncConfig(
                engine_instance=engine, commit_mode="autocommit" if commit else "manual"
            )
            alchemy = names.AdvancedAlchemy(config=config, app=app)

            @asynccontextmanager
            async def block() -> AsyncGenerator[AsyncSession]:
                async with config.get_session() as session:
                    yield session
                    await session.commit()

            yield Ground(app, engine, Depends(alchemy.provide_async_session()), block)

    return opened


def fastapi_sqlalchemy(*, commit: bool = True) -> Open:
    """Return what opens fastapi-sqlalchemy, whose sessions are synchronous."""

    @asynccontextmanager
    async def opened(app: FastAPI, url: str) -> AsyncGenerator[Ground]:
        names: Any = import_module("fastapi_sqlalchemy")
        async with engine_with_tables(url):
            pass  # the tables are made
        engine: Any = create_engine(make_url(url).set(drivername="postgresql+psycopg"), **POOL)

        async def session() -> AsyncSession:
            return cast("AsyncSession", names.db.session)

        @asynccontextmanager
        async def block() -> AsyncGenerator[AsyncSession]:
            with names.db(commit_on_exit=True):
                yield names.db.session

        app.add_middleware(names.DBSessionMiddleware, custom_engine=engine, commit_on_exit=commit)
        yield Ground(app, engine, Depends(session), block, session)
        engine.dispose()

    return opened


logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what late tasks raise is looked at where they are
