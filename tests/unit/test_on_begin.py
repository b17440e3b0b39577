"""`on_begin` hooks run where a transaction begins, before its first statement."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from httpx2 import AsyncClient
from sqlalchemy import Connection, event, insert, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.responses import StreamingResponse

from fastapi_async_sqlalchemy import TransactionBegunError, UnexpectedRollbackError
from tests.support.databases import JudgeFor
from tests.support.hooks import COMMITS, Act, BoomError, Log, Unit, add
from tests.support.serving import serve
from tests.support.site import MakeSite, Site
from tests.support.tables import Note
from tests.support.worker import open_worker


async def test_on_begin_comes_before_each_transaction(worker: Site, log: Log) -> None:
    """The hook runs once for each transaction of its unit, on its connection, and for no savepoint."""
    seen: list[object] = []

    def look(connection: Connection) -> None:
        assert connection.in_transaction()
        seen.append(connection.execute(select(1)).scalar_one())

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(look)
        assert unit.opened is not None
        assert worker.checked_out() == 0
        for number, end in enumerate(
            (unit.commit, unit.rollback, unit.session.commit, unit.session.rollback)
        ):
            await add(unit, str(number))
            async with unit.savepoint():
                await unit.session.scalar(select(1))
            assert seen == [1] * (number + 1)
            await end()
        async with unit.session.begin():
            assert len(seen) == 4
            await unit.session.scalar(select(1))
        async with unit.savepoint():
            await unit.session.connection()
    assert seen == [1] * 6
    assert await worker.notes() == ["0", "2"]


@pytest.mark.parametrize("commit", COMMITS)
async def test_on_begin_runs_in_order_and_once(worker: Site, commit: Act, log: Log) -> None:
    """Several hooks run in the order of their registration, once, however the transaction is committed."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(log.begin)
        unit.on_begin(lambda connection: log.append("second"))
        await commit(unit)
    assert log == ["begin", "second"]


async def test_on_begin_writes_into_the_transaction(worker: Site) -> None:
    """What the hook writes is part of the transaction, and shares its outcome."""
    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(lambda connection: connection.execute(insert(Note).values(text="by the hook")))
        await unit.session.scalar(select(1))
        await unit.rollback()
        assert await worker.notes() == []
        await unit.session.scalar(select(1))
    assert await worker.notes() == ["by the hook"]


def set_timeout(connection: Connection) -> None:
    """Give the transaction's statements a timeout of its own."""
    connection.execute(text("SET LOCAL statement_timeout = '7654ms'"))


async def timeout(session: AsyncSession) -> object:
    """Return the timeout that the transaction's statements have."""
    return await session.scalar(text("SHOW statement_timeout"))


async def test_on_begin_settings_hold_for_the_user_s_statements(postgresql_worker: Site) -> None:
    """What the hook sets for the transaction holds for each statement in it, and for nobody else."""
    db = postgresql_worker.db
    async with db() as unit:
        unit.on_begin(set_timeout)
        assert await timeout(unit.session) == "7654ms"
        await unit.commit()
        assert await timeout(unit.session) == "7654ms"
        await unit.session.rollback()
        async with unit.savepoint():
            assert await timeout(unit.session) == "7654ms"
    async with db() as unit:
        assert await timeout(unit.session) == "0"


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_on_begin_in_the_tail(
    make_site: MakeSite, postgresql_url: str, *, commit_on_exit: bool
) -> None:
    """The transaction that a request's tail begins has its hooks too."""
    site = await make_site(postgresql_url, commit_on_exit=commit_on_exit)

    async def body() -> AsyncIterator[str]:
        yield f"{await timeout(site.db.session)} "
        yield f"{await timeout(site.db.session)}"

    @site.app.get("/")
    async def route() -> StreamingResponse:
        site.db.unit.on_begin(set_timeout)
        assert await timeout(site.db.session) == "7654ms"
        return StreamingResponse(body())

    async with serve(site.app) as address, AsyncClient(timeout=60) as client:
        assert (await client.get(address.url)).text == "7654ms 7654ms"


