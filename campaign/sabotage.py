"""Packages that are broken on purpose, each where one kind of route would not have noticed before."""

from collections.abc import Callable
from typing import Final

SABOTAGE: Final[dict[str, Callable[[], None]]] = {}
