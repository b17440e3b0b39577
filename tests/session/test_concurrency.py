"""One session, several tasks: a second one is refused, and what a task leaves under way harms nobody."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import anyio.from_thread
import pytest
from attrs import define
from fastapi import FastAPI
from sqlalchemy import AsyncAdaptedQueuePool, insert, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastapi_async_sqlalchemy import ConcurrentUseError, UnitClosedError, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.gate import Gate, closed, gate_of, passing
from tests.support.interruption import Exchange, Interrupted
from tests.support.serving import asgi_client
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import survives_cancellation

pytestmark = survives_cancellation

DEADLINE = 30
"""Seconds after which something hangs; a statement at a closed gate would take a minute."""
ROUNDS = 50
HAS_ENDED = "has ended"


@define(eq=False)
class Narrow(Site):
    """A site whose pool holds a single connection, so that one lost or damaged is noticed at once."""

    gate: Gate
    children: list[asyncio.Task[Any]]

    def start(self, child: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """Start a child task, which the test looks at when the unit has ended."""
        task = asyncio.create_task(child, name="child")
        self.children.append(task)
        return task

    async def wait_at_gate(self) -> None:
        """Send the statement that waits, on the current session."""
        await self.db.session.execute(passing(self.gate))

    async def check_next(self) -> None:
        """See that the only connection is in the pool, and that it is clean."""
        assert self.checked_out() == 0
        async with asyncio.timeout(DEADLINE):
            exchange = Exchange("/next")
            await exchange.call(self.app)
        assert (exchange.status, exchange.body) == (200, b'"next"')
        assert self.checked_out() == 0


@asynccontextmanager
async def open_narrow(url: str, judge_for: JudgeFor, **options: Any) -> AsyncGenerator[Narrow]:
    """Make such a site, with a route that writes and reads; nothing of a test may be left on exit."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    pool = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": DEADLINE}
    async with engine_with_tables(url, **pool) as engine:
        judge = await judge_for(url)
        gate = gate_of(engine, judge)
        await engine.dispose()
        db.bind(engine)
        app = FastAPI(middleware=[Middleware(cast("Any", middleware), **options)])
        site = Narrow(app, db, engine, judge, gate, [])

        @app.get("/next")
        async def following() -> str:
            # MariaDB works on after its client has gone, and holds its locks meanwhile: there it only reads
            if engine.dialect.name != "mysql":
                note = Note(text="next")
                db.session.add(note)
                await db.session.flush()
                await db.session.delete(note)
            return (await db.session.scalars(select(literal("next")))).one()

        yield site
        assert site.checked_out() == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.fixture
async def site(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Narrow]:
    """A narrow site on each database, which commits on exit."""
    async with open_narrow(database_url, judge_for, commit_on_exit=True) as site:
        yield site


@pytest.fixture
async def postgresql_site(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Narrow]:
    """A narrow site on PostgreSQL alone."""
    async with open_narrow(postgresql_url, judge_for, commit_on_exit=True) as site:
        yield site


@pytest.fixture
async def locking_site(locking_url: str, judge_for: JudgeFor) -> AsyncIterator[Narrow]:
    """A narrow site on each database in which an INSERT can wait for another one."""
    async with open_narrow(locking_url, judge_for, commit_on_exit=True) as site:
        yield site


# A second task


async def add(session: AsyncSession) -> None:
    """Add an object; `add()` itself is not a coroutine function."""
    session.add(Note(text="refused"))


async def add_all(session: AsyncSession) -> None:
    """Add objects."""
    session.add_all([Note(text="refused")])


async def begin_nested(session: AsyncSession) -> None:
    """Begin a savepoint."""
    await session.begin_nested()


OPERATIONS: dict[str, Callable[[AsyncSession], Coroutine[Any, Any, object]]] = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "scalar": lambda session: session.scalar(text("SELECT 1")),
    "scalars": lambda session: session.scalars(select(Note)),
    "stream": lambda session: session.stream(select(Note)),
    "get": lambda session: session.get(Note, 1),
    "merge": lambda session: session.merge(Note(id=1, text="refused")),
    "flush": lambda session: session.flush(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
    "connection": lambda session: session.connection(),
    "begin_nested": begin_nested,
    "add": add,
    "add_all": add_all,
}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_second_task_is_refused(site: Narrow, operation: str) -> None:
    """A task that uses a busy session is told who is at work and what to do; the unit commits unharmed."""
    async with site.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="kept"))
        await unit.session.flush()
        async with closed(site.gate):
            first = asyncio.create_task(site.wait_at_gate(), name="first")
            await site.gate.reached()
            async with asyncio.timeout(DEADLINE):
                second = asyncio.create_task(OPERATIONS[operation](unit.session), name="second")
                refusal = (
                    r"^task 'second' called \w+\(\) on .+ on which task 'first' is in the middle of "
                    r"execute\(\): .*`async with db\(\):` inside the task"
                )
                with pytest.raises(ConcurrentUseError, match=refusal):
                    await second
        await first
    assert await site.notes() == ["kept"]


