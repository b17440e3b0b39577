"""The example of tenants: nobody ever sees another's rows, whatever a unit does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from contextvars import Context

import pytest
from httpx2 import AsyncClient
from sqlalchemy import CursorResult, func, insert, make_url, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from examples.multi_tenancy import schemas
from examples.multi_tenancy.rows import POLICY, Base, Note, create_app, db, read, tenant
from fastapi_async_sqlalchemy import EngineArgs, UnitOfWork, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.serving import asgi_client, serve
from tests.support.site import checked_out

ROLE = "tenants_app"
ONE_CONNECTION: EngineArgs = {"pool_size": 1, "max_overflow": 0}
ACME, INITECH = ({"Authorization": token} for token in ("Bearer 6b1f", "Bearer 93d0"))
LINES = ["acme 1", "acme 2"]
TENANTS = ("acme", "of Mr. O'Hara")
"""Names of schemas, one of which has to be quoted."""


@pytest.fixture
async def tenants_url(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[str]:
    """A database with two notes of each tenant, as a user who owns nothing sees it."""
    judge = await judge_for(postgresql_url)
    await _fill(postgresql_url)
    await judge.execute(f"CREATE ROLE {ROLE} LOGIN")
    await judge.execute(f"GRANT USAGE ON SCHEMA public TO {ROLE}")
    await judge.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}")
    await judge.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {ROLE}")
    yield make_url(postgresql_url).set(username=ROLE).render_as_string(hide_password=False)
    await judge.execute(f"DROP OWNED BY {ROLE}")
    await judge.execute(f"DROP ROLE {ROLE}")


async def _fill(url: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        for statement in POLICY:
            await connection.execute(text(statement))
        rows = [(name, f"{name} {number}") for number in (1, 2) for name in ("acme", "initech")]
        await connection.execute(insert(Note), [{"tenant": who, "text": what} for who, what in rows])
    await engine.dispose()


@pytest.fixture
async def schemas_url(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[str]:
    """A database whose schemas of tenants are dropped."""
    judge = await judge_for(postgresql_url)
    yield postgresql_url
    for name in TENANTS:
        await judge.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


async def test_requests_of_two_tenants_share_a_connection(tenants_url: str, judge_for: JudgeFor) -> None:
    """Each reads what it wrote, before the response, in a background task and in a stream, and no more."""
    judge = await judge_for(tenants_url)
    async with asgi_client(create_app(tenants_url, ONE_CONNECTION)) as client:
        for headers, name in ((ACME, "acme"), (INITECH, "initech")):
            own = [f"{name} 1", f"{name} 2", "new"]
            assert (await client.post("/notes", params={"text": "new"}, headers=headers)).json() == own
            own.append("new, later")
            assert (await client.get("/notes", headers=headers)).json() == own
            assert (await client.get("/stream", headers=headers)).text.splitlines() == own
        assert (await client.get("/notes", headers={"Authorization": "Bearer 0"})).status_code == 401
    with pytest.raises(DBAPIError, match=r'unrecognized configuration parameter "app\.tenant"'):
        await judge.scalar("SELECT count(*) FROM note")


async def test_requests_at_once(tenants_url: str) -> None:
    """On a real server the requests of two tenants do not meet either."""
    async with serve(create_app(tenants_url)) as address, AsyncClient(base_url=address.url) as client:
        headers = [ACME, INITECH] * 10
        answers = await asyncio.gather(*(client.get("/notes", headers=one) for one in headers))
    assert [answer.json() for answer in answers] == [LINES, ["initech 1", "initech 2"]] * 10


async def test_unit_never_sees_another_tenant(tenants_url: str) -> None:
    """Savepoints, ROLLBACK, COMMIT and tasks of `db.gather()` leave a unit with its tenant."""
    async with db.connect(tenants_url, engine_args={"pool_size": 3}):
        tenant.set("acme")
        async with db() as unit:
            async with unit.savepoint():
                assert await read() == LINES
            with suppress(ZeroDivisionError):
                async with unit.savepoint():
                    unit.session.add(Note(text="undone"))
                    await unit.session.flush()
                    raise ZeroDivisionError
            assert await read() == LINES
            await unit.rollback()
            assert await read() == LINES
            await unit.commit()
            assert await read() == LINES
            assert list(await db.gather(read(), read())) == [LINES, LINES]
            assert await unit.session.scalar(text("SELECT count(*) FROM note")) == 2


async def test_tenant_does_not_stay_on_the_connection(tenants_url: str) -> None:
    """The next user of the connection, who opens no unit, finds no tenant and no row."""
    async with db.connect(tenants_url, engine_args=ONE_CONNECTION):
        tenant.set("acme")
        async with db.begin():
            assert await read() == LINES
        async with db.engine.connect() as connection:
            assert await connection.scalar(select(func.current_setting("app.tenant"))) == ""
            assert (await connection.scalars(select(Note.text))).all() == []


async def test_owner_of_the_table_is_filtered(
    tenants_url: str, postgresql_url: str, judge_for: JudgeFor
) -> None:
    """The policy holds for the table's owner as well."""
    judge = await judge_for(postgresql_url)
    await judge.execute(f"ALTER TABLE note OWNER TO {ROLE}")
    async with db.connect(tenants_url), db():
        tenant.set("acme")
        assert await read() == LINES


