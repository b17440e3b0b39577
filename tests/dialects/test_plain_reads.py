"""Plain reads under ``begin="on_first_write"``: what needs no transaction, and what gets one nevertheless."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from sqlalchemy import Select, event, func, literal, select, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import (
    Begin,
    ConfigurationError,
    PropagationError,
    SessionProxy,
    UnitOfWork,
    create_middleware_and_session_proxy,
    pgbouncer_engine_args,
)
from fastapi_async_sqlalchemy._dialects.reads import is_plain
from fastapi_async_sqlalchemy.testing import sandbox
from tests.support.databases import Judge, JudgeFor
from tests.support.pgbouncer import pgbouncer
from tests.support.settings import NO_SERVER
from tests.support.site import MakeSite
from tests.support.tables import Note, create_tables
from tests.support.trips import counting

Proxy = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]

LAZY: Final[Begin] = "on_first_write"
READ: Final[Select[Any]] = select(Note.text)
BEGUN: Final = (
    "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
)


@pytest.fixture(params=["postgresql", "psycopg"])
def url(request: pytest.FixtureRequest) -> str:
    """An empty database by each driver."""
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
async def judge(url: str, judge_for: JudgeFor) -> Judge:
    """The judge of that database."""
    return await judge_for(url)


@asynccontextmanager
async def connected(url: str, begin: Begin | None = LAZY, **engine_args: Any) -> AsyncGenerator[Proxy]:
    """Connect a fresh pair, with one connection and a row to read."""
    engine = create_async_engine(url)
    await create_tables(engine)
    await engine.dispose()
    _, db = create_middleware_and_session_proxy(AsyncSession)
    arguments: Any = {"pool_size": 1, "max_overflow": 0, **engine_args}
    async with db.connect(url, engine_args=arguments, begin=begin):
        yield db


async def begun(judge: Judge) -> bool:
    """Whether a connection to the database is in a transaction."""
    return bool(await judge.scalar(BEGUN))


# What is a plain read.


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT note.id, note.text FROM note WHERE note.id = $1::INTEGER",
        "SELECT note.id FROM note WHERE note.text = %(text_1)s::VARCHAR LIMIT %(param_1)s::INTEGER",
        "SELECT count(*) AS count_1 FROM (SELECT DISTINCT a.x FROM a LEFT JOIN b ON (a.id = b.id)) AS c",
        "SELECT CAST(a.x AS NUMERIC(10, 2)) FROM a WHERE a.x IN ($1, $2) ORDER BY a.x DESC",
        'SELECT "order"."for" FROM "order" WHERE "order".into = \'INSERT; -- no\'',
        "select max(x) FROM t GROUP BY y HAVING count(x) FILTER (WHERE x > 1) > 2",
        "SELECT 'it''s nextval(' AS x",
    ],
)
def test_plain(statement: str) -> None:
    """Tables, operators and known functions."""
    assert is_plain(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT nextval('seq')",
        "SELECT shop.lower('x')",
        'SELECT "lower"(x) FROM t',
        "SELECT lower (x), pg_sleep (1) FROM t",
        "SELECT now()",
        "SELECT CURRENT_TIMESTAMP",
        "SELECT x FROM t FOR UPDATE",
        "SELECT x INTO u FROM t",
        "SELECT 1; DELETE FROM t",
        "SELECT x FROM t -- nothing",
        "SELECT x /* nothing */ FROM t",
        "SELECT $tag$x$tag$",
        "SELECT E'\\'' , nextval('seq')",
        "SELECT x FROM t WHERE y = 'unbalanced",
        "WITH gone AS (DELETE FROM t RETURNING x) SELECT x FROM gone",
        "SELECT set_config('x', 'y', true)",
        "SELECT x FROM generate_series(1, 2) AS x",
        "SELECT x FROM t TABLESAMPLE system (1)",
        "INSERT INTO t VALUES (1)",
        "SET x = 1",
        "EXPLAIN SELECT 1",
        "VALUES (1)",
        "",
    ],
)
def test_not_plain(statement: str) -> None:
    """Everything that could write, lock, or see when the transaction began."""
    assert not is_plain(statement)


# Where a read needs no transaction.


async def test_reads_need_no_transaction(url: str, judge: Judge) -> None:
    """Reads begin nothing, in a read-only unit and in a joined block as well, and see each other's writes."""
    async with connected(url) as db, db(commit_on_exit=True) as unit:
        assert (await unit.session.scalars(READ)).all() == []
        await judge.execute("INSERT INTO note (text) VALUES ('seen')")
        assert (await unit.session.scalars(READ)).all() == ["seen"]
        async with db(propagation="required"):
            assert (await unit.session.scalars(READ)).all() == ["seen"]
        assert await begun(judge) is False
    async with connected(url) as db, db(read_only=True) as unit:
        assert await unit.session.scalar(READ) == "seen"
        assert await begun(judge) is False


