"""Names: the user's own are never taken, and what the package's objects show is what the stubs declare."""

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.hooks import Log
from tests.support.site import MakeSite, Site
from tests.support.tables import Note
from tests.support.worker import open_worker

OURS = "_fastapi_async_sqlalchemy"
STUB = Path(__file__).parents[2] / "typings" / "fastapi_async_sqlalchemy" / "__init__.pyi"
SOURCES = Path(inspect.getfile(fastapi_async_sqlalchemy)).parent


def names_of_the_package() -> list[str]:
    """Return every name that the heart of the package defines or assigns to an attribute."""
    names: set[str] = set()
    for path in [*SOURCES.glob("_session/*.py"), *SOURCES.glob("_unit/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Attribute(attr=name) | ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(name)
                case _:
                    pass
    taken = set(dir(Session)) | set(vars(Session()))
    return sorted(name for name in names - taken - {OURS} if not name.startswith("__"))


NAMES = names_of_the_package()
"""Some hundreds, among them `busy`, `release`, `end`, `pending` and `unit`."""


def own(name: str) -> Callable[[Session], str]:
    """Make a method of the user's."""
    return lambda _: f"my {name}"


Mine = type("Mine", (Session,), {name: own(name) for name in [*NAMES, "uow", "watch", "owner"]})
Marked = type("Marked", (Session,), {name: name for name in NAMES})


class MineAsync(AsyncSession):
    """A session class of the user's, whose synchronous side has methods of every name."""

    sync_session_class = Mine


class OwnNames(AsyncSession):
    """A session class of the user's with methods of its own on the asynchronous side."""

    def release(self) -> str:
        """Return what the application wrote."""
        return "my release"

    def end(self) -> str:
        """Return what the application wrote."""
        return "my end"

    def state(self) -> str:
        """Return what the application wrote."""
        return "my state"


def test_names_are_many() -> None:
    """The list is what it says."""
    assert {"busy", "release", "end", "pending", "settle", "ledger", "holder", "hooks"} <= set(NAMES)


@pytest.mark.parametrize("class_", [Mine, Marked])
async def test_own_names_stay(sqlite_url: str, judge_for: JudgeFor, class_: type[Session]) -> None:
    """A class may have any name: it is kept, and what the unit does is what it does otherwise."""
    log = Log()
    async with open_worker(sqlite_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"sync_session_class": class_})
        async with worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            session: Any = unit.session.sync_session
            unit.session.add(Note(text="a"))
            await unit.session.flush()
            async with unit.savepoint():
                unit.session.add(Note(text="b"))
            for name in NAMES:
                found = getattr(session, name)
                assert (found() if class_ is Mine else found) == (f"my {name}" if class_ is Mine else name)
            rows = await unit.session.stream(select(Note.text))
            assert len(await rows.all()) == 2
        async with worker.db(pool_timeout=5, isolation_level="SERIALIZABLE") as unit:
            unit.session.add(Note(text="c"))
            await unit.rollback()
            await unit.session.close()
        assert log == ["committed"]
        assert await worker.notes() == ["a", "b"]


async def test_attributes_that_are_set(sqlite_worker: Site) -> None:
    """What the user sets on the session of a unit is kept, and stands in nobody's way."""
    async with sqlite_worker.db(commit_on_exit=True) as unit:
        session: Any = unit.session.sync_session
        for name in NAMES:
            setattr(session, name, name)
        unit.session.add(Note(text="a"))
        await unit.session.flush()
        assert [name for name in NAMES if getattr(session, name) != name] == []
    assert await sqlite_worker.notes() == ["a"]


async def test_names_of_the_asynchronous_side(sqlite_url: str, judge_for: JudgeFor) -> None:
    """The asynchronous class is the user's own, not a subclass."""
    async with open_worker(sqlite_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"class_": OwnNames})
        async with worker.db() as unit:
            session = cast("OwnNames", unit.session)
            assert type(session) is OwnNames
            assert [session.release(), session.end(), session.state()] == ["my release", "my end", "my state"]
            plain = OwnNames(worker.engine, sync_session_class=Session)
            assert set(vars(session)) == set(vars(plain))
            assert set(dir(session)) == set(dir(plain))


