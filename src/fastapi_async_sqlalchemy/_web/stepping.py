"""An awaitable that has been stepped once, to find out whether it has to wait."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

T = TypeVar("T")


class Stepped(Generic[T]):
    """A wrapper that takes an awaitable's first step immediately, in the task that creates it.

    ``done`` says whether that step was the last one. Awaiting this object takes the rest. The same task
    must do so before it awaits anything else.
    """

    __slots__ = ("_coroutine", "_result", "_waiting", "done")

    def __init__(self, awaitable: Awaitable[T]) -> None:
        self._coroutine = _result_of(awaitable)
        self._result: T
        self.done = False
        self._step(partial(self._coroutine.send, None))

    def _step(self, step: Callable[[], Any]) -> None:
        try:
            self._waiting = step()
        except StopIteration as end:
            self.done, self._result = True, end.value

    def __await__(self) -> Generator[Any, Any, T]:
        while not self.done:
            try:
                value = yield self._waiting
            except BaseException as error:  # noqa: BLE001  # passed on, as await would
                self._step(partial(self._coroutine.throw, error))
            else:
                self._step(partial(self._coroutine.send, value))
        return self._result


async def _result_of(awaitable: Awaitable[T]) -> T:
    return await awaitable
