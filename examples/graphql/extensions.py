"""Two other ways: the request's unit for the whole operation, and a unit for each task."""

from collections.abc import AsyncGenerator, Generator

from graphql import ExecutionResult
from strawberry.extensions import SchemaExtension
from strawberry.types.graphql import OperationType

from fastapi_async_sqlalchemy import db


class RollBackOnErrors(SchemaExtension):
    """Roll back the request's unit if its response has errors, although the status is 200."""

    def on_operation(self) -> Generator[None]:
        """Check the result when the operation has ended, before the response starts."""
        yield
        result = self.execution_context.result
        if not isinstance(result, ExecutionResult) or result.errors:
            db.unit.set_rollback_only()


class UnitForEachTask(SchemaExtension):
    """Give each task of a query, and so each concurrent resolver, a unit."""

    async def on_execute(self) -> AsyncGenerator[None]:
        """Open the block around a query."""
        if self.execution_context.operation_type is OperationType.QUERY:
            async with db.per_task(max_concurrent=5, pool_timeout=3.0):
                yield
        else:
            yield
