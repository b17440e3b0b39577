"""All routes of the campaign's application."""

from collections.abc import Awaitable, Callable
from typing import Final

from fastapi import APIRouter

from campaign import elsewhere, engines, listeners, routes

ENDPOINTS: Final[tuple[Callable[..., Awaitable[object] | None], ...]] = (
    *routes.ENDPOINTS,
    *engines.ENDPOINTS,
    *listeners.ENDPOINTS,
    *elsewhere.ENDPOINTS,
)
"""All but the one that commits by hand; each is reached by its name."""


def routers() -> tuple[APIRouter, APIRouter]:
    """Return the routes of the application, and those of the one that commits by hand."""
    router, manual_router = APIRouter(), APIRouter()
    for endpoint in ENDPOINTS:
        router.add_api_route(f"/{endpoint.__name__}/{{number}}", endpoint, methods=["POST"])
    manual_router.add_api_route("/{number}", routes.by_hand_only, methods=["POST"])
    return router, manual_router