async def test_on_begin_of_a_joined_block(postgresql_worker: Site) -> None:
    """A joined block registers for its owner's unit; a unit of its own has its own hooks alone."""
    db = postgresql_worker.db
    async with db() as unit:
        async with db(propagation="required") as joined:
            joined.on_begin(set_timeout)
        assert await timeout(unit.session) == "7654ms"
        async with db() as inner:
            assert await timeout(inner.session) == "0"


async def execute(session: AsyncSession) -> None:
    """Send a statement."""
    await session.execute(insert(Note).values(text="without the hook"))


async def flush(session: AsyncSession) -> None:
    """Flush an object."""
    session.add(Note(text="without the hook"))
    await session.flush()


async def connect(session: AsyncSession) -> None:
    """Write on the connection."""
    connection = await session.connection()
    await connection.execute(insert(Note).values(text="without the hook"))


async def nest(session: AsyncSession) -> None:
    """Write in a savepoint."""
    async with session.begin_nested():
        await session.execute(insert(Note).values(text="without the hook"))


async def begin(session: AsyncSession) -> None:
    """Write in a block that commits itself."""
    async with session.begin():
        await session.execute(insert(Note).values(text="without the hook"))


def break_down(connection: Connection) -> None:
    """Fail without the database's help."""
    message = "boom"
    raise BoomError(message)


def break_sql(connection: Connection) -> None:
    """Fail by a statement."""
    connection.execute(text("SELECT * FROM no_such_table"))


SENDS = (execute, flush, connect, nest, begin)
BREAKS = (break_down, break_sql)


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("hook", BREAKS)
async def test_failing_on_begin_stops_the_statement(
    worker: Site,
    hook: Callable[[Connection], None],
    send: Callable[[AsyncSession], Awaitable[None]],
    log: Log,
) -> None:
    """An error in the hook goes to the statement's caller; none is sent, and the connection is discarded."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_begin(hook)
            log.all(unit)
            await send(unit.session)

    with pytest.raises((BoomError, DBAPIError), match=r"boom|no_such_table"):
        await work()
    assert log == ["rolled back"]
    assert worker.checked_out() == 0
    assert await worker.notes() == []
    async with worker.db(commit_on_exit=True) as unit:
        await add(unit, "next")
    assert await worker.notes() == ["next"]


@pytest.mark.parametrize("send", SENDS[:4])
@pytest.mark.parametrize("hook", BREAKS)
async def test_swallowed_on_begin_error_sends_nothing(
    worker: Site, hook: Callable[[Connection], None], send: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    """A transaction whose hook failed takes no statement more, and cannot be committed."""

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_begin(hook)
            for _ in range(2):
                with pytest.raises(
                    (BoomError, SQLAlchemyError), match=r"boom|no_such_table|rolled back|closed"
                ):
                    await send(unit.session)
            await unit.commit()

    given_up = r"is rolled back|has been rolled back|has aborted the transaction"
    with pytest.raises((PendingRollbackError, UnexpectedRollbackError), match=given_up):
        await work()
    assert worker.checked_out() == 0
    assert await worker.notes() == []


@pytest.mark.parametrize("hook", BREAKS)
async def test_unit_goes_on_after_a_failing_on_begin(
    worker: Site, hook: Callable[[Connection], None], log: Log
) -> None:
    """After a rollback the next transaction begins with the hook again, on another connection."""
    healthy = False

    def sometimes(connection: Connection) -> None:
        log.append("begin")
        if not healthy:
            hook(connection)

    async with worker.db(commit_on_exit=True) as unit:
        unit.on_begin(sometimes)
        with pytest.raises((BoomError, DBAPIError), match=r"boom|no_such_table"):
            await add(unit, "lost")
        await unit.rollback()
        assert worker.checked_out() == 0
        healthy = True
        await add(unit, "kept")
    assert log == ["begin", "begin"]
    assert await worker.notes() == ["kept"]


@pytest.mark.parametrize("hook", BREAKS)
async def test_failing_on_begin_in_a_request(
    make_site: MakeSite, database_url: str, hook: Callable[[Connection], None]
) -> None:
    """A request whose hook failed answers with an error, and the next one has a connection to work with."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/broken")
    async def broken() -> str:
        site.db.unit.on_begin(hook)
        await add(site.db.unit)
        return "done"

    @site.app.get("/")
    async def route() -> str:
        await add(site.db.unit)
        return "done"

    async with site.client(raise_app_exceptions=False) as client:
        assert (await client.get("/broken")).status_code == 500
        assert site.checked_out() == 0
        assert await site.notes() == []
        assert (await client.get("/")).status_code == 200
    assert await site.notes() == ["a"]


