"""The responses for errors: a message, and when to retry."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, IntegrityError

from examples.bookshop.orders import KeyReusedError, SoldOutError, UnknownBookError
from fastapi_async_sqlalchemy import PoolTimeoutError, is_conflict, is_unavailable, violated_constraint

SENTENCES = {
    "pk_book": "There is a book with this ISBN already.",
    "uq_orders_customer_idempotency_key": "An order with this Idempotency-Key is under way: send it again.",
}
"""Messages for constraints that a client can violate; any other violation is a bug."""
STATUSES: dict[type[Exception], int] = {UnknownBookError: 404, SoldOutError: 409, KeyReusedError: 422}

logger = logging.getLogger(__name__)


def answer(status: int, detail: str, retry_after: int | None = None) -> JSONResponse:
    """Return an error response in FastAPI's format."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"detail": detail}, status, headers)


async def refused(_: Request, error: Exception) -> JSONResponse:
    """Answer with the text of a service's error."""
    return answer(STATUSES[type(error)], str(error))


async def conflict(_: Request, error: IntegrityError) -> JSONResponse:
    """Answer 409 with the constraint's message, whether a statement or COMMIT violated it."""
    name = violated_constraint(error)
    if name not in SENTENCES:
        logger.error("The constraint %s was violated", name, exc_info=error)
    return answer(409, SENTENCES.get(name or "", "The database refused this."))


async def busy(_: Request, error: PoolTimeoutError) -> JSONResponse:
    """Answer 503 if no connection became free."""
    return answer(503, "The shop is busy.", error.retry_after)


async def unavailable(_: Request, error: Exception) -> JSONResponse:
    """Answer 503 if the database cannot serve the request now, or if conflicts persist.

    A COMMIT whose answer was lost may have succeeded: its key makes an order safe to send again.
    """
    if is_conflict(error):
        return answer(503, "Too many others want the same: send it again.", 1)
    if not is_unavailable(error):
        raise error
    logger.error("The database cannot be reached", exc_info=error)
    return answer(503, "The shop cannot be reached: send it again.", 1)


def add_error_handlers(app: FastAPI) -> None:
    """Register the error handlers."""
    for error in STATUSES:
        app.add_exception_handler(error, refused)
    app.exception_handler(IntegrityError)(conflict)
    app.exception_handler(PoolTimeoutError)(busy)
    app.add_exception_handler(DBAPIError, unavailable)
    app.add_exception_handler(
        OSError, unavailable
    )  # asyncpg raises it; TimeoutError and ReplicaLagError are subclasses
