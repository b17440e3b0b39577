"""`@db.transactional`: a function in a unit of work."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    Propagation,
    PropagationError,
    SessionProxy,
    UnexpectedRollbackError,
    UnitOfWork,
)
from tests.support.dependency import needs_function_scope
from tests.support.serving import asgi_client
from tests.support.site import Site
from tests.support.stage import DOOMED, NONE_OPEN, ONE_OPEN, BoomError, Stage, add
from tests.support.tables import Note

Db = SessionProxy[AsyncSession]
Unit = UnitOfWork[AsyncSession]
ALL: tuple[Propagation, ...] = ("requires_new", "required", "nested", "mandatory", "never")
Options = dict[str, Any]
Function = Callable[..., Any]


def bare(db: Db, function: Function) -> Function:
    """Decorate by `@db.transactional`."""
    return db.transactional(function)


def called(db: Db, function: Function) -> Function:
    """Decorate by `@db.transactional()`."""
    return db.transactional()(function)


@pytest.mark.parametrize("decorate", [bare, called])
async def test_transactional_commits_when_it_returns(
    stage: Stage, decorate: Callable[[Db, Function], Function]
) -> None:
    """A transactional function runs in a unit, which is committed before its caller has the result."""

    async def write(note: str, *, twice: bool) -> str:
        await add(stage.db, note * 2 if twice else note)
        return note

    write = decorate(stage.db, write)

    async def act() -> None:
        assert await write("a", twice=True) == "a"
        assert await stage.site.notes() == ["aa"]
        assert await write("b", twice=False) == "b"

    await stage.outside(act)
    assert await stage.site.notes() == ["aa", "b"]


async def test_transactional_methods(sqlite_worker: Site) -> None:
    """A method of any kind runs in a unit: the decorator stands below `@classmethod` and `@staticmethod`."""
    db = sqlite_worker.db

    class Notes:
        @db.transactional
        async def write(self, note: str) -> None:
            await add(db, note)

        @classmethod
        @db.transactional
        async def of_class(cls, note: str) -> str:
            await add(db, note)
            return cls.__name__

        @staticmethod
        @db.transactional
        async def static(note: str) -> None:
            await add(db, note)

    await Notes().write("a")
    assert await Notes.of_class("b") == "Notes"
    await Notes.static("c")
    assert await sqlite_worker.notes() == ["a", "b", "c"]
    kinds: list[Any] = [classmethod, staticmethod]
    for kind in kinds:
        with pytest.raises(
            ConfigurationError, match=rf"^transactional is for coroutine .*<{kind.__name__}\("
        ):
            bare(db, kind(add))


@pytest.mark.parametrize("decorate", [bare, called])
async def test_transactional_rolls_back(worker: Site, decorate: Callable[[Db, Function], Function]) -> None:
    """An error that leaves a transactional function rolls back and goes on as it is."""
    error = BoomError("boom")

    async def fail() -> None:
        await add(worker.db, "gone")
        raise error

    with pytest.raises(BoomError, match=r"^boom$") as raised:
        await decorate(worker.db, fail)()
    assert raised.value is error
    assert worker.checked_out() == 0
    assert await worker.notes() == []


@pytest.mark.parametrize("decorate", [bare, called])
async def test_transactional_joins(stage: Stage, decorate: Callable[[Db, Function], Function]) -> None:
    """Inside a unit a transactional function joins it, and leaves the commit to its owner."""
    db = stage.db

    async def write() -> Unit:
        await add(db, "inside")
        return db.unit

    async def act(unit: Unit) -> None:
        assert await decorate(db, write)() is unit
        assert await stage.site.notes() == []

    await stage.inside(act)
    assert await stage.site.notes() == ["inside"]


async def test_transactional_failure_marks_the_unit(stage: Stage) -> None:
    """A transactional function that failed in a unit forbids its commit, whoever swallowed the error."""
    db = stage.db

    @db.transactional
    async def fail() -> None:
        await add(db, "joined")
        raise BoomError

    async def act(unit: Unit) -> None:
        with suppress(BoomError):
            await fail()

    with pytest.raises(UnexpectedRollbackError, match=DOOMED) as raised:
        await stage.inside(act)
    assert isinstance(raised.value.__cause__, BoomError)
    assert await stage.site.notes() == []


@pytest.mark.parametrize("propagation", ALL)
async def test_transactional_by_propagation_inside(worker: Site, propagation: Propagation) -> None:
    """Inside a unit each propagation does for a function what it does for a block."""
    db = worker.db

    @db.transactional(propagation=propagation)
    async def write() -> Unit:
        await add(db, "inside")
        return db.unit

    async with db(commit_on_exit=True) as unit:
        if propagation == "never":
            with pytest.raises(PropagationError, match=ONE_OPEN):
                await write()
        else:
            assert (await write() is unit) is (propagation != "requires_new")
        assert await worker.notes() == (["inside"] if propagation == "requires_new" else [])
        await add(db, "outer")
    assert await worker.notes() == ["inside", "outer"][propagation == "never" :]


@pytest.mark.parametrize("propagation", ["requires_new", "nested"])
async def test_transactional_failure_that_is_undone_alone(worker: Site, propagation: Propagation) -> None:
    """A function in a unit or savepoint of its own fails alone; the unit around it commits."""
    db = worker.db

    @db.transactional(propagation=propagation)
    async def fail() -> None:
        await add(db, "inside")
        raise BoomError

    async with db(commit_on_exit=True):
        with pytest.raises(BoomError, match=r"^$"):
            await fail()
        await add(db, "outer")
    assert await worker.notes() == ["outer"]


@pytest.mark.parametrize("propagation", ALL)
async def test_transactional_by_propagation_outside(worker: Site, propagation: Propagation) -> None:
    """Where no unit is open each propagation but `mandatory` opens one and commits it."""
    db = worker.db

    @db.transactional(propagation=propagation)
    async def write() -> None:
        await add(db, "written")

    if propagation == "mandatory":
        with pytest.raises(PropagationError, match=NONE_OPEN):
            await write()
    else:
        await write()
    assert await worker.notes() == ([] if propagation == "mandatory" else ["written"])


async def test_transactional_is_called_again_and_at_once(postgresql_worker: Site) -> None:
    """A transactional function may be called many times, in turn and at the same time: each has its unit."""
    db = postgresql_worker.db

    @db.transactional
    async def write(number: int) -> Unit:
        await add(db, f"{number}")
        return db.unit

    units = [await write(0), *await asyncio.gather(*map(write, range(1, 4)))]
    assert len(set(units)) == 4
    assert await postgresql_worker.notes() == ["0", "1", "2", "3"]


async def test_transactional_settings(worker: Site) -> None:
    """A function's settings are those of its unit: what it must not join, it does not."""
    db = worker.db

    @db.transactional(read_only=True)
    async def look() -> object:
        return await db.session.scalar(select(Note.text))

    assert await look() is None
    async with db(commit_on_exit=True):
        with pytest.raises(PropagationError, match="read_only=True was asked for"):
            await look()
    async with db(read_only=True):
        assert await look() is None


