"""COMMIT inside a sandbox checks what it checks in production: constraints, settings, two databases."""

from contextlib import ExitStack, suppress

import pytest
from sqlalchemy import URL, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import UnexpectedRollbackError, atomic, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.testing import Sandbox, sandbox
from tests.support.databases import JudgeFor, fresh_database
from tests.support.site import Site
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables
from tests.support.worker import open_worker
from tests.testing.test_sandbox import notes, write

TENANT = text("SELECT set_config('app.tenant', :tenant, true)")


async def test_deferred_constraint_refuses_each_commit(
    deferring_driver_url: str, judge_for: JudgeFor
) -> None:
    """COMMIT raises as in production and undoes its own transaction alone; a later COMMIT is checked, too."""
    async with open_worker(deferring_driver_url, judge_for) as worker, sandbox(worker.db) as box:
        for _ in range(2):
            with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
                async with worker.db(commit_on_exit=True) as unit:
                    unit.session.add_all([Note(text="refused"), Reply(**ORPHAN)])
            await write(worker.db, f"kept {box.commits}")
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
            async with worker.engine.begin() as connection:
                await connection.execute(insert(Reply).values(**ORPHAN))
        async with worker.db(commit_on_exit=True) as unit:  # repaired before COMMIT
            await unit.session.execute(insert(Reply).values(note_id=505))
            await unit.session.execute(insert(Note).values(id=505, text="repaired"))
        assert await notes(worker.db) == ["kept 0", "kept 1", "repaired"]
        assert (box.commits, box.rollbacks) == (3, 3)


async def test_setting_of_one_unit_is_gone_in_the_next(
    postgresql_driver_url: str, judge_for: JudgeFor
) -> None:
    """`SET LOCAL` ends with its transaction, does not reach a unit inside it, and outlasts that unit."""
    async with open_worker(postgresql_driver_url, judge_for) as worker, sandbox(worker.db):

        async def tenant() -> object:
            found: object = await worker.db.session.scalar(text("SELECT current_setting('app.tenant', true)"))
            return found or None

        for end in ("commit", "rollback"):
            async with worker.db() as unit:
                assert await tenant() is None
                await unit.session.execute(TENANT, {"tenant": "a"})
                await unit.session.execute(text("SET LOCAL statement_timeout = 4000"))
                async with worker.db(commit_on_exit=True) as inner:
                    assert await tenant() is None
                    inner.session.add(Note(text=f"inside {end}"))
                assert await tenant() == "a"
                assert await unit.session.scalar(text("SHOW statement_timeout")) == "4s"
                await getattr(unit, end)()
                assert await tenant() is None
                assert await unit.session.scalar(text("SHOW statement_timeout")) == "0"


async def test_role_of_one_unit_is_gone_in_the_next(postgresql_driver_url: str, judge_for: JudgeFor) -> None:
    """`SET LOCAL ROLE`, as row-level security needs it, ends with its transaction."""
    async with open_worker(postgresql_driver_url, judge_for) as worker, sandbox(worker.db):
        async with worker.db(commit_on_exit=True) as unit:
            own = await unit.session.scalar(text("SELECT current_user"))
            await unit.session.execute(text("SET LOCAL ROLE pg_read_all_data"))
            assert await unit.session.scalar(text("SELECT current_user")) == "pg_read_all_data"
        async with worker.db() as unit:
            assert await unit.session.scalar(text("SELECT current_user")) == own


async def test_silent_rollback_stays_one(postgresql_driver_url: str, judge_for: JudgeFor) -> None:
    """PostgreSQL answers COMMIT by ROLLBACK after a swallowed error: a unit says so, an engine does not."""
    async with open_worker(postgresql_driver_url, judge_for) as worker, sandbox(worker.db) as box:

        async def swallow() -> None:
            async with worker.db(commit_on_exit=True) as unit:
                await unit.session.execute(insert(Note).values(text="lost"))
                with pytest.raises(DBAPIError):
                    await unit.session.execute(text("SELECT 1 / 0"))

        with pytest.raises(UnexpectedRollbackError):
            await swallow()
        async with worker.engine.begin() as connection:
            await connection.execute(insert(Note).values(text="lost"))
            with pytest.raises(DBAPIError):
                await connection.execute(text("SELECT 1 / 0"))
        assert await notes(worker.db) == []
        assert (box.commits, box.rollbacks) == (0, 2)


