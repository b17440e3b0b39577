"""Messages in any order: what a scripted application sends and writes, against a model of the contract.

The model is plain Python and follows the lifecycle contract, "A request", rows 3, 4, 6 and 8. ASGI allows one
order of messages; about the others the contract says little, and then only the invariants are asserted: the
row is there once or not at all, every message is forwarded, nothing hangs, nothing is left open.
"""

import asyncio
import copy
import itertools
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from typing import Any, Literal

import pytest
from attrs import Factory, define, frozen
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import make_url, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapped, mapped_column
from starlette.types import Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    MissingSessionError,
    SessionProxy,
    SQLAlchemyMiddleware,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.site import checked_out
from tests.support.tables import ORPHAN, Base, Reply, engine_with_tables

EXAMPLES = max(150, int(os.environ.get("MODEL_EXAMPLES", "0")))
RECORDED = pytest.mark.filterwarnings("ignore:record_property is incompatible:pytest.PytestWarning")
"""pytest writes properties of a test into every report, and warns of them if its schema is the strict one."""


class Numbered(Base):
    """A row of which a second copy is accepted, so that one that is committed twice is seen."""

    __tablename__ = "numbered"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


# What the application does.


Work = Literal["write", "add", "read", "orphan", "commit", "raise"]
"""`add` leaves its row to the next flush; `orphan` is a row that makes COMMIT fail."""


@frozen
class Step:
    """One thing that the application does: a piece of work, or a message to send."""

    work: Work | None = None
    message: str = ""
    status: int = 200
    more: bool = False
    handling: bool = False
    """It is sent while an exception is being handled."""

    def made(self) -> Message:
        """Return the message."""
        kind = f"http.response.{self.message}"
        if self.message == "start":
            return {"type": kind, "status": self.status, "headers": [(b"x", b"y")], "trailers": self.more}
        if self.message in {"body", "zerocopysend"}:
            content = {"body": b"some"} if self.message == "body" else {"file": 0, "count": 4}
            return {"type": kind, **content, **({"more_body": True} if self.more else {})}
        return {"type": kind, "path": "/dev/null", "headers": [], "links": [], "info": {}}


Rule = Callable[[int, BaseException | None], bool]
RULES: dict[str, Rule | None] = {
    "none": None,
    "always": lambda status, error: True,
    "never": lambda status, error: False,
    "errors alone": lambda status, error: status >= 400 or error is not None,
}


@frozen
class Script:
    """An application, and how the middleware around it is told to commit."""

    steps: tuple[Step, ...]
    commit_on_exit: bool
    rule: str
    swallows: bool
    """Errors of sending are swallowed, and the script goes on."""
    gone_from: int
    """Where the client leaves: with which message."""


STARTS = st.builds(
    Step,
    message=st.just("start"),
    status=st.sampled_from([200, 200, 302, 404, 500]),
    more=st.booleans(),
    handling=st.sampled_from([False, False, False, True]),
)
BODIES = st.builds(Step, message=st.sampled_from(["body", "zerocopysend"]), more=st.booleans())
LAST = st.builds(Step, message=st.sampled_from(["body", "body", "pathsend", "zerocopysend"]))
EARLY = st.builds(Step, message=st.sampled_from(["early_hint", "debug", "push"]))
LATE = st.builds(Step, message=st.sampled_from(["trailers", "push"]))
ANY = st.one_of(STARTS, BODIES, LAST, EARLY, LATE)
WORK = st.builds(
    Step, work=st.sampled_from(["write", "write", "write", "add", "read", "commit", "orphan", "raise"])
)


@st.composite
def messages(draw: st.DrawFn) -> list[Step]:
    """Draw messages: in the order that ASGI allows, nearly so, or in any order."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.lists(ANY, max_size=6))
    order = [
        *draw(st.lists(EARLY, max_size=1)),
        draw(STARTS),
        *[Step(message="body", more=True)] * draw(st.integers(0, 2)),
        draw(LAST),
        *draw(st.lists(LATE, max_size=1)),
    ]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, max(0, len(order) - 1)))
        match draw(st.sampled_from(["drop", "double", "insert"])):
            case "drop":
                del order[at : at + 1]
            case "double":
                order[at:at] = order[at : at + 1]
            case _:
                order.insert(at, draw(ANY))
    return order


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Draw an application."""
    steps: list[Step] = []
    for message in [*draw(messages()), None]:
        steps += draw(st.lists(WORK, max_size=2))
        if message is not None:
            steps.append(message)
    return Script(
        steps=tuple(steps),
        commit_on_exit=draw(st.booleans()),
        rule=draw(st.sampled_from(["none", "none", "none", *RULES])),
        swallows=draw(st.booleans()),
        gone_from=draw(st.integers(0, 4)),
    )


# The server.


