"""The bank of the quickstart, with a payday and a page that shows each request.

The bank is in examples/quickstart.py. Here is what the page needs beside it: a response that writes after it
has started, and the timelines of the last requests.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError

from examples import quickstart
from examples.demo.timelines import StoredTimeline, Timelines, TimelinesMiddleware
from examples.quickstart import NewTransfer, refuse, send_money
from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

PAGE = Path(__file__).with_name("page.html")
SALARY = 10

payroll = APIRouter()


@payroll.post("/payday")
async def pay_salaries(seconds: Annotated[float, Query(ge=0, le=60)] = 0.5) -> StreamingResponse:
    """Pay bob, and return a stream that pays carol; its writes are committed if it is sent completely."""
    await send_money(NewTransfer(sender="alice", receiver="bob", amount=SALARY))
    return StreamingResponse(pay_carol(seconds), media_type="text/plain")


async def pay_carol(seconds: float) -> AsyncIterator[str]:
    """Write after the response has started, in the transaction of the tail."""
    yield "bob is paid\n"
    await send_money(NewTransfer(sender="alice", receiver="carol", amount=SALARY))
    yield "paying carol\n"
    await asyncio.sleep(seconds)
    yield "done\n"


def create_app(db_url: str) -> FastAPI:
    """Create the application for one database."""
    timelines = Timelines()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        timelines.watch(db.engine.sync_engine)
        async with quickstart.lifespan(app):
            yield

    app = FastAPI(title="Quickstart", lifespan=lifespan)
    app.add_middleware(SQLAlchemyMiddleware, db_url=db_url, commit_on_exit=True, observers=[timelines])
    app.add_middleware(TimelinesMiddleware, timelines=timelines)  # outside, to see the final response
    app.include_router(quickstart.router)
    app.include_router(payroll)
    app.add_exception_handler(IntegrityError, refuse)

    @app.get("/", include_in_schema=False)
    async def show_page() -> FileResponse:
        return FileResponse(PAGE)

    @app.get("/source", include_in_schema=False)
    async def show_source() -> PlainTextResponse:
        return PlainTextResponse(inspect.getsource(send_money))

    @app.get("/timelines", include_in_schema=False)
    async def read_timelines(after: int = 0) -> list[StoredTimeline]:
        return timelines.ended(after)

    return app