@pytest.fixture(params=["postgresql", "psycopg", "mariadb"])
def two_urls(request: pytest.FixtureRequest, databases: ExitStack) -> tuple[str, str]:
    """Two empty databases by each driver that has two-phase commit."""
    server: URL = request.getfixturevalue(f"{request.param}_server")
    return databases.enter_context(fresh_database(server)), databases.enter_context(fresh_database(server))


@pytest.mark.parametrize("fails", [False, True])
async def test_atomic_over_two_databases(
    two_urls: tuple[str, str], judge_for: JudgeFor, *, fails: bool
) -> None:
    """`atomic()` commits on both or on none, and the sandbox undoes both."""
    first_url, second_url = two_urls
    async with open_worker(first_url, judge_for) as first, open_worker(second_url, judge_for) as second:
        async with sandbox(first.db, second.db) as box:
            for number in range(2):
                try:
                    async with atomic(first.db, second.db):
                        first.db.session.add(Note(text=f"first {number}"))
                        await first.db.session.flush()
                        second.db.session.add(Note(text=f"second {number}"))
                        if fails:
                            second.db.session.add(Note(text=f"second {number}"))
                except IntegrityError:
                    assert fails
            assert (await notes(first.db), await notes(second.db)) == (
                ([], []) if fails else (["first 0", "first 1"], ["second 0", "second 1"])
            )
            assert (box.commits, box.rollbacks) == ((0, 4) if fails else (4, 0))
            await write(first.db, "afterwards")
            async with first.db() as unit:
                await unit.session.execute(insert(Note).values(text="rolled back"))
                await unit.rollback()
            assert "rolled back" not in await notes(first.db)
        assert (await first.notes(), await second.notes()) == ([], [])


async def test_two_pairs_on_one_database_see_each_other(database_url: str, judge_for: JudgeFor) -> None:
    """Engines of the same URL share the sandbox's connection, also one that is bound later."""
    _, other = create_middleware_and_session_proxy(AsyncSession)
    async with open_worker(database_url, judge_for) as worker, engine_with_tables(database_url) as engine:
        async with sandbox(worker.db, other):
            await write(worker.db, "by the first")
            async with other.connect(engine):
                assert await notes(other) == ["by the first"]
                await write(other, "by the second")
            assert await notes(worker.db) == ["by the first", "by the second"]
        assert await worker.notes() == []


async def test_replica_reads_what_its_primary_has_committed(
    postgresql_driver_url: str, judge_for: JudgeFor
) -> None:
    """A replica's proxy at the primary's URL waits for a position, and reads the writes before it."""
    _, replica = create_middleware_and_session_proxy(AsyncSession, read_only=True)
    async with (
        open_worker(postgresql_driver_url, judge_for) as primary,
        sandbox(primary.db, replica),
        replica.connect(postgresql_driver_url),
    ):
        await write(primary.db, "by the primary")
        position = await primary.db.commit_position()
        async with replica.after(position) as unit:
            assert list(await unit.session.scalars(select(Note.text))) == ["by the primary"]


async def test_engine_is_its_own_again(database_url: str, judge_for: JudgeFor) -> None:
    """After the sandbox the engine commits for good, and settings of units end with them."""
    async with open_worker(database_url, judge_for) as worker:
        for number in range(2):
            async with sandbox(worker.db), worker.db(read_only=True, isolation_level="SERIALIZABLE") as unit:
                assert len(list(await unit.session.scalars(select(Note)))) == number
            async with worker.db(read_only=True, isolation_level="SERIALIZABLE") as unit:
                assert len(list(await unit.session.scalars(select(Note)))) == number
            await write(worker.db, f"for good {number}")
        assert await worker.notes() == ["for good 0", "for good 1"]


async def test_unit_after_a_failed_one(sandboxed: Site, box: Sandbox) -> None:
    """After a statement failed in a unit, the same flush works in the next units as in production."""
    for name in ("fails", "good", "good again"):
        failed = False
        try:
            async with sandboxed.db.begin() as unit:
                if name == "fails":
                    with suppress(DBAPIError):
                        await unit.session.execute(text("SELECT plugin FROM nowhere"))
                unit.session.add_all([Note(text=f"{name} {half}") for half in "ab"])
                await unit.session.flush()  # which psycopg prepares
        except SQLAlchemyError:
            failed = True
        assert failed == (name == "fails" and unit_is_aborted(sandboxed))
    assert box.commits >= 2


def unit_is_aborted(site: Site) -> bool:
    """Whether PostgreSQL refuses all that comes after an error."""
    return site.engine.dialect.name == "postgresql"
