"""SQLAlchemy's own contract: what a plain session does, the unit's session does, error for error."""

import importlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, cast

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    SessionArgs,
    SessionProxy,
    UnexpectedRollbackError,
    UnitClosedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.hooks import BoomError, Log
from tests.support.site import MakeSite, Site
from tests.support.tables import Note
from tests.support.worker import open_worker

Step = Callable[[AsyncSession], Awaitable[object]]
STEPS: dict[str, Step] = {
    "execute": lambda session: session.execute(select(Note)),
    "scalars": lambda session: session.scalars(select(Note)),
    "get": lambda session: session.get(Note, 404),
    "flush": lambda session: session.flush(),
    "commit": lambda session: session.commit(),
    "begin_nested": lambda session: session.begin_nested().start(),
    "connection": lambda session: session.connection(),
    "refresh": lambda session: session.refresh(Note(text="no")),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "reset": lambda session: session.reset(),
}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


async def told(session: AsyncSession, step: Step) -> type[BaseException] | None:
    """Return the class of the error of a step."""
    try:
        await step(session)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is compared
        return type(error)
    return None


async def fail_a_flush(session: AsyncSession) -> None:
    """Flush a note of a text that there is, and swallow the error."""
    session.add_all([Note(text="twice"), Note(text="twice")])
    with pytest.raises(IntegrityError):
        await session.flush()


async def same(
    worker: Site, before: Step, steps: list[Step], **session_args: Any
) -> list[tuple[type[BaseException] | None, type[BaseException] | None]]:
    """Play steps on a plain session and on a unit's; returns the errors of both."""
    async with AsyncSession(worker.engine, **session_args) as plain:
        await before(plain)
        expected = [await told(plain, step) for step in steps]
    async with worker.db(cast("SessionArgs", session_args)) as unit:
        await before(unit.session)
        found = [await told(unit.session, step) for step in steps]
    return list(zip(expected, found, strict=True))


def assert_same(pairs: list[tuple[type[BaseException] | None, type[BaseException] | None]]) -> None:
    """See that each error is the other's, or a more special one."""
    for expected, found in pairs:
        assert (expected is None) == (found is None), pairs
        if expected is not None and found is not None:
            assert issubclass(found, expected), pairs


@each_step
async def test_after_a_failed_flush(worker: Site, step: Step) -> None:
    """Each call says what SQLAlchemy says, and the session works after a rollback."""
    steps = [step, step, STEPS["rollback"], STEPS["execute"], STEPS["commit"]]
    assert_same(await same(worker, fail_a_flush, steps))


@each_step
async def test_after_close_for_good(worker: Site, step: Step) -> None:
    """`close_resets_only=False` ends the session for its user, as SQLAlchemy says it."""
    steps = [STEPS["close"], step, step]
    assert_same(await same(worker, STEPS["execute"], steps, close_resets_only=False))


@each_step
@pytest.mark.parametrize("resets", [True, None])
async def test_after_close(worker: Site, step: Step, *, resets: bool | None) -> None:
    """Else a session that was closed begins afresh, as SQLAlchemy says it."""
    given = {} if resets is None else {"close_resets_only": resets}
    assert_same(await same(worker, STEPS["execute"], [STEPS["close"], step, STEPS["close"], step], **given))


async def test_commit_after_a_failed_flush(worker: Site) -> None:
    """It is SQLAlchemy's `PendingRollbackError` and ours, with the flush's error as its cause."""

    async def work(*, by_unit: bool | None) -> None:
        async with worker.db(commit_on_exit=by_unit is None) as unit:
            await fail_a_flush(unit.session)
            if by_unit is not None:
                await (unit.commit() if by_unit else unit.session.commit())

    for by_unit in (True, False, None):
        with pytest.raises(PendingRollbackError) as raised:
            await work(by_unit=by_unit)
        assert isinstance(raised.value, UnexpectedRollbackError)
        assert isinstance(raised.value.__cause__, IntegrityError)
        assert "a flush in it failed and it has been rolled back" in str(raised.value)
    assert await worker.notes() == []


async def test_statement_is_no_flush(postgresql_worker: Site) -> None:
    """A statement that failed is told as one, also where COMMIT is asked for by name."""
    async with postgresql_worker.db() as unit:
        with pytest.raises(IntegrityError):
            await unit.session.execute(insert(Note).values([{"text": "a"}, {"text": "a"}]))
        with pytest.raises(
            UnexpectedRollbackError, match="because a statement in it failed and the database"
        ):
            await unit.session.commit()


async def test_close_for_good_in_a_request(make_site: MakeSite, sqlite_url: str) -> None:
    """The request that closed its session for good gets SQLAlchemy's error, and the next one a session."""
    site = await make_site(sqlite_url, commit_on_exit=True, session_args={"close_resets_only": False})

    @site.app.get("/")
    async def route() -> str:
        await site.db.session.close()
        with pytest.raises(InvalidRequestError, match="permanently closed"):
            await site.db.session.execute(select(Note))
        return "told"

    for _ in range(2):
        assert (await site.get()).status_code == 200


# Arguments.


class Counted(AsyncSession):
    """A session class of the user's, which counts how many are made."""

    made: ClassVar[int] = 0

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Count; the arguments are those of the base class."""
        Counted.made += 1
        return super().__new__(cls)


class CountedSync(Session):
    """The same, on the synchronous side."""

    made: ClassVar[int] = 0

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Count."""
        CountedSync.made += 1
        return super().__new__(cls)