async def test_rows_of_others_cannot_be_written(tenants_url: str, judge_for: JudgeFor) -> None:
    """An UPDATE without WHERE changes one's own rows, and a row for another tenant is refused."""
    async with db.connect(tenants_url):
        tenant.set("acme")
        async with db.begin() as unit:
            changed = await unit.session.execute(update(Note).values(text="changed"))
            assert isinstance(changed, CursorResult)
            assert changed.rowcount == 2
        with pytest.raises(DBAPIError, match="violates row-level security policy"):
            async with db.begin() as unit:
                unit.session.add(Note(tenant="initech", text="smuggled"))


async def test_connection_keeps_no_tenant(tenants_url: str) -> None:
    """The next one on the same connection is its own tenant, and nobody is none."""
    async with db.connect(tenants_url, engine_args=ONE_CONNECTION):
        for name in ("acme", "initech"):
            tenant.set(name)
            async with db():
                assert await read() == [f"{name} 1", f"{name} 2"]
        async with db.engine.connect() as connection:
            assert await connection.scalar(text("SELECT current_setting('app.tenant', true)")) == ""
            assert (await connection.execute(select(Note.text))).all() == []


async def test_unit_without_a_tenant_gets_no_session(tenants_url: str) -> None:
    """Where nobody has said whose unit it is, there is an error, and no connection is taken."""

    async def ask() -> None:
        async with db() as unit:
            with pytest.raises(LookupError):
                await unit.session.scalar(select(Note.text))

    async with db.connect(tenants_url):
        await asyncio.create_task(ask(), context=Context())
        assert checked_out(db.engine.pool) == 0


@pytest.mark.parametrize("way", [schemas.translate, schemas.set_search_path])
async def test_schema_of_each_tenant(
    schemas_url: str, judge_for: JudgeFor, way: Callable[[UnitOfWork[AsyncSession]], None]
) -> None:
    """By either way two tenants on one connection write into their own schemas, after each outcome."""
    async with schemas.db.connect(schemas_url):
        for name in TENANTS:
            await schemas.add_tenant(name)
    _, pair = create_middleware_and_session_proxy(AsyncSession)
    pair.on_open(way)

    async def count() -> int | None:
        return await pair.session.scalar(select(func.count(schemas.Note.id)))

    async with pair.connect(schemas_url, engine_args=ONE_CONNECTION):
        for name in TENANTS:
            schemas.schema.set(name)
            async with pair() as unit:
                unit.session.add(schemas.Note(text=name))
                await unit.commit()
                unit.session.add(schemas.Note(text="undone"))
                await unit.rollback()
                async with unit.savepoint():
                    assert await count() == 1
                assert await count() == 1
            assert list(await pair.gather(count())) == [1]
    judge = await judge_for(schemas_url)
    for name in TENANTS:
        assert await judge.rows(f'SELECT text FROM "{name}".note') == [(name,)]


async def test_text_is_not_translated(schemas_url: str) -> None:
    """SQL in `text()` finds the tenant's table only by the search path."""
    _, pathed = create_middleware_and_session_proxy(AsyncSession)
    pathed.on_open(schemas.set_search_path)
    async with schemas.db.connect(schemas_url), pathed.connect(schemas_url):
        await schemas.add_tenant("acme")
        async with schemas.db.begin():
            await schemas.write("one")
            assert await schemas.read() == ["one"]
        async with pathed() as unit:
            assert await unit.session.scalar(text("SELECT text FROM note")) == "one"
        async with schemas.db() as unit:
            with pytest.raises(DBAPIError, match='relation "note" does not exist'):
                await unit.session.scalar(text("SELECT text FROM note"))
