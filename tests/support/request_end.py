"""Ways to learn that a request has ended, and to cancel one."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Returned:
    """Tells when the application has returned."""

    def __init__(self, app: ASGIApp, event: asyncio.Event) -> None:
        self.app = app
        self.event = event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the application, and tell."""
        try:
            await self.app(scope, receive, send)
        finally:
            if scope["type"] == "http":
                self.event.set()


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
LAST: Message = {"type": "http.response.body", "body": b"last"}