@pytest.fixture(autouse=True)
def _none_made() -> None:
    """Begin to count."""
    Counted.made = CountedSync.made = 0


WRONG: list[dict[str, Any]] = [
    {"no_such_argument": 1},
    {"bind": None},
    {"binds": {"note": "no engine"}},
    {"sync_session_class": AsyncSession},
    {"class_": Session},
    {"join_transaction_mode": "no such mode"},
    {"close_resets_only": False, "nothing": None},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("class_", [Counted, AsyncSession])
async def test_refused_at_once(sqlite_url: str, wrong: dict[str, Any], class_: type[AsyncSession]) -> None:
    """Wrong arguments are refused where they are given, and no session of the user's is made for it."""
    sync = cast("SessionArgs", {"sync_session_class": CountedSync, **wrong})
    middleware, db = create_middleware_and_session_proxy(class_)
    engine = create_async_engine(sqlite_url)
    with pytest.raises(ConfigurationError):
        db.connect(engine, session_args=sync)
    with pytest.raises(ConfigurationError):
        db.bind(engine, session_args=sync)
    with pytest.raises(ConfigurationError):
        middleware(_application, custom_engine=engine, session_args=sync)
    db.bind(engine)
    with pytest.raises(ConfigurationError):
        db(sync)
    assert (Counted.made, CountedSync.made) == (0, 0)
    await engine.dispose()


async def _application(*_: object) -> None:
    """Do nothing."""


async def test_none_made_before_it_is_asked_for(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A session is made when `session` is first asked for, and one for each unit."""
    async with open_worker(sqlite_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"class_": Counted, "sync_session_class": CountedSync})
        async with worker.db(read_only=True), worker.db({"info": {}}):
            assert (Counted.made, CountedSync.made) == (0, 0)
        async with worker.db() as unit:
            assert type(unit.session) is Counted
            assert isinstance(unit.session.sync_session, CountedSync)
            await unit.session.execute(select(Note))
        assert (Counted.made, CountedSync.made) == (1, 1)


class Routing(Session):
    """A synchronous class that a session class of the user's chooses itself."""


class KeywordBind(AsyncSession):
    """A session class that takes its engine by keyword alone."""

    def __init__(self, *, bind: Any = None, **options: Any) -> None:
        super().__init__(bind=bind, **options)


class Replaces(AsyncSession):
    """A session class that replaces the argument."""

    def __init__(self, bind: Any = None, **options: Any) -> None:
        options["sync_session_class"] = Routing
        super().__init__(bind, **options)


class Passes(AsyncSession):
    """A session class that passes an argument which nobody else may give."""

    def __init__(self, bind: Any = None, **options: Any) -> None:
        super().__init__(bind, sync_session_class=Routing, **options)


class Assigns(AsyncSession):
    """A session class that assigns the attribute, and refuses to be subclassed."""

    def __init__(self, bind: Any = None, **options: Any) -> None:
        self.sync_session_class = Routing
        super().__init__(bind, **options)

    def __init_subclass__(cls) -> NoReturn:
        raise BoomError


@pytest.mark.parametrize("class_", [KeywordBind, Replaces, Passes, Assigns])
async def test_init_of_the_users(sqlite_url: str, judge_for: JudgeFor, class_: type[AsyncSession]) -> None:
    """A class whose `__init__` suits `async_sessionmaker` is served, and may choose its synchronous class."""
    log = Log()
    async with open_worker(sqlite_url, judge_for) as worker:
        async with async_sessionmaker(worker.engine, class_=class_)() as plain:
            sync = type(plain.sync_session)
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"class_": class_})
        async with worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            session = unit.session
            assert type(session) is class_
            assert isinstance(session.sync_session, sync)
            assert vars(session).keys() == vars(plain).keys()
            session.add(Note(text="a"))
        with pytest.raises(UnitClosedError):
            await session.execute(select(Note))
        assert log == ["committed"]
        assert await worker.notes() == ["a"]


class Strict(AsyncSession):
    """A session class that takes few arguments."""

    def __init__(self, bind: Any = None, *, expire_on_commit: bool = True) -> None:
        super().__init__(bind, expire_on_commit=expire_on_commit)


async def test_init_that_takes_too_little(sqlite_url: str) -> None:
    """A class that cannot be made is refused where its engine is bound."""
    _, db = create_middleware_and_session_proxy(Strict)
    with pytest.raises(ConfigurationError, match=r"Strict: .* 'close_resets_only': .* take \*\*kwargs\."):
        db.bind(create_async_engine(sqlite_url))


def test_sqlmodel_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed SQLModel that is broken is a `ConfigurationError` that names the way out."""
    package = tmp_path / "sqlmodel"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # pyright: ignore[reportUnknownMemberType]  # pytest's
    for name in [name for name in sys.modules if name.partition(".")[0] == "sqlmodel"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    _, db = create_middleware_and_session_proxy()
    with pytest.raises(ConfigurationError, match=r"cannot be imported \(.*no_such_module.*\): repair or"):
        db.bind(create_async_engine("sqlite+aiosqlite://"))
    _, chosen = create_middleware_and_session_proxy(AsyncSession)
    chosen.bind(create_async_engine("sqlite+aiosqlite://"))
    assert isinstance(chosen, SessionProxy)
