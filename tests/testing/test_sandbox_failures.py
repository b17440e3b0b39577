"""COMMITs and connections that a test makes fail look as the driver's own failures do."""

import logging

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import ConfigurationError, SessionProxy, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.testing import CommitFailure, Sandbox, sandbox
from tests.support.databases import JudgeFor
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.worker import open_worker
from tests.testing.test_sandbox import notes, write


async def write_with_hooks(db: SessionProxy[AsyncSession], ran: list[str]) -> None:
    """Write a note in a unit that commits, and note which hooks run."""
    async with db(commit_on_exit=True) as unit:
        unit.on_rollback(lambda: ran.append("rollback"))
        unit.on_commit(lambda: ran.append("commit"))
        unit.session.add(Note(text="hooked"))


async def test_commit_fails_by_a_constraint(sandboxed: Site, box: Sandbox) -> None:
    """The next COMMIT of a transaction that has written is refused once, and its transaction undone."""
    ran: list[str] = []
    box.fail_commit()
    assert await notes(sandboxed.db) == ["before"]
    with pytest.raises(IntegrityError):
        await write_with_hooks(sandboxed.db, ran)
    await write(sandboxed.db, "kept")
    assert await notes(sandboxed.db) == ["before", "kept"]
    assert (ran, box.commits, box.rollbacks) == (["rollback"], 1, 1)


async def test_commit_fails_by_a_conflict(sandboxed: Site, box: Sandbox) -> None:
    """A function with retries is called again, in a new unit."""
    calls: list[int] = []

    @sandboxed.db.transactional(retries=2)
    async def write_again() -> None:
        calls.append(len(calls))
        sandboxed.db.session.add(Note(text=f"call {len(calls)}"))

    box.fail_commit("conflict")
    await write_again()
    assert (calls, await notes(sandboxed.db)) == ([0, 1], ["before", "call 2"])


@pytest.mark.parametrize("failure", ["lost", "lost_after_commit"])
async def test_commit_of_unknown_outcome(
    failure: CommitFailure, sandboxed: Site, box: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """No hook runs and the outcome is said to be unknown, be it stored or not."""
    ran: list[str] = []
    box.fail_commit(failure)
    with caplog.at_level(logging.WARNING), pytest.raises(DBAPIError) as raised:
        await write_with_hooks(sandboxed.db, ran)
    assert raised.value.connection_invalidated
    assert [text.partition(" on ")[0] for text in complaints(caplog)] == ["ERROR: COMMIT"]
    await write(sandboxed.db, "kept")
    stored = ["hooked"] if failure == "lost_after_commit" else []
    assert (ran, await notes(sandboxed.db)) == ([], ["before", *stored, "kept"])


async def test_statement_finds_its_connection_lost(sandboxed: Site, box: Sandbox) -> None:
    """The next statement breaks its transaction, and the one after it has a connection again."""
    async with sandboxed.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="rolled back"))
        await unit.session.flush()
        box.lose_connection()
        with pytest.raises(DBAPIError) as raised:
            await unit.session.execute(select(Note))
        assert raised.value.connection_invalidated
        await unit.rollback()
        unit.session.add(Note(text="kept"))
    assert await notes(sandboxed.db) == ["before", "kept"]
    assert box.rollbacks == 1


async def test_failure_of_one_database(sqlite_url: str, postgresql_url: str, judge_for: JudgeFor) -> None:
    """`on` names the database whose COMMIT fails; the other one commits."""
    async with (
        open_worker(sqlite_url, judge_for) as one,
        open_worker(postgresql_url, judge_for) as other,
        sandbox(one.db, other.db) as box,
    ):
        box.fail_commit(on=other.db)
        await write(one.db, "kept")
        with pytest.raises(IntegrityError):
            await write(other.db, "refused")
        box.lose_connection(on=one.db)
        assert await notes(other.db) == []
        with pytest.raises(DBAPIError):
            await notes(one.db)
        assert await notes(one.db) == ["kept"]


async def test_request_whose_commit_fails(database_url: str, make_site: MakeSite) -> None:
    """The client gets the answer of the application's handler, and nothing is stored."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.post("/")
    async def post() -> None:
        await site.db.session.execute(insert(Note).values(text="refused"))

    @site.app.exception_handler(IntegrityError)
    async def answer(*_: object) -> JSONResponse:
        return JSONResponse({}, status_code=409)

    async with sandbox(site.db) as box, site.client() as client:
        box.fail_commit("constraint")
        assert (await client.post("/")).status_code == 409
        assert (await client.post("/")).status_code == 200
        assert await notes(site.db) == ["refused"]


async def test_wrong_failures_are_refused() -> None:
    """A failure that there is not, and what is no proxy, are told at once."""
    _, db = create_middleware_and_session_proxy()
    async with sandbox(db) as box:
        with pytest.raises(ConfigurationError, match="failure must be one of constraint, conflict, lost"):
            box.fail_commit("boom")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
        with pytest.raises(ConfigurationError, match="on must be a proxy such as `db`, not "):
            box.lose_connection(on=FastAPI())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