async def test_tasks_take_turns(site: Narrow) -> None:
    """Child tasks that use the session one after the other share its transaction."""

    async def write(note: str) -> None:
        site.db.session.add(Note(text=note))
        await site.db.session.flush()

    async with site.db(commit_on_exit=True):
        for note in "abc":
            await asyncio.create_task(write(note))
        assert await site.notes() == []
    assert await site.notes() == ["a", "b", "c"]


async def test_two_statements_at_once(site: Narrow) -> None:
    """Of two statements gathered on one session the first is answered and the second refused."""
    async with site.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="kept"))
        await unit.session.flush()
        first = asyncio.create_task(unit.session.scalar(select(Note.text)))
        second = asyncio.create_task(unit.session.scalar(select(Note.text)))
        await asyncio.gather(first, second, return_exceptions=True)
        assert first.result() == "kept"
        with pytest.raises(ConcurrentUseError, match="end one before the other"):
            second.result()
    assert await site.notes() == ["kept"]


async def test_gather_in_a_route(site: Narrow) -> None:
    """A route that gathers statements on its session fails and rolls back; the next requests do not."""

    @site.app.get("/")
    async def route() -> None:
        site.db.session.add(Note(text="lost"))
        await site.db.session.flush()
        await asyncio.gather(*(site.db.session.scalars(select(Note)) for _ in range(5)))

    for _ in range(ROUNDS):
        with pytest.raises(ConcurrentUseError, match="give each task a separate unit"):
            await Exchange("/").call(site.app)
        await site.check_next()
    assert await site.notes() == []


async def test_objects_added_in_threads(site: Narrow) -> None:
    """Routes without `async` add objects in their threads, many at a time; each request commits its own."""

    @site.app.get("/{number}")
    def route(number: int) -> None:
        site.db.session.add(Note(text=f"{number:02}"))

    exchanges = [Exchange(f"/{number}") for number in range(20)]
    await asyncio.gather(*(exchange.call(site.app) for exchange in exchanges))
    assert {exchange.status for exchange in exchanges} == {200}
    assert await site.notes() == [f"{number:02}" for number in range(20)]


# A child in the middle of a statement when its unit ends


class SiblingError(Exception):
    """The failure that ends the unit."""


async def fail() -> None:
    """Fail as a sibling of the child."""
    message = "a sibling failed"
    raise SiblingError(message)


async def by_error(child: asyncio.Task[Any]) -> None:
    """Let an error leave the unit."""
    await fail()


async def by_gather(child: asyncio.Task[Any]) -> None:
    """Let another task fail beside the child, which goes on."""
    await asyncio.gather(child, fail())


async def by_group(child: asyncio.Task[Any]) -> None:
    """Let a task group end the child when another task fails."""
    async with asyncio.TaskGroup() as group:
        group.create_task(_shadow(child))
        group.create_task(fail())


async def _shadow(child: asyncio.Task[Any]) -> None:
    await child


