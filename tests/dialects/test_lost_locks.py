"""A MariaDB that undoes the whole transaction where a statement does not get its lock, and what a unit tells.

It is a setting of the server's start, and not the default, so that the server which runs does not do.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import URL, text
from sqlalchemy.exc import OperationalError

from fastapi_async_sqlalchemy import UnexpectedRollbackError
from tests.support.databases import JudgeFor, fresh_database
from tests.support.mariadb import MariadbMissingError, own_mariadb
from tests.support.site import Site
from tests.support.tables import Note
from tests.support.worker import open_worker

OPTIONS = ("--innodb-rollback-on-timeout=ON", "--innodb-lock-wait-timeout=1")


@pytest.fixture(scope="module")
def strict_server() -> Iterator[URL]:
    """A MariaDB of this module's own."""
    try:
        with own_mariadb(*OPTIONS) as server:
            yield server
    except MariadbMissingError as error:
        pytest.skip(f"no server can be started here with settings of its own: {error}")


@pytest.fixture
def strict_url(strict_server: URL, databases: ExitStack) -> str:
    """An empty database on that server."""
    return databases.enter_context(fresh_database(strict_server))


@pytest.fixture
async def strict_worker(strict_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on that server."""
    async with open_worker(strict_url, judge_for) as worker:
        yield worker


@pytest.mark.parametrize("later", [[], ["later"]])
async def test_lock_that_was_not_had_has_lost_the_transaction(
    strict_worker: Site, strict_url: str, judge_for: JudgeFor, later: list[str]
) -> None:
    """Where a lock's timeout has rolled everything back and was swallowed, the unit commits nothing else."""
    other = await judge_for(strict_url)
    await other.execute("INSERT INTO note (text) VALUES ('old')")
    await other.execute("BEGIN")
    await other.execute("UPDATE note SET text = 'locked' WHERE id = 1")

    async def write() -> None:
        async with strict_worker.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="first"))
            await unit.session.flush()
            with pytest.raises(OperationalError, match="Lock wait timeout"):
                await unit.session.execute(text("UPDATE note SET text = 'new' WHERE id = 1"))
            unit.session.add_all(Note(text=note) for note in later)

    with pytest.raises(UnexpectedRollbackError, match="has rolled it back after a conflict"):
        await write()
    await other.execute("ROLLBACK")
    assert await strict_worker.notes() == ["old"]
