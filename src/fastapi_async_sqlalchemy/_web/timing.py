"""``Server-Timing``: the database's part of a request, for the network panel of a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field

from .request import RequestUnit

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from .._telemetry.meter import UnitMeter


@define(eq=False, repr=False, weakref_slot=False)
class TimedRequestUnit(RequestUnit):
    """A request's unit that adds its times to the response."""

    _plain_forward: Send = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._plain_forward, self._forward = self._forward, self._forward_timed

    async def _forward_timed(self, message: Message) -> None:
        """Pass a message on; add the header to the response's start if the unit has a session."""
        meter: UnitMeter | None = getattr(self, "_meter", None)
        if meter is not None and message["type"] == "http.response.start":
            header = (b"server-timing", _timing(meter).encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await self._plain_forward(message)


def _timing(meter: UnitMeter) -> str:
    """Return the header's value; a browser takes milliseconds."""
    stats = meter.unit.stats
    return (
        f'db;dur={meter.held() * 1e3:.1f};desc="{stats.statements} statements", '
        f"db-wait;dur={stats.waited * 1e3:.1f}, db-commit;dur={stats.committing * 1e3:.1f}"
    )