@define(eq=False)
class Server:
    """Notes every message, and answers it as one kind of server does."""

    kind: str
    gone_from: int
    at_first_start: Callable[[], None]
    seen: list[Message] = Factory(list[Message])
    errors: list[Exception] = Factory(list[Exception])
    started: bool = False
    ended: bool = False

    async def send(self, message: Message) -> None:
        """Take a message, or refuse it."""
        kind = message["type"].removeprefix("http.response.")
        if kind == "start" and all("status" not in earlier for earlier in self.seen):
            self.at_first_start()
        self.seen.append(message)
        if self.kind == "uvicorn" and not self.allowed(kind):
            self.refuse(RuntimeError(f"Unexpected ASGI message {kind!r}"))
        if self.kind == "client gone" and len(self.seen) > self.gone_from:
            self.refuse(OSError("the client has gone"))
        self.started = self.started or kind == "start"
        if kind == "pathsend" or (kind in {"body", "zerocopysend"} and not message.get("more_body")):
            self.ended = True

    def refuse(self, error: Exception) -> None:
        """Raise an error that is found again."""
        self.errors.append(error)
        raise error

    def allowed(self, kind: str) -> bool:
        """Tell whether a message is in order."""
        if not self.started:
            return kind in {"start", "early_hint", "debug", "push"}
        return kind in ({"trailers"} if self.ended else {"body", "zerocopysend", "pathsend", "push"})


# The model.


@define(eq=False)
class Model:
    """What the contract says of one request; None is where it says nothing."""

    script: Script
    pending: list[int] = Factory(list[int])
    """Rows of the transaction at hand."""
    committed: set[int] = Factory(set[int])
    open: set[int] = Factory(set[int])
    """Rows of which the contract does not tell."""
    orphan: bool | None = False
    """Whether the next COMMIT fails."""
    started: bool = False
    abandoned: bool = False
    complete: bool | None = False
    """Whether the last body message went out."""

    @property
    def rule(self) -> Rule | None:
        """The caller's own rule."""
        return RULES[self.script.rule]

    def decide(self, *, commit: bool | None) -> bool | None:
        """End the transaction; returns whether that fails. None is for an outcome that is not told."""
        failed = self.orphan if commit is None else commit and self.orphan
        if commit is None or (commit and self.orphan is None):
            self.open.update(self.pending)
            failed = None if self.orphan is not False else failed
        elif commit and not self.orphan:
            self.committed.update(self.pending)
        self.pending.clear()
        self.orphan = False
        return failed

    def start(self, status: int, error: BaseException | None) -> bool | None:
        """Settle the unit, row 3; returns whether COMMIT fails, row 4."""
        if self.started:
            return False  # what came after the first start is settled when the application returns, row 6
        self.started = True
        if self.rule is not None:
            return self.decide(commit=self.rule(status, error))
        if status >= 400 or error is not None:
            return self.decide(commit=False)
        return self.decide(commit=True) if self.script.commit_on_exit else False

    def sent(self, message: Message, *, refused: bool) -> None:
        """Note the last body message."""
        kind = message["type"].removeprefix("http.response.")
        last = kind == "pathsend" or (kind in {"body", "zerocopysend"} and not message.get("more_body"))
        if last and not refused and not self.complete:
            self.complete = True if self.started else None  # nothing is said of a body without a start

    def returned(self) -> bool | None:
        """Settle the tail of an application that has returned, row 6; returns whether COMMIT fails."""
        if self.abandoned or self.complete is False:
            return self.decide(commit=False)
        if self.rule is not None:
            return self.decide(commit=None)  # nothing is said of a rule and the tail
        if not self.script.commit_on_exit:
            return self.decide(commit=False)
        return self.decide(commit=True if self.complete else None)


# The two together.


class BoomError(Exception):
    """The error of the application's own."""


Pair = tuple[type[SQLAlchemyMiddleware[AsyncSession]], SessionProxy[AsyncSession]]


@define(eq=False)
class Bench:
    """One database and one pair for many examples."""

    engine: AsyncEngine
    pair: Pair
    judge: sqlite3.Connection
    numbers: "itertools.count[int]" = Factory(itertools.count)
    tally: Counter[str] = Factory(Counter[str])

    def rows(self, first: int) -> list[int]:
        """Return the rows from this number on, as another connection sees them."""
        found = self.judge.execute("SELECT number FROM numbered WHERE number >= ? ORDER BY number", (first,))
        return [number for (number,) in found.fetchall()]

    async def try_one(self, script: Script, kind: str) -> None:
        """Run one example; whatever hangs is cut off."""
        run = Run(self, script, kind, next(self.numbers))
        async with asyncio.timeout(30):
            await run.check()
        self.tally["examples"] += 1


