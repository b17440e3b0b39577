"""What clients are told when something fails: a sentence, and whether to come back."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, IntegrityError

from examples.bookshop.orders import KeyReusedError, SoldOutError, UnknownBookError
from fastapi_async_sqlalchemy import PoolTimeoutError, violated_constraint

SENTENCES = {
    "pk_book": "There is a book with this ISBN already.",
    "uq_orders_customer_idempotency_key": "An order with this Idempotency-Key is under way: send it again.",
}
"""Constraints that a client can break; any other one is a mistake of ours."""
STATUSES: dict[type[Exception], int] = {UnknownBookError: 404, SoldOutError: 409, KeyReusedError: 422}
CONFLICTS = {"40001", "40P01"}
"""PostgreSQL's serialization failure and deadlock: another transaction came between, and a retry may do."""

logger = logging.getLogger(__name__)


def answer(status: int, detail: str, retry_after: int | None = None) -> JSONResponse:
    """Return an answer in FastAPI's own form."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse({"detail": detail}, status, headers)


async def refused(_: Request, error: Exception) -> JSONResponse:
    """Answer for an error of a service, by its own sentence."""
    return answer(STATUSES[type(error)], str(error))


async def conflict(_: Request, error: IntegrityError) -> JSONResponse:
    """Answer 409 with a sentence for the constraint, whether a statement or COMMIT broke it."""
    name = violated_constraint(error)
    if name not in SENTENCES:
        logger.error("The constraint %s was violated", name, exc_info=error)
    return answer(409, SENTENCES.get(name or "", "The database refused this."))


async def busy(_: Request, error: PoolTimeoutError) -> JSONResponse:
    """Answer 503 where no connection came free."""
    return answer(503, "The shop is busy.", error.retry_after)


async def unavailable(_: Request, error: Exception) -> JSONResponse:
    """Answer 503 where a connection was lost, none could be made, or conflicts went on for too long.

    A COMMIT whose answer was lost may have succeeded: orders are safe to send again by their key.
    """
    if isinstance(error, DBAPIError) and not error.connection_invalidated:
        if getattr(error.orig, "sqlstate", None) not in CONFLICTS:
            raise error
        return answer(503, "Too many others want the same: send it again.", 1)
    logger.error("The database cannot be reached", exc_info=error)
    return answer(503, "The shop cannot be reached: send it again.", 1)


def add_error_handlers(app: FastAPI) -> None:
    """Let the application answer for all of these."""
    for error in STATUSES:
        app.add_exception_handler(error, refused)
    app.exception_handler(IntegrityError)(conflict)
    app.exception_handler(PoolTimeoutError)(busy)
    app.add_exception_handler(DBAPIError, unavailable)
    app.add_exception_handler(
        OSError, unavailable
    )  # asyncpg's; TimeoutError and ReplicaLagError are such, too