ENDS: dict[str, Callable[[asyncio.Task[Any]], Awaitable[None]]] = {
    "error": by_error,
    "gather": by_gather,
    "group": by_group,
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("where", ["request", "block"])
async def test_unit_fails_under_a_statement(site: Narrow, where: str, how: str) -> None:
    """A unit that fails does not wait for a child's statement; the next unit gets a clean connection."""
    if how == "group" and site.engine.dialect.name == "sqlite":
        pytest.skip("aiosqlite itself waits for the statement of a task that is cancelled")

    @site.app.get("/")
    async def route() -> None:
        site.db.session.add(Note(text="lost"))
        await site.db.session.flush()
        child = site.start(site.wait_at_gate())
        await site.gate.reached()
        await ENDS[how](child)

    async def block() -> None:
        async with site.db(commit_on_exit=True):
            await route()

    for _ in range(ROUNDS):
        async with closed(site.gate):
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(
                    (SiblingError, ExceptionGroup), match=r"a sibling failed|unhandled errors"
                ):
                    await (Exchange("/").call(site.app) if where == "request" else block())
            await site.check_next()
        child = site.children.pop()
        await asyncio.wait({child})
        if how == "group":
            assert child.cancelled()
        else:
            with pytest.raises(UnitClosedError, match=HAS_ENDED):
                child.result()
    assert await site.notes() == []


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_error_response_under_a_statement(
    database_url: str, judge_for: JudgeFor, *, commit_on_exit: bool
) -> None:
    """An error response does not wait for a child's statement either, and neither does the next request."""
    async with open_narrow(database_url, judge_for, commit_on_exit=commit_on_exit) as site:

        @site.app.get("/")
        async def route() -> Response:
            site.db.session.add(Note(text="lost"))
            await site.db.session.flush()
            site.start(site.wait_at_gate())
            await site.gate.reached()
            return Response(status_code=409)

        for _ in range(ROUNDS):
            async with closed(site.gate):
                exchange = Exchange("/")
                async with asyncio.timeout(DEADLINE):
                    await exchange.call(site.app)
                assert exchange.status == 409
                await site.check_next()
            with pytest.raises(UnitClosedError, match=HAS_ENDED):
                await site.children.pop()
        assert await site.notes() == []


@pytest.mark.parametrize("where", ["request", "block"])
async def test_unit_succeeds_under_a_statement(site: Narrow, where: str) -> None:
    """A unit that is to commit waits for a child's statement, and commits."""
    leaving = asyncio.Event()

    @site.app.get("/{number}")
    async def write(number: int) -> None:
        site.db.session.add(Note(text=f"{number:02}"))
        await site.db.session.flush()
        site.start(site.wait_at_gate())
        await site.gate.reached()
        leaving.set()

    async def block(number: int) -> None:
        async with site.db(commit_on_exit=True):
            await write(number)

    for number in range(ROUNDS):
        leaving.clear()
        exchange = Exchange(f"/{number}")
        async with closed(site.gate):
            unit = asyncio.create_task(exchange.call(site.app) if where == "request" else block(number))
            await leaving.wait()
            assert len(await site.notes()) == number
            assert exchange.status is None
            assert not unit.done()
        async with asyncio.timeout(DEADLINE):
            await unit
        assert exchange.status in {200, None}
        await site.check_next()
        await site.children.pop()
        assert len(await site.notes()) == number + 1


@pytest.mark.parametrize("what", ["fails", "succeeds"])
async def test_unit_ends_under_a_checkout(site: Narrow, what: str) -> None:
    """A child that still waits for a connection when its unit ends gets an error, and no connection."""
    waiting = asyncio.Event()

    async def read() -> None:
        await Interrupted(_read(site), (1,), waiting.set)

    @site.app.get("/{what}")
    async def route(what: str) -> None:
        site.start(read())
        await waiting.wait()
        if what == "fails":
            await fail()

    for _ in range(ROUNDS):
        waiting.clear()
        exchange = Exchange(f"/{what}")
        async with asyncio.timeout(DEADLINE):
            async with site.engine.connect():
                request = asyncio.create_task(exchange.call(site.app))
                await waiting.wait()
                if what == "fails":
                    with pytest.raises(SiblingError, match="a sibling failed"):
                        await request
            if what == "succeeds":
                await request
                assert exchange.status == 200
                await site.children.pop()
            else:
                with pytest.raises(UnitClosedError, match=HAS_ENDED):
                    await site.children.pop()
        await site.check_next()


async def _read(site: Site) -> None:
    await site.db.session.scalars(select(Note))


async def test_unit_fails_under_a_flush(locking_site: Narrow) -> None:
    """A unit that fails does not wait for a child's flush; none of it is written."""
    site = locking_site

    @site.app.get("/")
    async def route() -> None:
        site.db.session.add_all([Note(text="first"), Note(text="locked")])
        site.start(site.db.session.flush())
        await blocked(site)
        await fail()

    for _ in range(ROUNDS):
        await site.judge.execute("BEGIN")
        await site.judge.execute("INSERT INTO note (text) VALUES ('locked')")
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(SiblingError, match="a sibling failed"):
                await Exchange("/").call(site.app)
        await site.check_next()
        await site.judge.execute("ROLLBACK")
        with pytest.raises(UnitClosedError, match=HAS_ENDED):
            await site.children.pop()
    assert await site.notes() == []


async def blocked(site: Site) -> None:
    """Wait until an INSERT waits for the judge's; each look is a round trip to the server."""
    looks = {
        "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
        "mysql": "SELECT count(*) FROM information_schema.processlist"
        " WHERE db = database() AND id <> connection_id() AND info LIKE 'INSERT%'",
    }
    while not await site.judge.scalar(looks[site.engine.dialect.name]):
        pass


@pytest.mark.parametrize("what", ["fails", "succeeds"])
async def test_unit_ends_under_a_commit(postgresql_site: Narrow, what: str) -> None:
    """A COMMIT that a child has begun is waited for, whatever becomes of its unit: it stands."""
    site = postgresql_site
    await site.judge.execute(
        "CREATE FUNCTION wait_for_judge() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$"
    )
    await site.judge.execute(
        "CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW WHEN (NEW.text <> 'next') EXECUTE FUNCTION wait_for_judge()"
    )
    leaving = asyncio.Event()

    @site.app.get("/{number}")
    async def route(number: int) -> None:
        site.db.session.add(Note(text=f"{number:02}"))
        site.start(site.db.session.commit())
        await site.gate.reached()
        leaving.set()
        if what == "fails":
            await fail()

    for number in range(ROUNDS):
        leaving.clear()
        async with closed(site.gate):
            request = asyncio.create_task(Exchange(f"/{number}").call(site.app))
            await leaving.wait()
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait({request})
        assert isinstance(request.exception(), SiblingError if what == "fails" else type(None))
        await site.check_next()
        await site.children.pop()
        assert len(await site.notes()) == number + 1


def block(site: Site, how: str) -> AbstractAsyncContextManager[Any]:
    """Open a savepoint, or a transaction by name, in the current unit."""
    if how == "savepoint":
        return site.db.unit.savepoint()
    if how == "nested":
        return site.db(propagation="nested")
    return site.db.session.begin_nested() if how == "begin_nested" else site.db.session.begin()


async def leave_block(site: Site, how: str, inside: asyncio.Event, *, by_error: bool = False) -> None:
    """Write in a block and leave it; who waits for the event runs while this task is at the block's end."""
    async with block(site, how):
        await site.db.session.execute(insert(Note).values(text="child"))
        inside.set()
        if by_error:
            await fail()


@pytest.mark.parametrize("what", ["fails", "is cancelled", "succeeds"])
@pytest.mark.parametrize("end", ["released", "rolled back"])
@pytest.mark.parametrize("how", ["savepoint", "nested", "begin_nested", "begin"])
async def test_unit_ends_while_a_child_leaves_its_block(site: Narrow, how: str, end: str, what: str) -> None:
    """A child that leaves a savepoint, or `session.begin()`, is waited for; the unit's own error goes on."""

    @site.app.get("/")
    async def route() -> None:
        inside = asyncio.Event()
        child = site.start(leave_block(site, how, inside, by_error=end == "rolled back"))
        await inside.wait()
        assert not child.done()
        if what == "fails":
            raise LookupError
        if what == "is cancelled":
            raise asyncio.CancelledError

    expected = {"fails": LookupError, "is cancelled": asyncio.CancelledError, "succeeds": type(None)}
    for number in range(ROUNDS // 10):
        request = asyncio.create_task(Exchange("/").call(site.app))
        async with asyncio.timeout(DEADLINE):
            await asyncio.wait({request, *site.children})
        error = asyncio.CancelledError() if request.cancelled() else request.exception()
        assert type(error) is expected[what]
        await site.check_next()
        child = site.children.pop()
        await asyncio.wait({child})
        assert type(child.exception()) is (type(None) if end == "released" else SiblingError)
        stored = end == "released" and (how == "begin" or what == "succeeds")
        assert await site.notes() == (["child"] if stored else []), number
        await site.judge.execute("DELETE FROM note")


async def test_leaving_a_block_is_an_operation(postgresql_site: Narrow) -> None:
    """A second task that uses the session while the first one leaves a savepoint is refused by name."""
    site = postgresql_site

    async with site.db(commit_on_exit=True) as unit:
        inside = asyncio.Event()
        child = site.start(leave_block(site, "savepoint", inside))
        await inside.wait()
        with pytest.raises(
            ConcurrentUseError, match=r"execute\(\).* task 'child' is in the middle of commit\(\)"
        ):
            await unit.session.execute(select(1))
        await child
    assert await site.notes() == ["child"]


@pytest.mark.parametrize("what", ["fails", "succeeds"])
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_unit_ends_under_a_statement_of_its_connection_and_has_nothing_to_flush(
    database_url: str, judge_for: JudgeFor, what: str, *, written: bool, commit_on_exit: bool
) -> None:
    """Where the driver refuses COMMIT meanwhile, the connection is discarded, and no request gets it."""
    async with open_narrow(database_url, judge_for, commit_on_exit=commit_on_exit) as site:

        async def wait_on_connection(connection: AsyncConnection) -> None:
            await connection.execute(passing(site.gate))

        async def work(leaving: asyncio.Event) -> None:
            async with site.db(commit_on_exit=commit_on_exit) as unit:
                if written:
                    unit.session.add(Note(text="note"))
                    await unit.session.flush()
                site.start(wait_on_connection(await unit.session.connection()))
                await site.gate.reached()
                leaving.set()
                if what == "fails":
                    await fail()

        for _ in range(ROUNDS // 10):
            leaving = asyncio.Event()
            async with closed(site.gate):
                unit = asyncio.create_task(work(leaving))
                await leaving.wait()
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(unit, *site.children, return_exceptions=True)
            site.children.clear()
            await site.check_next()
            committed = what == "succeeds" and written and commit_on_exit and unit.exception() is None
            if not (
                site.engine.dialect.name == "mysql" and unit.exception()
            ):  # there COMMIT may have gone out
                assert await site.notes() == (["note"] if committed else [])
            await site.judge.execute("DELETE FROM note")


@pytest.mark.parametrize("what", ["fails", "succeeds"])
async def test_unit_ends_under_a_statement_of_its_connection(site: Narrow, what: str) -> None:
    """A child that uses the session's connection directly leaves it no less clean for the next request."""
    leaving = asyncio.Event()

    async def wait_on_connection(connection: AsyncConnection) -> None:
        await connection.execute(passing(site.gate))

    @site.app.get("/{what}/{number}")
    async def route(what: str, number: int) -> None:
        site.db.session.add(Note(text=f"{number:02}"))
        connection = await site.db.session.connection()
        site.start(wait_on_connection(connection))
        await site.gate.reached()
        leaving.set()
        if what == "fails":
            await fail()

    acknowledged: list[object] = []
    for number in range(ROUNDS):
        leaving.clear()
        exchange = Exchange(f"/{what}/{number}")
        async with closed(site.gate):
            request = asyncio.create_task(exchange.call(site.app))
            await leaving.wait()
            if what == "fails":
                async with asyncio.timeout(DEADLINE):
                    with pytest.raises(SiblingError, match="a sibling failed"):
                        await request
                await site.check_next()
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(request, site.children.pop(), return_exceptions=True)
        await site.check_next()
        if exchange.status == 200:
            acknowledged.append(f"{number:02}")
    assert await site.notes() == acknowledged


# Another event loop


async def test_loop_of_another_thread(postgresql_site: Narrow) -> None:
    """`asyncio.run()` in a `def` route is refused before it breaks a connection that later requests get."""
    site = postgresql_site

    async def write(note: str) -> None:
        site.db.session.add(Note(text=note))
        await site.db.session.flush()

    async def write_on_its_own() -> None:
        async with site.db(commit_on_exit=True):
            await write("refused")

    @site.app.get("/{number}")
    async def innocent(number: int) -> None:
        await write(f"innocent {number}")

    @site.app.get("/loop/unit")
    def in_the_unit() -> None:
        asyncio.run(write("refused"))

    @site.app.get("/loop/own")
    def in_a_unit_of_its_own() -> None:
        asyncio.run(write_on_its_own())

    @site.app.get("/thread/unit")
    def in_the_same_loop() -> None:
        anyio.from_thread.run(write, "thread")

    @site.app.exception_handler(ConcurrentUseError)
    async def refused(request: Request, error: ConcurrentUseError) -> PlainTextResponse:
        return PlainTextResponse(str(error), status_code=503)

    async with asgi_client(site.app) as client:
        assert (await client.get("/0")).status_code == 200
        for path in ("/loop/unit", "/loop/own"):
            response = await client.get(path)
            assert (response.status_code, "another running event loop" in response.text) == (503, True)
        paths = ["/1", "/thread/unit", "/2", "/3"]
        assert [(await client.get(path)).status_code for path in paths] == [200] * 4
    assert await site.notes() == ["innocent 0", "innocent 1", "innocent 2", "innocent 3", "thread"]


async def test_loop_of_another_thread_with_an_empty_pool(postgresql_site: Narrow) -> None:
    """A second loop is refused from its first use on while the first one runs, with an empty pool, too."""
    site = postgresql_site

    async def write(note: str) -> None:
        async with site.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text=note))
        await site.engine.dispose()

    await write("here")
    with pytest.raises(ConcurrentUseError, match="another running event loop uses the engine"):
        await asyncio.to_thread(asyncio.run, write("there"))
    await write("here again")
    assert await site.notes() == ["here", "here again"]