async def after_a_statement(unit: Unit) -> None:
    """Be in the middle of a transaction."""
    await unit.session.scalar(select(1))


async def after_a_savepoint(unit: Unit) -> None:
    """Be in the middle of a transaction that a savepoint has begun."""
    async with unit.savepoint():
        await unit.session.scalar(select(1))


async def in_a_savepoint(unit: Unit) -> None:
    """Have begun a savepoint, which has sent nothing."""
    await unit.session.begin_nested()


@pytest.mark.parametrize("act", [after_a_statement, after_a_savepoint, in_a_savepoint])
async def test_on_begin_in_the_middle_is_refused(worker: Site, act: Act, log: Log) -> None:
    """In the middle of a transaction the hook comes too late; after its end it does not."""
    async with worker.db() as unit:
        await act(unit)
        with pytest.raises(TransactionBegunError, match=r"is open: call on_begin\(\) before"):
            unit.on_begin(log.begin)
        await unit.rollback()
        unit.on_begin(log.begin)
        await unit.session.scalar(select(1))
    assert log == ["begin"]


async def after_adding(unit: Unit) -> None:
    """Have added what is not flushed yet."""
    unit.session.add(Note(text="added"))


async def after_begin(unit: Unit) -> None:
    """Have begun by hand."""
    await unit.session.begin()
    unit.session.add(Note(text="added"))


@pytest.mark.parametrize("act", [after_adding, after_begin])
async def test_on_begin_before_the_first_statement(worker: Site, act: Act, log: Log) -> None:
    """Where nothing has been sent yet the hook is in time: it runs before what sends the objects."""
    sent: list[str] = []
    event.listen(worker.engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    async with worker.db() as unit:
        await act(unit)
        unit.on_begin(lambda connection: connection.execute(text("SELECT 'begins'")))
        await unit.commit()
    assert sent[0] == "SELECT 'begins'"
    assert sent[1].startswith("INSERT INTO note")
    assert await worker.notes() == ["added"]


async def test_on_begin_refuses_coroutine_functions(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A coroutine function cannot run where a transaction begins, and is refused."""

    async def later(connection: Connection) -> None:
        """Never run."""

    async with open_worker(sqlite_url, judge_for) as worker, worker.db() as unit:
        with pytest.raises(TypeError, match=r"an on_begin hook must be a plain function of a Connection"):
            unit.on_begin(later)


class Later:
    """A hook that only calling it shows to be asynchronous."""

    async def __call__(self, connection: Connection) -> None:
        """Never run."""


def later(connection: Connection) -> object:
    """Return a coroutine that nobody awaits."""
    return Later()(connection)


@pytest.mark.parametrize("hook", [Later(), later])
async def test_on_begin_that_returns_a_coroutine(
    worker: Site, hook: Callable[[Connection], object], log: Log
) -> None:
    """It fails before the transaction's first statement is sent, and leaves no coroutine to be awaited."""
    sent: list[str] = []
    event.listen(worker.engine.sync_engine, "before_cursor_execute", lambda *args: sent.append(args[2]))

    async def work() -> None:
        async with worker.db(commit_on_exit=True) as unit:
            unit.on_begin(hook)
            log.all(unit)
            await execute(unit.session)

    with pytest.raises(TypeError, match=r"an on_begin hook must be a plain function, and .* a coroutine"):
        await work()
    assert [statement for statement in sent if "note" in statement] == []
    assert log == ["rolled back"]
    assert worker.checked_out() == 0
    assert await worker.notes() == []
