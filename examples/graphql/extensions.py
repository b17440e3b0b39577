"""Two other ways: the request's own unit for all of an operation, and a unit for each task."""

from collections.abc import AsyncGenerator, Generator

from graphql import ExecutionResult
from strawberry.extensions import SchemaExtension
from strawberry.types.graphql import OperationType

from fastapi_async_sqlalchemy import db


class RollBackOnErrors(SchemaExtension):
    """Roll the request's unit back if its answer has errors, although the status is 200."""

    def on_operation(self) -> Generator[None]:
        """Look at the result when the operation has ended; the unit is committed at the response's start."""
        yield
        result = self.execution_context.result
        if not isinstance(result, ExecutionResult) or result.errors:
            db.unit.set_rollback_only()


class UnitForEachTask(SchemaExtension):
    """Give each task of a query, and so each resolver that runs beside another, a unit."""

    async def on_execute(self) -> AsyncGenerator[None]:
        """Open the block around a query."""
        if self.execution_context.operation_type is OperationType.QUERY:
            async with db.per_task(max_concurrent=5, pool_timeout=3.0):
                yield
        else:
            yield