@asynccontextmanager
async def open_bench(url: str) -> AsyncGenerator[Bench]:
    """Make the tables, and open the judge's connection."""
    path = make_url(url).database
    assert path is not None
    async with engine_with_tables(url) as engine:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.tables["numbered"].create)
        with closing(sqlite3.connect(path, isolation_level=None)) as judge:
            yield Bench(engine, create_middleware_and_session_proxy(AsyncSession), judge)


@contextmanager
def runner_and_bench(url: str) -> Generator[tuple[asyncio.Runner, Bench]]:
    """Keep one event loop, and a bench in it, for all examples of a test."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def enter() -> Bench:
            return await stack.enter_async_context(open_bench(url))

        bench = runner.run(enter())
        try:
            yield runner, bench
        finally:
            runner.run(stack.aclose())


@define(eq=False)
class Run:
    """One request: the scripted application, the server and the model."""

    bench: Bench
    script: Script
    kind: str
    first: int
    model: Model = Factory(lambda self: Model(self.script), takes_self=True)
    server: Server = Factory(
        lambda self: Server(self.kind, self.script.gone_from, self.at_first_start), takes_self=True
    )
    expected: list[Message] = Factory(list[Message])
    unit: UnitOfWork[AsyncSession] | None = None
    failure: Exception | None = None
    """Why the response was abandoned."""
    own: Exception | None = None
    """What left the application."""
    problem: AssertionError | None = None

    def at_first_start(self) -> None:
        """See that the unit is settled before the start is forwarded."""
        assert self.bench.rows(self.first) == sorted(self.model.committed)
        if not self.model.pending and self.model.orphan is False:
            assert checked_out(self.bench.engine.pool) == 0

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do what the script says."""
        self.unit = self.bench.pair[1].unit
        try:
            for step in self.script.steps:
                if step.work is not None:
                    await self.work(step.work)
                else:
                    await self.send(step, send)
        except AssertionError as problem:
            self.problem = problem
            raise
        except Exception as error:
            self.own = error
            raise

    async def work(self, work: Work) -> None:
        """Do a piece of work."""
        session, model = self.bench.pair[1].session, self.model
        if work == "raise":
            raise BoomError
        if work == "read":
            await session.scalar(select(Numbered.id).limit(1))
        elif work == "commit":
            fails = model.decide(commit=True)
            try:
                await session.commit()
            except IntegrityError:
                assert fails is not False
                raise
            assert fails is not True
        elif work == "orphan":
            session.add(Reply(**ORPHAN))
            await session.flush()
            model.orphan = True
        else:
            number = next(self.bench.numbers)
            session.add(Numbered(number=number))
            model.pending.append(number)
            if work == "write":
                await session.flush()

    async def send(self, step: Step, send: Send) -> None:
        """Send a message, in the `except` block of an error if it is the answer to one."""
        if not step.handling:
            await self.send_message(step.made(), None, send)
            return
        try:
            boom()
        except BoomError as error:
            await self.send_message(step.made(), error, send)

    async def send_message(self, message: Message, error: BaseException | None, send: Send) -> None:
        """Send a message, and compare what comes of it."""
        model, original = self.model, copy.deepcopy(message)
        if model.abandoned:
            before = len(self.server.seen)
            await send(message)
            assert len(self.server.seen) == before
            return
        fails = model.start(message["status"], error) if "status" in message else False
        refusals = len(self.server.errors)
        failure = await attempt(message, send)
        if isinstance(failure, IntegrityError):
            assert fails is not False
            self.failure, model.abandoned = failure, True
            model.decide(commit=False)
            self.bench.tally["abandoned"] += 1
        else:
            assert fails is not True
            assert self.server.errors[refusals:] == ([] if failure is None else [failure])
            self.note_sent(original)
            model.sent(original, refused=failure is not None)
            self.bench.tally["refused"] += failure is not None
        if failure is not None and not self.script.swallows:
            raise failure

    def note_sent(self, message: Message) -> None:
        """See that the message is with the server now, as it was."""
        self.expected.append(message)
        assert self.server.seen == self.expected

    async def check(self) -> None:
        """Serve the request, and compare its end."""
        middleware, db = self.bench.pair
        rule: Any = RULES[self.script.rule]
        app = middleware(
            self.application,
            custom_engine=self.bench.engine,
            commit_on_exit=self.script.commit_on_exit,
            commit_when=rule,
        )
        scope: Scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "path": "/"}
        raised: Exception | None = None
        try:
            await app(scope, receive, self.server.send)
        except Exception as error:  # noqa: BLE001  # compared below
            raised = error
        if self.problem is not None:
            raise self.problem
        self.check_error(raised)
        self.check_rows()
        assert self.server.seen == self.expected
        assert self.unit is not None
        assert self.unit.closed
        assert checked_out(self.bench.engine.pool) == 0
        with pytest.raises(MissingSessionError, match=r"has no unit of work here"):
            _ = db.unit

    def check_error(self, raised: Exception | None) -> None:
        """See that the commit's error, the application's or the server's has gone on unchanged."""
        if self.own is not None or self.failure is not None:
            self.model.decide(commit=False)
            self.bench.tally["failed"] += 1
            assert raised is (self.own if self.failure is None else self.failure)
            return
        fails = self.model.returned()
        if raised is None:
            assert fails is not True
        else:
            assert isinstance(raised, IntegrityError)
            assert fails is not False
            self.bench.tally["failed in the tail"] += 1

    def check_rows(self) -> None:
        """See that the rows of the contract are there, once, and no others."""
        rows, model = self.bench.rows(self.first), self.model
        assert len(set(rows)) == len(rows)
        assert set(rows) - model.open == model.committed
        assert not model.committed & model.open
        self.bench.tally["committed"] += len(model.committed)
        self.bench.tally["not told"] += len(model.open)
        self.bench.tally["given up"] += next(self.bench.numbers) - self.first - 1 - len(rows)


