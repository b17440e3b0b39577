"""An observer of the campaign's units that fails now and then: nobody else may be harmed."""

from random import Random
from typing import Any, Final

from fastapi_async_sqlalchemy import Observer

_SHARE: Final = 0.02
"""The share of the moments in which it fails."""


class Unreliable(Observer):
    """Fails at random, in whatever moment."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)  # noqa: S311  # the same failures for the same seed

    def __getattribute__(self, name: str) -> Any:
        """Return a method that may fail."""
        if name.startswith("_"):
            return super().__getattribute__(name)
        return self._perhaps_fail

    def _perhaps_fail(self, *_: object) -> None:
        if self._random.random() < _SHARE:
            message = "the observer has failed"
            raise RuntimeError(message)