async def test_first_write_begins(url: str, judge: Judge) -> None:
    """From the first write on everything is in one transaction, which commits or rolls back as ever."""
    async with connected(url) as db:
        async with db() as unit:
            assert await unit.session.scalar(READ) is None
            unit.session.add(Note(text="undone"))
            assert await unit.session.scalar(READ) == "undone"
            assert await begun(judge) is True
            await unit.rollback()
            assert await unit.session.scalar(READ) is None
            assert await begun(judge) is False
        async with db(commit_on_exit=True) as unit:
            assert await unit.session.scalar(READ) is None
            unit.session.add(Note(text="done"))
        assert await judge.rows("SELECT text FROM note") == [("done",)]


async def test_each_place_of_the_option(url: str, judge: Judge, make_site: MakeSite) -> None:
    """The middleware, ``db.connect()``, ``db()`` and the pair take the option; one unit may decline it."""
    site = await make_site(url, begin=LAZY)

    @site.app.get("/")
    async def route() -> bool:
        await site.db.session.scalar(READ)
        return await begun(judge)

    assert (await site.get()).json() is False
    await site.engine.dispose()
    async with connected(url) as db, db(begin="on_first_use") as unit:
        await unit.session.scalar(READ)
        assert await begun(judge) is True
    async with connected(url, None) as db:
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True
        async with db(begin=LAZY) as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is False
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True
    _, pair = create_middleware_and_session_proxy(AsyncSession, begin=LAZY)
    async with pair.connect(url), pair() as unit:
        await unit.session.scalar(READ)
        assert await begun(judge) is False


async def test_function_in_a_unit(url: str, judge: Judge) -> None:
    """``db.transactional``, ``db.gather()`` and ``db.connection()`` open units that read so, too."""
    async with connected(url) as db:

        @db.transactional
        async def look() -> bool:
            await db.session.scalar(READ)
            return await begun(judge)

        async def look_in_a_task() -> bool:
            await db.session.scalar(READ)
            return await begun(judge)

        assert await look() is False
        assert await db.gather(look_in_a_task()) in ((False,), [False])


# Where it gets one nevertheless.


async def test_outside_a_unit(url: str, judge: Judge) -> None:
    """A connection of the engine's that belongs to no unit begins as ever."""
    async with connected(url) as db:
        async with db() as unit:
            await unit.session.scalar(READ)
        async with db.engine.connect() as connection:
            await connection.scalar(READ)
            assert await begun(judge) is True


async def test_other_connection_inside_an_operation(url: str) -> None:
    """A connection that a listener of the unit's own session opens is not the unit's."""
    async with connected(url, pool_size=2) as db, db() as unit:
        states: list[bool] = []

        def look(*_: object) -> None:
            with db.engine.sync_engine.connect() as connection:
                connection.scalar(READ)
                known = connection.scalar(
                    text("SELECT count(*) = 1 FROM pg_locks WHERE relation = 'note'::regclass")
                )
                states.append(bool(known))

        event.listen(unit.session.sync_session, "before_flush", look)
        unit.session.add(Note(text="flushed"))
        await unit.session.scalar(READ)
        assert states == [True]  # its transaction has kept the lock of the read


async def test_connection_of_the_session(url: str, judge: Judge) -> None:
    """Who has the connection may use it beside the session, from any task, so it has a transaction."""
    async with connected(url) as db, db() as unit:
        connection = await unit.session.connection()
        await asyncio.create_task(read_by(connection))
        assert await begun(judge) is True
        await unit.commit()
        await unit.session.connection()
        await unit.session.scalar(READ)
        assert await begun(judge) is True
        await unit.commit()
        await unit.session.scalar(READ)
        assert await begun(judge) is False