def boom() -> None:
    """Fail."""
    raise BoomError


async def attempt(message: Message, send: Send) -> Exception | None:
    """Send a message; returns the error of doing so."""
    try:
        await send(message)
    except (IntegrityError, OSError, RuntimeError) as error:
        return error
    return None


async def receive() -> Message:
    """Give the request's end."""
    return {"type": "http.request", "body": b"", "more_body": False}


START = Step(message="start")
BODY = Step(message="body")
WRITE = Step(work="write")
ORPHANED = Step(work="orphan")
ABANDONED = Script(
    (WRITE, ORPHANED, START, BODY, WRITE), commit_on_exit=True, rule="none", swallows=True, gone_from=9
)
FAILING_TAIL = Script(
    (WRITE, START, BODY, WRITE, ORPHANED), commit_on_exit=True, rule="none", swallows=True, gone_from=9
)
EVERY_KIND = {"examples", "committed", "given up", "abandoned", "failed", "failed in the tail"}
"""What some of the examples have come to."""


@RECORDED
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["takes everything", "uvicorn", "client gone"])
def test_messages_in_any_order(
    sqlite_url: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """Whatever an application sends, no commit is lost or made twice, no message held, nothing left open."""
    with runner_and_bench(sqlite_url) as (runner, bench):

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(scripts())
        @example(ABANDONED)
        @example(FAILING_TAIL)
        def examples(script: Script) -> None:
            runner.run(bench.try_one(script, kind))

        examples()
    for name, number in bench.tally.items():
        record_property(name, number)
    assert {name for name, number in bench.tally.items() if number} >= EVERY_KIND
    assert bool(bench.tally["refused"]) == (kind != "takes everything")


# What the examples have found.


END_BY_EXTENSION = (START, WRITE, Step(message="zerocopysend"), WRITE)


def test_zero_copy_send_ends_a_response(sqlite_url: str) -> None:
    """A file that is sent by its descriptor, and of which no more is to come, is a last body message."""
    with runner_and_bench(sqlite_url) as (runner, bench):
        script = Script(END_BY_EXTENSION, commit_on_exit=True, rule="none", swallows=False, gone_from=0)
        runner.run(bench.try_one(script, "takes everything"))
        assert bench.rows(0) == [1, 2]


REFUSED = {
    "the client has gone": ("client gone", (START, BODY, WRITE)),
    "the client has gone, and a file": ("client gone", (START, Step(message="pathsend"), WRITE)),
    "before the start": ("uvicorn", (BODY, START, WRITE)),
    "before the start, a file": ("uvicorn", (Step(message="pathsend"), START, WRITE)),
}
"""Kinds of servers, and orders in which they refuse the last body message."""


@pytest.mark.parametrize("name", REFUSED)
def test_last_body_that_was_refused(sqlite_url: str, name: str) -> None:
    """A last body message that the server has refused has not gone out, and the tail is rolled back."""
    kind, steps = REFUSED[name]
    with runner_and_bench(sqlite_url) as (runner, bench):
        script = Script(steps, commit_on_exit=True, rule="none", swallows=True, gone_from=1)
        runner.run(bench.try_one(script, kind))
        assert bench.rows(0) == []


SECOND_STARTS = [Step(message="start", status=status) for status in (200, 404)]


@pytest.mark.parametrize("second", SECOND_STARTS, ids=["200", "404"])
def test_second_start_takes_nothing_back(sqlite_url: str, second: Step) -> None:
    """What the first start has committed stays, whatever a second one says, and is not written again."""
    with runner_and_bench(sqlite_url) as (runner, bench):
        script = Script(
            (WRITE, START, second, BODY), commit_on_exit=True, rule="none", swallows=True, gone_from=0
        )
        for kind in ("takes everything", "uvicorn"):
            runner.run(bench.try_one(script, kind))
        assert bench.rows(0) == [1, 4]