async def test_transactional_method(worker: Site) -> None:
    """Methods are decorated like functions."""
    db = worker.db

    class Notebook:
        note = "written"

        @db.transactional
        async def write(self, again: str = "") -> str:
            await add(db, self.note + again)
            return self.note

    assert await Notebook().write(" twice") == "written"
    assert await worker.notes() == ["written twice"]


@pytest.mark.parametrize("decorate", [bare, called])
def test_transactional_keeps_the_function_s_face(
    decorate: Callable[[Db, Function], Function], sqlite_worker: Site
) -> None:
    """The decorated function has the name, docstring and signature of the original, and is a coroutine's."""

    async def write(note: str, *, twice: bool = False) -> int:
        """Write a note."""
        return len(note)

    decorated = decorate(sqlite_worker.db, write)
    assert (decorated.__name__, decorated.__qualname__) == ("write", write.__qualname__)
    assert decorated.__doc__ == "Write a note."
    assert decorated.__module__ == __name__
    assert inspect.signature(decorated) == inspect.signature(write)
    assert inspect.iscoroutinefunction(decorated)


def plain() -> None:
    """Do nothing, synchronously."""


async def generator() -> AsyncIterator[int]:
    """Yield once."""
    yield 1


class Methods:
    """Methods that are not decorated right."""

    @classmethod
    async def of_class(cls) -> None:
        """Do nothing."""

    @staticmethod
    async def static() -> None:
        """Do nothing."""


