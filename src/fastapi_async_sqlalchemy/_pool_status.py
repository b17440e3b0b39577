"""The state of a connection pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import fields_dict, frozen


@frozen(kw_only=True, eq=False)
class PoolStatus(Mapping[str, str | int | float | None]):
    """A pool at one moment, in connections; None where a pool does not count.

    Also a mapping of the same names to the same values.
    """

    pool_class: str
    size: int | None = None
    """How many connections the pool keeps."""
    max_overflow: int | None = None
    """How many more it opens when those are in use; None also where there is no limit."""
    capacity: int | None = None
    """The sum of ``size`` and ``max_overflow``."""
    checked_in: int | None = None
    checked_out: int | None = None
    available: int | None = None
    """How many more can be checked out without waiting."""
    saturation: float | None = None
    """The share of the capacity that is checked out: 0 to 1."""

    def __getitem__(self, name: str) -> str | int | float | None:
        if name not in fields_dict(PoolStatus):
            raise KeyError(name)
        value: str | int | float | None = getattr(self, name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(fields_dict(PoolStatus))

    def __len__(self) -> int:
        return len(fields_dict(PoolStatus))