async def read_by(connection: AsyncConnection) -> None:
    """Read."""
    await connection.scalar(READ)


async def test_after_something_has_begun(url: str, judge: Judge) -> None:
    """A read that follows any other statement, such as one that locks, is in its transaction."""
    async with connected(url) as db, db() as unit:
        await unit.session.execute(text("SELECT pg_advisory_xact_lock(1)"))
        await unit.session.scalar(READ)
        assert await begun(judge) is True
        assert await judge.scalar("SELECT pg_try_advisory_lock(1)") is False


async def test_savepoint(url: str, judge: Judge) -> None:
    """A read in a savepoint is in its transaction."""
    async with connected(url) as db, db() as unit, unit.savepoint():
        await unit.session.scalar(READ)
        assert await begun(judge) is True


@pytest.mark.parametrize("statement", [READ.with_for_update(), select(func.now()), select(func.nextval("s"))])
async def test_read_that_does_more(url: str, judge: Judge, statement: Select[Any]) -> None:
    """Locks, the time of the transaction, and unknown functions."""
    await judge.execute("CREATE SEQUENCE s")
    async with connected(url) as db, db() as unit:
        await unit.session.execute(statement)
        assert await begun(judge) is True


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_isolation_level_of_the_unit(url: str, judge: Judge, level: Any) -> None:
    """A unit whose level keeps one snapshot for all statements has one transaction."""
    async with connected(url) as db:
        async with db(isolation_level=level) as unit:
            assert (await unit.session.scalars(READ)).all() == []
            await judge.execute("INSERT INTO note (text) VALUES ('later')")
            assert (await unit.session.scalars(READ)).all() == []
            assert await begun(judge) is True
        async with db(isolation_level="READ COMMITTED") as unit:
            assert (await unit.session.scalars(READ)).all() == ["later"]
            assert await begun(judge) is False


async def test_default_level_of_the_database(url: str, judge: Judge) -> None:
    """The server's default counts, even one that was set after the engine had connected."""
    async with connected(url) as db:
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is False
        name = db.engine.url.database
        await judge.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'")
        await db.engine.dispose()
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True
        await judge.execute(f"ALTER DATABASE {name} RESET default_transaction_isolation")


