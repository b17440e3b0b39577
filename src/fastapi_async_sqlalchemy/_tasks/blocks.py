"""The units that a proxy opens for blocks, tasks and functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, overload

from .._unit.database import S_co
from .._unit.place import Handle
from .._unit.scope import UnitScope
from .fan_out import UnitTaskGroup, gather_in_units, open_connection, open_task_group
from .opening import open_scope
from .transactional import F, decorator

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    from .._arguments.checks import Begin, IsolationLevel, Propagation
    from .._arguments.keywords import SessionArgs
    from .._unit.unit import UnitOfWork


_NOTHING: Final = (None,) * 7


class Blocks(Handle[S_co]):
    """The part of a proxy that opens units."""

    __slots__ = ()

    def __call__(
        self,
        session_args: SessionArgs | None = None,
        commit_on_exit: bool | None = None,  # noqa: FBT001  # the names and the order of release 0.8
        *,
        propagation: Propagation = "requires_new",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        multi_sessions: bool = False,
        max_concurrent: int | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a unit of work with a separate session, for ``async with db() as unit:``.

        Leaving the block commits under ``commit_on_exit=True``, as in ``db.begin()``. Otherwise uncommitted
        work is rolled back, with a WARNING if something was written. An error that leaves the block always
        rolls back. ``commit_on_exit`` defaults to that of the pair or of ``db.connect()``. ``session_args``
        are added to the database's own.

        ``propagation`` says how the block relates to an open unit. ``requires_new`` is independent of it,
        ``required`` joins it, ``nested`` is a SAVEPOINT of it, and ``never`` raises. Outside a unit,
        ``mandatory`` raises and all others open one. A joined unit is committed by its owner, but not after
        an error has left the block.

        ``read_only``, ``isolation_level`` and PostgreSQL's ``deferrable`` hold for all its transactions.
        ``pool_timeout`` is how many seconds it waits for a connection, at most the pool's own timeout.
        Under PostgreSQL's ``begin="on_first_write"`` plain reads before the first other statement are sent
        without a transaction. ``multi_sessions=True`` is the name of ``db.per_task()`` in release 0.8.

        Raises ``SessionNotInitialisedError`` before an engine is bound, ``ConfigurationError`` for a wrong
        argument, and on entry ``PropagationError``.
        """
        given = session_args, read_only, isolation_level, deferrable, begin, max_concurrent, pool_timeout
        plain = given == _NOTHING and propagation == "requires_new" and multi_sessions is False
        commits = self._database.commit_on_exit if commit_on_exit is None else commit_on_exit
        # the usual call is written out, because passing all of it on costs more than the unit
        if plain and (commits is True or commits is False):
            return UnitScope(self._database.configs[commits], self._current)
        return open_scope(
            self,
            session_args,
            commit_on_exit,
            propagation=propagation,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            begin=begin,
            multi_sessions=multi_sessions,
            max_concurrent=max_concurrent,
            pool_timeout=pool_timeout,
        )

    def begin(
        self,
        *,
        session_args: SessionArgs | None = None,
        propagation: Propagation = "requires_new",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a unit of work that commits at the end of its block, for ``async with db.begin() as unit:``.

        An error that leaves the block rolls back. The arguments are those of ``db(...)``.
        """
        given = session_args, read_only, isolation_level, deferrable, begin, pool_timeout, None
        if given == _NOTHING and propagation == "requires_new":
            return UnitScope(self._database.configs[True], self._current)
        return open_scope(
            self,
            session_args,
            True,  # noqa: FBT003  # by position in release 0.8
            propagation=propagation,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            begin=begin,
            pool_timeout=pool_timeout,
        )

    def per_task(
        self,
        *,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a block in which each task that asks for ``db.session`` gets a separate unit.

        A task's unit is settled when the task ends, and the end of the block waits for these tasks. At most
        ``max_concurrent`` of the units hold a connection at a time. The other arguments are those of
        ``db(...)``.
        """
        return open_scope(
            self,
            session_args,
            commit_on_exit,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            begin=begin,
            multi_sessions=True,
            max_concurrent=max_concurrent,
            pool_timeout=pool_timeout,
        )

    def connection(
        self, *, timeout: float | None = None, commit_on_exit: bool | None = None
    ) -> AbstractAsyncContextManager[S_co, None]:
        """Return a new unit's session for ``async with``, with its connection checked out on entry.

        ``timeout`` is how many seconds to wait for the connection, at most the pool's own timeout; then
        ``PoolTimeoutError`` is raised. ``commit_on_exit`` defaults to that of the current unit.
        """
        return open_connection(self, timeout, commit_on_exit)

    def gather(
        self,
        *coroutines: Coroutine[Any, Any, Any],
        return_exceptions: bool = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Run each coroutine in a separate task and unit of work, and return the results in order.

        At most ``max_concurrent`` run at a time. Each unit commits or rolls back by its own outcome.
        ``commit_on_exit`` and ``session_args`` default to those of the current unit. The first error cancels
        the other tasks, waits until their units are settled, and is raised. With ``return_exceptions=True``
        errors are returned as results. The result is a list, as with ``asyncio.gather()``, which type
        checkers see as a tuple.
        """
        return gather_in_units(
            self,
            coroutines,
            return_exceptions=return_exceptions,
            max_concurrent=max_concurrent,
            commit_on_exit=commit_on_exit,
            session_args=session_args,
        )

    def task_group(
        self,
        *,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> UnitTaskGroup[S_co]:
        """Return a group of tasks, built on ``asyncio.TaskGroup``, each in a separate unit; see ``gather()``.

        ``async with db.task_group() as tasks: tasks.create_task(work())``. Errors leave the block in an
        ``ExceptionGroup``, once all tasks have ended and their units are settled.
        """
        return open_task_group(self, max_concurrent, commit_on_exit, session_args)

    @overload
    def transactional(self, function: F, /) -> F: ...

    @overload
    def transactional(
        self,
        function: None = None,
        /,
        *,
        propagation: Propagation = "required",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        retries: int = 0,
    ) -> Callable[[F], F]: ...

    def transactional(
        self,
        function: F | None = None,
        /,
        *,
        propagation: Propagation = "required",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        retries: int = 0,
    ) -> F | Callable[[F], F]:
        """Decorate a coroutine function to run in a unit of work that commits when it returns.

        The other arguments are those of ``db(...)``. After a serialization failure or a deadlock the function
        is called again in a new unit, up to ``retries`` times, with growing pauses. It is not called again
        when the outcome of COMMIT is unknown. Retries need the extra ``[retries]`` and a unit that the
        function does not share: where it would join one, the call raises ``PropagationError``.

        Raises ``ConfigurationError`` for a wrong argument, and if ``function`` is not a coroutine function.
        """
        decorate = decorator(
            self,
            propagation=propagation,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            retries=retries,
        )
        return decorate if function is None else decorate(function)
