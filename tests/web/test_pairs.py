"""Two pairs in one application, on every combination of two databases and their drivers."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    EngineAlreadyBoundError,
    MissingSessionError,
    PartialCommitError,
)
from tests.support.gate import closed, gate_of, passing
from tests.support.pairs import ON_COMMIT, Pair, Side, app_of, every_combination, id_of
from tests.support.serving import asgi_client


@pytest.fixture
async def bound(pair: Pair) -> AsyncIterator[Pair]:
    """The two databases, in use without an application."""
    for side in pair.sides:
        side.db.bind(side.engine)
    yield pair
    for side in pair.sides:
        side.db.unbind()


# Each has its own, and they share the request's fate.


@every_combination
async def test_both_commit(pair: Pair) -> None:
    """A 2xx commits both, each by its own session on its own pool; the inner middleware's is first."""
    app, seen = pair.app(), list[object]()

    @app.post("/", status_code=201)
    async def write() -> list[str]:
        for side in (pair.outer, pair.inner):
            side.db.unit.on_commit(partial(look, side))
        await pair.add("both")
        assert pair.checked_out() == [1, 1]
        assert [side.db.engine for side in pair.sides] == [side.engine for side in pair.sides]
        return [type(side.db.session).__name__ for side in pair.sides]

    async def look(side: Side) -> None:
        seen.append((side.label, *await pair.notes()))

    async with asgi_client(app) as client:
        response = await client.post("/")
    assert (response.status_code, response.json()) == (201, ["InnerSession", "OuterSession"])
    assert seen == [(pair.inner.label, ["both"], []), (pair.outer.label, ["both"], ["both"])]
    assert pair.checked_out() == [0, 0]


@every_combination
@pytest.mark.parametrize("way", ["returned", "raised", "crashed", "mapped"])
async def test_both_roll_back(pair: Pair, way: str) -> None:
    """A status from 400 on, an error, and an error that a handler answers with 200 undo both."""
    app = pair.app()

    @app.get("/")
    async def fail() -> JSONResponse:
        await pair.add("neither")
        if way == "returned":
            return JSONResponse("no", status_code=422)
        if way == "raised":
            raise HTTPException(409)
        raise ZeroDivisionError if way == "crashed" else LookupError

    @app.exception_handler(LookupError)
    async def answer(request: Request, error: LookupError) -> JSONResponse:
        return JSONResponse("nothing found", status_code=200)

    async with asgi_client(app, raise_app_exceptions=False) as client:
        status = (await client.get("/")).status_code
    assert status == {"returned": 422, "raised": 409, "crashed": 500, "mapped": 200}[way]
    assert await pair.notes() == ([], [])


@every_combination
async def test_untouched_database_gets_no_connection(pair: Pair) -> None:
    """A request that uses one database, or none, checks nothing out of the other's pool."""
    app, used = pair.app(), list[Side]()

    def note(side: Side, *_: object) -> None:
        used.append(side)

    for side in pair.sides:
        event.listen(side.engine.sync_engine, "checkout", partial(note, side))

    @app.get("/{name}")
    async def write(name: str) -> str:
        for side in pair.sides:
            if side.session_class.__name__ == name:
                await side.add("mine")
        return "done"

    async with asgi_client(app) as client:
        for name, expected in (("none", []), ("InnerSession", [pair.inner]), ("OuterSession", [pair.outer])):
            used.clear()
            assert (await client.get(f"/{name}")).status_code == 200
            assert used == expected
    assert await pair.notes() == (["mine"], ["mine"])


@every_combination
async def test_each_pair_keeps_its_own_arguments(pair: Pair) -> None:
    """One side commits on exit and the other does not, whichever is inside."""

    def route(committing: Side, reading: Side) -> Callable[[], Awaitable[list[str]]]:
        async def write() -> list[str]:
            await committing.add("committed")
            await reading.read()
            return [side.db.session.info["of"] for side in pair.sides]

        return write

    for committing, reading in (pair.sides, pair.sides[::-1]):
        inner, outer = (
            side.mounted(commit_on_exit=side is committing, session_args={"info": {"of": side.label}})
            for side in pair.sides
        )
        app = app_of(outer, inner)
        app.add_api_route("/", route(committing, reading))
        async with asgi_client(app) as client:
            assert (await client.get("/")).json() == [side.label for side in pair.sides]
    assert await pair.notes() == (["committed"], ["committed"])


