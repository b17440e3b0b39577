"""COMMITs and connections that a test makes fail look as the driver's own failures do."""

import logging
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    SessionProxy,
    create_middleware_and_session_proxy,
    violated_constraint,
)
from fastapi_async_sqlalchemy.testing import CommitFailure, Sandbox, SandboxError, sandbox
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


LONG = "c" * 64


@pytest.mark.parametrize("name", ["uq_account_owner", "it's", LONG])
async def test_error_names_the_constraint(name: str, make_site: MakeSite, driver_url: str) -> None:
    """A handler learns from the error which constraint it is, wherever real errors say so."""
    site = await make_site(driver_url, commit_on_exit=True)

    @site.app.post("/")
    async def post() -> None:
        await site.db.session.execute(insert(Note).values(text="refused"))

    @site.app.exception_handler(IntegrityError)
    async def answer(_: object, error: Exception) -> JSONResponse:
        return JSONResponse(violated_constraint(error), status_code=409)

    async with sandbox(site.db) as box, site.client() as client:
        box.fail_commit(constraint=name)
        answered = await client.post("/")
        assert (answered.status_code, answered.json()) == (409, None if "sqlite" in driver_url else name)
        assert await notes(site.db) == []


async def test_sqlite_names_a_check(sqlite_worker: Site) -> None:
    """SQLite's errors name a CHECK, and no other constraint, be it written with quotes or without."""
    tables = (
        "CREATE TABLE account (owner VARCHAR CONSTRAINT uq_owner UNIQUE, cents INTEGER,"
        ' CONSTRAINT "not_negative" CHECK (cents >= 0), constraint limited check (cents < 100))'
    )
    async with sqlite_worker.engine.begin() as connection:
        await connection.execute(text(tables))
    async with sandbox(sqlite_worker.db) as box:
        for name, named in (("not_negative", True), ("limited", True), ("uq_owner", False), ("limit", False)):
            box.fail_commit(constraint=name)
            with pytest.raises(IntegrityError) as raised:
                await write(sqlite_worker.db, "refused")
            assert violated_constraint(raised.value) == (name if named else None)


NO_COMMIT = "has met no COMMIT of a transaction that has written: commit a write after that call, or leave it"
Arm = Callable[[Sandbox, SessionProxy[AsyncSession]], None]
UNMET: dict[str, tuple[Arm, str]] = {
    "COMMIT": (lambda box, _: box.fail_commit("conflict"), rf"fail_commit\('conflict'\) {NO_COMMIT}"),
    "COMMIT of one": (
        lambda box, db: box.fail_commit(on=db),
        rf"fail_commit\('constraint'\) on AsyncSession .* {NO_COMMIT}",
    ),
    "statement": (
        lambda box, _: box.lose_connection(),
        r"lose_connection\(\) has met no statement: send one after that call, or leave it out",
    ),
}


@pytest.mark.parametrize(("arm", "message"), UNMET.values(), ids=UNMET)
async def test_failure_that_nothing_met(sqlite_worker: Site, arm: Arm, message: str) -> None:
    """A test whose failure has not come about proves nothing, and the sandbox says so at its end."""

    async def try_out(*errors: Exception) -> None:
        async with sandbox(sqlite_worker.db) as box:
            await write(sqlite_worker.db, "too early")
            assert await notes(sqlite_worker.db) == ["too early"]
            arm(box, sqlite_worker.db)
            for error in errors:
                raise error

    with pytest.raises(SandboxError, match=message):
        await try_out()
    with pytest.raises(ZeroDivisionError):  # the test's own error comes first
        await try_out(ZeroDivisionError())
    assert await notes(sqlite_worker.db) == []


async def test_wrong_failures_are_refused() -> None:
    """A failure that there is not, and what is no proxy, are told at once."""
    _, db = create_middleware_and_session_proxy()
    async with sandbox(db) as box:
        with pytest.raises(ConfigurationError, match="failure must be one of constraint, conflict, lost"):
            box.fail_commit("boom")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
        with pytest.raises(ConfigurationError, match="constraint must be the name of a constraint, not 5"):
            box.fail_commit(constraint=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
        with pytest.raises(ConfigurationError, match="'lost' violates no constraint: leave constraint out"):
            box.fail_commit("lost", constraint="uq_owner")
        with pytest.raises(ConfigurationError, match="on must be a proxy such as `db`, not "):
            box.lose_connection(on=FastAPI())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