async def test_default_level_of_a_connection(url: str, judge: Judge) -> None:
    """A listener that sets the level of each connection counts."""

    def set_level(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        cursor.close()
        connection.commit()

    async with connected(url) as db:
        event.listen(db.engine.sync_engine, "connect", set_level)
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True


@pytest.mark.parametrize(
    "statement",
    [
        "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SELECT set_config('default_transaction_isolation', 'serializable', false)",
    ],
)
async def test_default_level_of_a_session(url: str, judge: Judge, statement: str) -> None:
    """A statement that changes the connection's default counts from the next unit on."""
    async with connected(url) as db:
        async with db(commit_on_exit=True) as unit:
            await unit.session.scalar(READ)
            await unit.session.execute(text(statement))
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True


async def test_begin_hook(url: str, judge: Judge) -> None:
    """An ``on_begin`` hook runs in the transaction of the first read."""
    async with connected(url) as db, db() as unit:
        unit.on_begin(lambda connection: connection.execute(select(literal(1))))
        await unit.session.scalar(READ)
        assert await begun(judge) is True


async def test_begin_listener(url: str, judge: Judge) -> None:
    """What a listener to SQLAlchemy's ``after_begin`` sets for the transaction holds for the first read."""

    def set_tenant(_: object, __: object, connection: Any) -> None:
        connection.execute(text("SELECT set_config('app.tenant', 'acme', true)"))

    async with connected(url) as db, db() as unit:
        event.listen(unit.session.sync_session, "after_begin", set_tenant)
        await unit.session.scalar(READ)
        assert await begun(judge) is True
        assert await unit.session.scalar(text("SELECT current_setting('app.tenant')")) == "acme"


async def test_explicit_begin(url: str, judge: Judge) -> None:
    """``session.begin()`` is a transaction."""
    async with connected(url) as db, db() as unit:
        async with unit.session.begin():
            await unit.session.scalar(READ)
            assert await begun(judge) is True
        await unit.session.scalar(READ)
        assert await begun(judge) is False


async def test_two_phase(url: str, judge: Judge) -> None:
    """A session that takes part in a two-phase commit has a transaction."""
    async with connected(url) as db, db(session_args={"twophase": True}) as unit:
        await unit.session.scalar(READ)
        assert await begun(judge) is True


async def test_server_side_cursor(url: str, judge: Judge) -> None:
    """A cursor of the server's lives in a transaction."""
    await judge.execute("CREATE TABLE many AS SELECT generate_series(1, 300) AS x")
    statement = text("SELECT x FROM many")
    async with connected(url) as db, db() as unit:
        result = await unit.session.stream(statement)
        assert await result.fetchone() is not None
        assert await begun(judge) is True
        await result.close()
        await unit.rollback()
        rows = await unit.session.run_sync(
            lambda session: session.execute(statement, execution_options={"yield_per": 10}).fetchmany(2)
        )
        assert len(rows) == 2
        assert await begun(judge) is True


async def test_several_sets_of_values(url: str, judge: Judge) -> None:
    """A statement with several sets of values is one transaction."""
    async with connected(url) as db, db() as unit:
        await unit.session.execute(text("SELECT CAST(:x AS INTEGER)"), [{"x": 1}, {"x": 2}])
        assert await begun(judge) is True


async def test_listener_of_the_user(url: str, judge: Judge) -> None:
    """Another listener for statements sees each of them, in a transaction that it may rely on."""
    seen: list[str] = []

    def listen(_: object, statement: str, *__: object) -> None:
        seen.append(statement)

    async with connected(url) as db:
        event.listen(db.engine.sync_engine, "do_execute", listen)
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True
    assert "SELECT note.text \nFROM note" in seen


async def test_two_pairs_on_one_engine(url: str, judge: Judge) -> None:
    """A second pair of ours on the same engine is no such listener."""
    _, other = create_middleware_and_session_proxy(AsyncSession)
    async with connected(url) as db, other.connect(db.engine):
        async with db() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is False
        async with other() as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is True


# What else can be seen.


async def test_failed_read(url: str, judge: Judge) -> None:
    """A read that fails aborts nothing: what follows may be written and committed."""
    async with connected(url) as db:
        async with db(commit_on_exit=True) as unit:
            with pytest.raises(ProgrammingError):
                await unit.session.execute(text("SELECT missing FROM note"))
            unit.session.add(Note(text="written"))
        async with db(commit_on_exit=True) as unit:
            await unit.session.scalar(READ)
            assert await begun(judge) is False
    assert await judge.rows("SELECT text FROM note") == [("written",)]


async def test_failed_read_after_a_write(url: str, judge: Judge) -> None:
    """In a transaction a failed read aborts it, as ever."""
    async with connected(url) as db:
        async with db() as unit:
            await unit.session.execute(text("INSERT INTO note (text) VALUES ('lost')"))
            with pytest.raises(ProgrammingError):
                await unit.session.execute(text("SELECT missing FROM note"))
            with pytest.raises(DBAPIError):
                await unit.session.scalar(READ)
        assert await judge.rows("SELECT text FROM note") == []


async def test_cancelled_read(url: str, judge: Judge) -> None:
    """A read that is cancelled leaves no connection behind that does not begin transactions."""
    await judge.execute("CREATE TABLE gate (x INTEGER)")
    async with connected(url) as db:
        await judge.execute("BEGIN")
        await judge.execute("LOCK TABLE gate")
        async with db() as unit:
            waiting = asyncio.create_task(unit.session.execute(text("SELECT x FROM gate")))
            while not await judge.scalar("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                pass
            waiting.cancel()
            await asyncio.wait([waiting])
        await judge.execute("ROLLBACK")
        async with db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="written"))
            await unit.session.flush()
            assert await judge.rows("SELECT text FROM note") == []
        assert await judge.rows("SELECT text FROM note") == [("written",)]


async def test_trips(url: str) -> None:
    """A read is one round trip."""
    async with counting(url) as trips, connected(trips.url) as db:
        for _ in range(7):
            trips.taken()
            async with db() as unit:
                await unit.session.scalar(READ)
                await unit.session.scalar(READ)
        assert trips.taken() == 2


