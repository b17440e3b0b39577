"""Cancelling a coroutine at one of its await points, and calling an application as a server would."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Generator
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from attrs import Factory, define
from starlette.types import ASGIApp, Message

T = TypeVar("T")

Moment = Literal["waiting", "done"]
"""When to cancel: while the future is pending, or when it is done and its result has not been taken yet."""


@define(eq=False)
class Interrupted(Generic[T]):
    """Awaits a coroutine and calls `cancel` at the chosen suspensions, counted from 1.

    A suspension is a future that the coroutine waits for. The cancellation is a real one, and reaches that
    very future: `cancel` is called just before the task begins to wait for it, or just before it is woken.
    """

    coroutine: Coroutine[Any, Any, T]
    at: Collection[int]
    cancel: Callable[[], object]
    moment: Moment = "waiting"
    suspensions: int = 0
    cancellations: int = 0

    def __await__(self) -> Generator[Any, Any, T]:
        step: Callable[[], Any] = partial(self.coroutine.send, None)
        while True:
            try:
                future = step()
            except StopIteration as stop:
                result: T = stop.value
                return result
            self.suspensions += 1
            if self.suspensions in self.at:
                self.cancellations += 1
                if self.moment == "done" and future is not None:
                    future.add_done_callback(self._call)
                else:
                    self.cancel()
            try:
                value = yield future
            except BaseException as error:  # noqa: BLE001  # handed on to the coroutine, as await would
                step = partial(self.coroutine.throw, error)
            else:
                step = partial(self.coroutine.send, value)

    def _call(self, _: object) -> None:
        self.cancel()


@define(eq=False)
class Exchange:
    """One GET as a server sees it: what the application has sent so far, and when the client leaves."""

    path: str
    spec_version: str = "2.4"
    status: int | None = None
    body: bytes = b""
    complete: bool = False
    gone: asyncio.Event = Factory(asyncio.Event)
    _asked: bool = False

    async def call(self, app: ASGIApp) -> None:
        """Call the application; it returns when the application does."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": self.spec_version},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "client": ("127.0.0.1", 1),
            "server": ("testserver", 80),
            "state": {},
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