@every_combination
async def test_second_engine_on_a_live_proxy_is_refused(pair: Pair) -> None:
    """The other side's engine is refused while a proxy has its own, which goes on serving."""
    app = pair.app()

    @app.get("/")
    async def write() -> str:
        await pair.add("both")
        return "done"

    async with asgi_client(app) as client:
        for side, other in (pair.sides, pair.sides[::-1]):
            with pytest.raises(
                EngineAlreadyBoundError, match=rf"^{side.session_class.__name__} .*its own pair"
            ):
                side.db.bind(other.engine)
            with pytest.raises(
                EngineAlreadyBoundError, match=rf"^{side.session_class.__name__} .*its own pair"
            ):
                await asgi_client(app_of(side.mounted(custom_engine=other.engine))).__aenter__()
        assert (await client.get("/")).status_code == 200
    assert await pair.notes() == (["both"], ["both"])


# Mounted applications, and several in one process.


@every_combination
async def test_both_pairs_on_a_mounted_application_too(pair: Pair) -> None:
    """A mounted application with both pairs the other way round has its own units and its own order."""
    sub = app_of(pair.inner.mounted(), pair.outer.mounted())
    app, order = pair.app(sub=sub), list[str]()

    async def write(broken: bool = False) -> str:  # noqa: FBT001, FBT002  # a query parameter
        for side in pair.sides:
            side.db.unit.on_commit(partial(order.append, side.session_class.__name__))
        await pair.add(f"note {len(order)}")
        if broken:
            pair.inner.break_commit()  # in the mounted application the outer one
        return "written"

    app.add_api_route("/", write)
    sub.add_api_route("/", write)

    @sub.exception_handler(PartialCommitError)
    async def answer(request: Request, error: PartialCommitError) -> JSONResponse:
        return JSONResponse([*error.committed, error.failed], status_code=503)

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == "written"
        assert (await client.get("/sub/")).json() == "written"
        response = await client.get("/sub/?broken=true")
    assert order == ["InnerSession", "OuterSession", "OuterSession", "InnerSession", "OuterSession"]
    assert response.status_code == 503
    assert [name.partition(" ")[0] for name in response.json()] == ["OuterSession", "InnerSession"]
    assert await pair.notes() == (["note 0", "note 2"], ["note 0", "note 2", "note 4"])


@every_combination
async def test_mounted_applications_with_a_pair_each(bound: Pair) -> None:
    """Mounted side by side, each application reaches its own database and is told that it has no other."""
    apps = {"inner": app_of(bound.inner.mounted()), "outer": app_of(bound.outer.mounted())}
    for app, side, other in zip(apps.values(), bound.sides, bound.sides[::-1], strict=True):

        def route(side: Side = side, other: Side = other) -> Callable[[], Awaitable[str]]:
            async def write() -> str:
                await side.add("mine")
                with pytest.raises(MissingSessionError, match=other.session_class.__name__):
                    _ = other.db.session
                return "written"

            return write

        app.add_api_route("/", route())
    async with asgi_client(app_of(**apps)) as client:
        for name in apps:
            assert (await client.get(f"/{name}/")).json() == "written"
    assert await bound.notes() == (["mine"], ["mine"])


@every_combination
async def test_two_applications_with_both_pairs(pair: Pair) -> None:
    """Two applications share both pairs, in another order each; one goes on when the other has stopped."""
    apps = {"first": pair.app(), "second": app_of(pair.inner.mounted(), pair.outer.mounted())}
    order: dict[str, list[str]] = {name: [] for name in apps}
    for name, app in apps.items():

        def route(name: str = name) -> Callable[[], Awaitable[str]]:
            async def write() -> str:
                for side in pair.sides:
                    side.db.unit.on_commit(partial(order[name].append, side.session_class.__name__))
                await pair.add(f"{name} {len(order[name])}")
                return "written"

            return write

        app.add_api_route("/", route())
    async with asgi_client(apps["second"]) as second:
        async with asgi_client(apps["first"]) as first:
            responses = [*await asyncio.gather(first.get("/"), second.get("/"))]
        responses.append(await second.get("/"))
    assert [response.status_code for response in responses] == [200] * 3
    assert order["first"] == ["InnerSession", "OuterSession"]
    assert order["second"] == ["OuterSession", "InnerSession"] * 2
    assert await pair.notes() == (["first 0", "second 0", "second 2"],) * 2