class Acting:
    """An object, not a function."""

    async def __call__(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    "wrong",
    [plain, generator, Acting(), Acting, "required", 3],
    ids=["function", "generator", "object", "class", "string", "number"],
)
@pytest.mark.parametrize("decorate", [bare, called])
def test_transactional_refuses_what_is_no_coroutine_function(
    sqlite_worker: Site, decorate: Callable[[Db, Function], Function], wrong: Any
) -> None:
    """What is no coroutine function is refused where it is decorated, and shown."""
    with pytest.raises(ConfigurationError, match=r"transactional is for coroutine functions .*, not ."):
        decorate(sqlite_worker.db, wrong)


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (plain, r"write it as `async def`, or open `async with db\.begin\(\):` inside"),
        (generator, r"opens a unit itself, by `async with db\.begin\(\) as unit: yield unit`"),
        (vars(Methods)["of_class"], "write @classmethod or @staticmethod above it"),
        (vars(Methods)["static"], "write @classmethod or @staticmethod above it"),
    ],
    ids=["function", "generator", "class method", "static method"],
)
def test_transactional_says_what_to_write(sqlite_worker: Site, wrong: Any, remedy: str) -> None:
    """The error names the way to write each kind of function."""
    with pytest.raises(ConfigurationError, match=f": [^:]*{remedy}"):
        sqlite_worker.db.transactional(wrong)


@needs_function_scope
async def test_transactional_and_dependencies_without_middleware(worker: Site) -> None:
    """An endpoint joins the unit of its dependency, and one without such a dependency has its own."""
    app, db = FastAPI(), worker.db

    @db.transactional
    async def load() -> str:
        await add(db, "by a dependency")
        return "loaded"

    @app.post("/joined")
    @db.transactional
    async def joined(unit: Annotated[UnitOfWork[AsyncSession], Depends(db.unit_dependency)]) -> bool:
        await add(db, "joined")
        return unit is db.unit

    @app.post("/own")
    @db.transactional
    async def own(loaded: Annotated[str, Depends(load)]) -> str:
        await add(db, "own")
        return loaded

    async with asgi_client(app) as client:
        assert (await client.post("/joined")).json() is True
        assert (await client.post("/own")).json() == "loaded"
    assert sorted(map(str, await worker.notes())) == ["by a dependency", "joined", "own"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"isolation_level": "AUTOCOMMIT"}, "isolation_level must be one of .*'AUTOCOMMIT'"),
        ({"isolation_level": "serializable"}, "isolation_level must be one of .*'serializable'"),
        ({"read_only": "yes"}, "read_only must be True or False, not 'yes'"),
        ({"deferrable": 1}, "deferrable must be True or False, not 1"),
        ({"retries": -1}, "retries must be a whole number of at least 0, not -1"),
        ({"retries": True}, "retries must be a whole number of at least 0, not True"),
        ({"retries": "3"}, "retries must be a whole number of at least 0, not '3'"),
        ({"retries": 1, "propagation": "nested"}, "retries need a separate unit: propagation='nested'"),
        ({"retries": 1, "propagation": "mandatory"}, "retries need .*: propagation='mandatory'"),
    ],
    ids=repr,
)
def test_transactional_refuses_wrong_options(sqlite_worker: Site, options: Options, match: str) -> None:
    """A wrong value is refused where the function is decorated, by the parameter's name."""
    with pytest.raises(ConfigurationError, match=match):
        sqlite_worker.db.transactional(**options)
