"""Other middlewares around the pair's own, and an error with its handler."""

from typing import NoReturn

import pytest
from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware


class DomainError(Exception):
    """An error of the application's own."""


def fail() -> NoReturn:
    """Fail with an error of the application's own."""
    raise DomainError


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Do nothing, from another task, as every BaseHTTPMiddleware does."""
    return await call_next(request)


AROUND = [
    pytest.param([], [], id="alone"),
    pytest.param([Middleware(BaseHTTPMiddleware, dispatch=pass_on)], [], id="BaseHTTP outside"),
    pytest.param([], [Middleware(BaseHTTPMiddleware, dispatch=pass_on)], id="BaseHTTP inside"),
    pytest.param([Middleware(GZipMiddleware, minimum_size=0)], [], id="GZip outside"),
    pytest.param([], [Middleware(GZipMiddleware, minimum_size=0)], id="GZip inside"),
    pytest.param([Middleware(CORSMiddleware, allow_origins=["*"])], [], id="CORS outside"),
    pytest.param([], [Middleware(CORSMiddleware, allow_origins=["*"])], id="CORS inside"),
]
"""Other middlewares, outside and inside of the pair's own."""
around = pytest.mark.parametrize(("outside", "inside"), AROUND)


async def conflict(request: Request, error: Exception) -> Response:
    """Answer for an error, in the loop."""
    return PlainTextResponse(f"conflict: {type(error).__name__}", 409)