# Units beside a request's.


@every_combination
async def test_nested_explicit_units(bound: Pair) -> None:
    """Of two nested blocks each has its own outcome; an error undoes those that it leaves."""
    inner, outer = bound.inner.db, bound.outer.db
    async with outer(commit_on_exit=True) as around:
        async with inner(commit_on_exit=True) as within:
            assert (outer.unit, inner.unit) == (around, within)
            await bound.add("1 both")
        assert await bound.notes() == (["1 both"], [])

    async def write(note: str, broken: Side | None = None, error: Exception | None = None) -> None:
        async with inner(commit_on_exit=True):
            await bound.add(note)
            if broken is not None:
                broken.break_commit()
            if error is not None:
                raise error

    async with outer(commit_on_exit=True):
        with pytest.raises(LookupError, match="inside"):
            await write("2 outer", error=LookupError("inside"))
    with pytest.raises(LookupError, match="after"):  # noqa: PT012  # the block that the error leaves
        async with outer(commit_on_exit=True):
            await write("3 inner")
            message = "after"
            raise LookupError(message)
    with pytest.raises(DBAPIError, match=ON_COMMIT):  # as above
        async with outer(commit_on_exit=True):
            await write("4 neither", broken=bound.inner)
    assert await bound.notes() == (["1 both", "3 inner"], ["1 both", "2 outer"])
    assert bound.checked_out() == [0, 0]


@every_combination
@pytest.mark.parametrize("gathering", ["inner", "outer"])
async def test_gather_on_one_while_the_other_is_open(pair: Pair, gathering: str) -> None:
    """Gathered units of one database have outcomes of their own; the other's open unit is theirs to see."""
    app = pair.app()
    many, one = pair.sides if gathering == "inner" else pair.sides[::-1]

    async def work(number: int, unit: object) -> int:
        assert one.db.unit is unit
        await many.add(f"gathered {number}")
        if number == 1:
            raise LookupError
        return number

    @app.get("/")
    async def write() -> list[str]:
        await one.add("open")
        unit = one.db.unit
        results = await many.db.gather(
            *(work(number, unit) for number in range(4)), max_concurrent=2, return_exceptions=True
        )
        assert await one.read() == ["open"]
        return [repr(result) for result in results]

    async with asgi_client(app) as client:
        assert (await client.get("/")).json() == ["0", "LookupError()", "2", "3"]
    assert await one.notes() == ["open"]
    assert await many.notes() == ["gathered 0", "gathered 2", "gathered 3"]


@pytest.mark.parametrize("kinds", [("sqlite", "postgresql"), ("postgresql", "aiomysql")], ids=id_of)
async def test_gathered_on_one_share_the_other(bound: Pair) -> None:
    """Gathered units of one database that use the other's session at once are refused by the other's name."""
    inner, outer = bound.sides
    gate = gate_of(outer.engine, outer.judge)

    async def wait() -> None:
        await inner.read()
        await outer.db.session.execute(passing(gate))

    async def intrude() -> None:
        await inner.read()
        await gate.reached()
        try:
            await outer.read()
        finally:
            await gate.open()

    async with outer.db(), closed(gate):
        nobody, refused = await inner.db.gather(wait(), intrude(), return_exceptions=True)
    assert nobody is None
    assert isinstance(refused, ConcurrentUseError)
    named = (
        rf"^task '.+' called execute\(\) on a session of {re.escape(outer.label)}.+\) on which task '.+' is "
    )
    assert re.match(named, str(refused))
    assert inner.label not in str(refused)