async def test_in_a_sandbox(url: str, judge: Judge) -> None:
    """In a test's sandbox all reads are in its one transaction, and see its writes; only they count."""
    async with connected(url) as db:
        async with sandbox(db) as box:
            async with db(commit_on_exit=True) as unit:
                assert await unit.session.scalar(READ) is None
                box.assert_statements(at_most=1)
                unit.session.add(Note(text="in the sandbox"))
            async with db() as unit:
                assert await unit.session.scalar(READ) == "in the sandbox"
        async with db() as unit:
            assert await unit.session.scalar(READ) is None
            assert await begun(judge) is False


# What is refused.


@pytest.mark.parametrize("value", ["on_first_read", True, 1, ""])
def test_wrong_value(value: Any) -> None:
    """The option has two values, wherever it is given."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    wrong = pytest.raises(ConfigurationError, match="begin must be one of on_first_use, on_first_write, not")
    with wrong:
        db(begin=value)
    with wrong:
        db.connect(NO_SERVER["postgresql"], begin=value)
    with wrong:
        middleware(_app, NO_SERVER["postgresql"], begin=value)
    with wrong:
        create_middleware_and_session_proxy(AsyncSession, begin=value)


async def _app(*_: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("dialect", ["sqlite", "mysql"])
def test_other_databases(dialect: str) -> None:
    """Only PostgreSQL takes a snapshot for each statement, and its drivers can do without BEGIN."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match=r"for PostgreSQL by asyncpg or psycopg: leave it out for"):
        db.connect(NO_SERVER[dialect], begin=LAZY)


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"])
def test_level_of_the_engine(level: Any) -> None:
    """An engine with another level of its own has no such reads."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match=f"isolation_level='{level}': leave one of them out"):
        db.connect(NO_SERVER["postgresql"], engine_args={"isolation_level": level}, begin=LAZY)


async def test_level_of_the_same_call() -> None:
    """One call asks for one snapshot a statement, or for one for all of them."""
    async with connected_to_nothing() as db:
        with pytest.raises(ConfigurationError, match="leave it or 'SERIALIZABLE' out"):
            db(begin=LAZY, isolation_level="SERIALIZABLE")


@asynccontextmanager
async def connected_to_nothing() -> AsyncGenerator[Proxy]:
    """Connect a fresh pair to no server."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(NO_SERVER["postgresql"]):
        yield db


async def test_joining() -> None:
    """A block that wants a transaction from the start cannot join a unit that reads without; others can."""
    async with connected_to_nothing() as db:
        async with db(begin=LAZY):
            async with db(propagation="required"):
                pass
            with pytest.raises(PropagationError, match="begin='on_first_use' was asked for"):
                await db(propagation="required", begin="on_first_use").__aenter__()
        async with db(), db(propagation="required", begin=LAZY):
            pass


async def test_lent_connection(url: str) -> None:
    """A session on a connection of the caller's would have its owner's transactions."""
    async with connected(url) as db, db.engine.connect() as connection:
        with pytest.raises(ConfigurationError, match="deferrable and begin out"):
            db(session_args={"binds": {Note: connection}})


def test_middleware_without_an_engine() -> None:
    """The option goes with the engine."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match="begin goes with an engine"):
        middleware(_app, begin=LAZY)


async def test_pgbouncer(postgresql_url: str) -> None:
    """Behind PgBouncer statements must have no names, and then reads share its server connections."""
    with pgbouncer(postgresql_url, default_pool_size=1) as through:
        async with connected(through) as db, db() as unit:
            with pytest.raises(ConfigurationError, match=r"pgbouncer_engine_args\(\)"):
                await unit.session.scalar(READ)
        nameless: dict[str, Any] = {**pgbouncer_engine_args(), "pool_size": 5}
        async with connected(through, **nameless) as db:

            async def read() -> None:
                for _ in range(20):
                    assert await db.session.scalar(READ) is None
                    assert await db.session.scalar(select(func.count()).select_from(Note)) == 0

            await db.gather(*(read() for _ in range(5)))


async def test_pgbouncer_by_psycopg(psycopg_url: str) -> None:
    """Psycopg names a statement at its sixth use, unless it is told not to."""
    with pgbouncer(psycopg_url, default_pool_size=1) as through:
        async with connected(through) as db, db() as unit:
            with pytest.raises(ConfigurationError, match="prepare_threshold"):
                await unit.session.scalar(READ)
        async with connected(through, connect_args={"prepare_threshold": None}) as db, db() as unit:
            for _ in range(10):
                assert await unit.session.scalar(READ) is None