class Plain(Session):
    """A session class of the user's, with nothing of its own."""


@pytest.mark.parametrize("class_", [Session, Plain, Mine])
async def test_one_name_more(sqlite_url: str, judge_for: JudgeFor, class_: type[Session]) -> None:
    """A session shows one name more than one of the user's class, before and after it is used."""

    async def use(session: AsyncSession) -> tuple[set[str], set[str]]:
        session.add(Note(text="a"))
        async with session.begin_nested():
            await session.scalar(select(Note.text))
        return set(vars(session.sync_session)), set(dir(session.sync_session)) - {"__del__"}

    async with open_worker(sqlite_url, judge_for) as worker:
        async with AsyncSession(worker.engine, sync_session_class=class_) as plain:
            held, shown_by_plain = await use(plain)
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"sync_session_class": class_})
        async with worker.db(commit_on_exit=True, pool_timeout=5) as unit:
            assert set(vars(unit.session.sync_session)) <= held | {OURS}
            unit.on_commit(list)
            assert await use(unit.session) == (held | {OURS}, shown_by_plain | {OURS})


# What the stubs declare.


def declared(name: str) -> set[str]:
    """Return the public members that the stub declares of a class."""
    (found,) = [
        node
        for node in ast.parse(STUB.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    members: set[str] = set()
    for node in found.body:
        match node:
            case ast.FunctionDef(name=member) | ast.AsyncFunctionDef(name=member):
                members.add(member)
            case ast.AnnAssign(target=ast.Name(id=member)):
                members.add(member)
            case _:
                pass
    return {member for member in members if not member.startswith("_")}


def shown(value: object) -> set[str]:
    """Return what a tool offers after the dot."""
    return {name for name in dir(value) if not name.startswith("_")}


async def test_proxy_shows_what_is_declared(sqlite_worker: Site) -> None:
    """`db` shows what its stub says, connected or not."""
    _, unconnected = create_middleware_and_session_proxy(AsyncSession)
    for db in (sqlite_worker.db, unconnected):
        assert shown(db) == declared("SessionProxy")


async def test_unit_shows_what_is_declared(sqlite_worker: Site) -> None:
    """A unit does so before, in and after its use, and each task's own unit, too."""
    expected = declared("UnitOfWork")
    async with sqlite_worker.db() as unit:
        assert shown(unit) == expected
        unit.on_commit(list)
        await unit.session.scalar(select(Note.text))
        assert shown(unit) == expected
    assert shown(unit) == expected
    async with sqlite_worker.db(multi_sessions=True) as unit:
        assert shown(unit) == shown(sqlite_worker.db.unit) == expected


async def test_unit_of_a_request_shows_what_is_declared(make_site: MakeSite, sqlite_url: str) -> None:
    """So does the unit of a request."""
    site = await make_site(sqlite_url)
    found: list[set[str]] = []

    @site.app.get("/")
    async def route() -> None:
        found.append(shown(site.db.unit))
        await site.db.session.scalar(select(Note.text))
        found.append(shown(site.db.unit))

    await site.get()
    assert found == [declared("UnitOfWork")] * 2


async def test_group_shows_what_is_declared(sqlite_worker: Site) -> None:
    """A task group shows what its stub says, entered or not."""
    (kind,) = {type(sqlite_worker.db.task_group()).__name__}
    group = sqlite_worker.db.task_group()
    assert shown(group) == declared(kind)
    async with group:
        assert shown(group) == declared(kind)


def test_proxy_is_the_class_of_the_stub() -> None:
    """The names are those of the classes that users see."""
    assert isinstance(fastapi_async_sqlalchemy.db, SessionProxy)
