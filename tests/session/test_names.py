"""Names: the user's own are never taken, and what the package's objects show is what the stubs declare."""

import ast
import inspect
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import pytest
from fastapi import Response
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import fastapi_async_sqlalchemy
from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.hooks import BoomError, Log
from tests.support.site import MakeSite, Site
from tests.support.tables import Base, Note, engine_with_tables
from tests.support.worker import open_worker

T = TypeVar("T")
Override: TypeAlias = Callable[[str, Callable[..., object]], Callable[..., object]]

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


# What SQLAlchemy never calls.


def public_members(kind: type) -> dict[str, Any]:
    """Return the methods and properties of a class that a user may override."""
    names = [name for name in dir(kind) if not name.startswith("_")]
    members = {name: inspect.getattr_static(kind, name) for name in [*names, "__iter__", "__contains__"]}
    return {name: one for name, one in members.items() if isinstance(one, (FunctionType, property))}


def overridden(kind: type[T], override: Override, spared: Collection[str] = ()) -> type[T]:
    """Make a session class that overrides each public name of SQLAlchemy's, some spared."""
    members: dict[str, Any] = {}
    for name, original in public_members(kind).items():
        if isinstance(original, FunctionType):
            members[name] = override(name, original)
        else:
            members[name] = original.getter(override(name, original.fget))
    own: Any = type("Own", (kind,), {name: one for name, one in members.items() if name not in spared})
    return cast("type[T]", own)


def own_classes(override: Override, spared: Collection[str] = ()) -> type[AsyncSession]:
    """Make such a class of both sides of a session."""
    class_ = overridden(AsyncSession, override, spared)
    class_.sync_session_class = overridden(Session, override, spared)
    return class_


def noting(called: set[str]) -> Override:
    """Return an override that notes its call, and otherwise does what SQLAlchemy does."""

    def override(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def noted(*args: object, **kwargs: object) -> object:
            called.add(name)
            return original(*args, **kwargs)

        return noted

    return override


def useless(name: str, _: object) -> Callable[..., NoReturn]:
    """Return an override that means something else."""

    def fail(*_: object, **__: object) -> NoReturn:
        message = f"{name} is the application's own"
        raise BoomError(message)

    return fail


async def write(session: AsyncSession) -> None:
    """Write and read as applications do, with a savepoint that is undone."""
    session.add(Note(text="a"))
    await session.flush()
    with suppress(BoomError):
        async with session.begin_nested():
            session.add(Note(text="b"))
            raise BoomError
    session.add(Note(text="b"))
    assert len((await session.execute(select(Note))).all()) == 2
    rows = await session.stream(select(Note))
    await rows.close()
    await session.connection()


async def write_plainly(class_: type[AsyncSession], url: str) -> None:
    """Commit, and roll back, with a session class and without the package."""
    async with engine_with_tables(url) as engine:
        async with class_(engine, expire_on_commit=False) as session:
            await write(session)
            await session.rollback()
        async with class_(engine, expire_on_commit=False) as session:
            await write(session)
            await session.commit()
        async with engine.begin() as connection:
            await connection.execute(delete(Note))


async def called_by_sqlalchemy(url: str) -> set[str]:
    """Return the names that SQLAlchemy or `write()` calls."""
    called = set[str]()
    await write_plainly(own_classes(noting(called)), url)
    return called


async def ask_for_all(make_site: MakeSite, url: str, class_: type[AsyncSession]) -> list[object]:
    """Answer requests with sessions of a class, and open blocks; return what ran and what is committed."""
    site = await make_site(url, commit_on_exit=True, session_args={"class_": class_})
    log, db = Log(), site.db

    @site.app.get("/{status}")
    async def route(status: int) -> Response:
        log.all(db.unit)
        await write(db.session)
        repr(db.unit)
        return Response(status_code=status)

    async with site.client() as client:
        for status in (400, 200):
            assert (await client.get(f"/{status}")).status_code == status
        await db.create_all(Base.metadata)
        await db.ping()
        async with db.connection(), db(read_only=True) as unit:
            await unit.session.execute(select(Note.text))
        async with db(pool_timeout=30) as unit:
            unit.on_begin(log.begin)
            async with unit.savepoint(), db(propagation="nested"), db(propagation="required"):
                unit.session.add(Note(text="c"))
            await unit.rollback()
            await unit.commit()
            unit.session.add(Note(text="d"))
            await unit.session.close()
        assert site.checked_out() == 0
    return [*log, *await site.notes()]


SEEN = ["rolled back", "before", "committed", "begin", "a", "b"]
"""What `ask_for_all()` leaves."""


async def test_package_calls_what_sqlalchemy_calls(make_site: MakeSite, sqlite_url: str) -> None:
    """The package calls no method of a user's session class that SQLAlchemy does not call itself."""
    plain, called = await called_by_sqlalchemy(sqlite_url), set[str]()
    assert await ask_for_all(make_site, sqlite_url, own_classes(noting(called))) == SEEN
    assert called - plain == set()


async def test_names_may_mean_something_else(make_site: MakeSite, sqlite_url: str) -> None:
    """What SQLAlchemy does not call may mean something else in a user's class."""
    plain = await called_by_sqlalchemy(sqlite_url)
    class_ = own_classes(useless, spared=plain)
    names = {*public_members(Session), *public_members(AsyncSession)} - plain
    assert {"in_transaction", "get_transaction", "__iter__", "dirty", "is_modified", "run_sync"} <= names
    await write_plainly(class_, sqlite_url)
    assert await ask_for_all(make_site, sqlite_url, class_) == SEEN


def flush(session: Session) -> None:
    """Flush all."""
    Session.flush(session)


def execute(session: Session, statement: Any, *, params: Any = None, **options: Any) -> Any:
    """Execute with named parameters alone."""
    return Session.execute(session, statement, params, **options)


def connection(session: Session, *, label: str = "", **options: Any) -> Any:
    """Return the connection, or something else."""
    return label or Session.connection(session, **options)


def begin(session: Session, *, label: str = "") -> Any:
    """Begin a transaction, or something else."""
    return label or Session.begin(session)


OwnParameters = type(
    "OwnParameters", (Session,), {one.__name__: one for one in (flush, execute, connection, begin)}
)


async def test_own_parameters(sqlite_url: str, judge_for: JudgeFor) -> None:
    """Methods with other parameters than SQLAlchemy's get what was given, and return what they like."""
    async with open_worker(sqlite_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"sync_session_class": OwnParameters})
        async with worker.db(commit_on_exit=True) as unit:
            session: Any = unit.session.sync_session
            assert session.begin(label="x") == session.connection(label="x") == "x"
            async with unit.session.begin():
                await unit.session.connection()
                unit.session.add(Note(text="a"))
                await unit.session.run_sync(lambda _: session.flush())
            unit.session.add(Note(text="b"))
            assert len((await unit.session.execute(select(Note))).all()) == 2
        assert await worker.notes() == ["a", "b"]


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
