"""What each route promises: its transactions, and what an answer says of each of them."""

from typing import Literal

import fastapi
from attrs import frozen

Database = Literal["main", "ledger"]
Settled = Literal["response", "own", "tail", "after own", "after rollback", "refused", "never"]
"""When a transaction is decided: at the response's start, by the route itself, after the response, by a hook
after the route's own COMMIT or after ROLLBACK; or not at all, because the route always refuses, or undoes the
part whatever it answers."""
Seen = Literal["acknowledged", "refused", "unknown"]
Due = Literal["there", "absent", "all or nothing"]


@frozen
class Transaction:
    """Parts that are committed together, or not at all."""

    name: str
    settled: Settled
    parts: frozenset[str]
    database: Database = "main"
    after: str = ""
    """The transaction without which this one cannot have been committed."""
    instead_of: str = ""
    """The transaction with which this one cannot have been committed."""


@frozen
class Promise:
    """What one route writes, and how it answers where nothing goes wrong."""

    transactions: tuple[Transaction, ...]
    status: int = 200
    fails_late: bool = False
    """The application raises when the response has started, or gone out."""
    client_leaves: bool = False
    """The route waits until its client has left."""
    postgresql: bool = False
    """It needs constraints that are checked at COMMIT, or transactions that a failed statement aborts."""
    contended: bool = False
    """It can be refused because of another request, without any fault."""


def _response(parts: str, database: Database = "main", after: str = "") -> Transaction:
    name = "response" if database == "main" else database
    return Transaction(name, "response", frozenset(parts), database, after)


def _own(name: str, parts: str, database: Database = "main") -> Transaction:
    return Transaction(name, "own", frozenset(parts), database)


def _tail(parts: str, after: str = "response") -> Transaction:
    return Transaction("tail", "tail", frozenset(parts), after=after)


def _after_own(parts: str, after: str) -> Transaction:
    return Transaction("hook", "after own", frozenset(parts), after=after)


def _after_rollback(parts: str, instead_of: str = "response") -> Transaction:
    return Transaction("undo", "after rollback", frozenset(parts), instead_of=instead_of)


def _refused(parts: str, database: Database = "main") -> Transaction:
    return Transaction("refused", "refused", frozenset(parts), database)


def _never(parts: str) -> Transaction:
    return Transaction("never", "never", frozenset(parts))


_A, _L = _response("a"), _response("l", "ledger")
_FASTAPI = tuple(int(part) for part in fastapi.__version__.split(".")[:2])
_TEARDOWN_FOLLOWS = _FASTAPI >= (0, 118)
"""Teardowns come after the response, but for those that are asked, since 0.121, to come before."""
_TORN_DOWN_BEFORE = Promise((_response("at"),))
_HELD = Transaction("tail", "tail", frozenset("abe")) if _TEARDOWN_FOLLOWS else _response("abe")
"""What a dependency's block holds open is settled when the block has ended."""
_TORN_DOWN_AFTER = Promise((_A, _tail("t"))) if _TEARDOWN_FOLLOWS else _TORN_DOWN_BEFORE
ROUTES = {
    "plain": Promise((_response("ab"),)),
    "read": Promise(()),
    "refuse": Promise((_refused("a"),), 409),
    "returned": Promise((_refused("a"),), 409),
    "domain": Promise((_refused("a"),), 409),
    "forgiven": Promise((_never("a"),)),
    "stream_read": Promise((_A,)),
    "stream_write": Promise((_A, _tail("tu"))),
    "stream_fails": Promise((_A, _never("t")), fails_late=True),
    "stream_left": Promise((_A, _never("t")), client_leaves=True),
    "background": Promise((_A, _tail("t"))),
    "background_fails": Promise((_A, _never("t")), fails_late=True),
    "teardown_function": _TORN_DOWN_AFTER if _FASTAPI < (0, 121) else _TORN_DOWN_BEFORE,
    "teardown_request": _TORN_DOWN_AFTER,
    "nested": Promise((_response("ac"), _never("b"))),
    "savepoint": Promise((_response("ac"), _never("b"))),
    "swallow": Promise((_A, _never("b"))),
    "aborted": Promise((_refused("ab"),), 500, postgresql=True),
    "joined_fails": Promise((_refused("ab"),), 500),
    "requires_new": Promise((_own("own", "b"), _A)),
    "requires_new_refuses": Promise((_own("own", "b"), _refused("a")), 409),
    "gather": Promise((_own("g", "g"), _own("h", "h"), _never("i"), _A)),
    "two": Promise((_A, _response("l", "ledger", after="response"))),
    "hand": Promise((_own("hand", "a"), Transaction("response", "response", frozenset("b"), after="hand"))),
    "hand_refuses": Promise((_own("hand", "a"), _refused("b")), 409),
    "manual": Promise((_own("hand", "a"), _never("b"))),
    "transfer": Promise((_A,), contended=True),
    "serial": Promise((_own("own", "a"),), contended=True),
    "deferred": Promise((_A,), postgresql=True),
    "orphan": Promise((_refused("a"),), 409, postgresql=True),
    "hold": Promise((_A,)),
    "hooked": Promise((_A, _tail("h"), _after_rollback("r"))),
    "hooked_refuses": Promise((_refused("a"), _after_rollback("r"), _never("h")), 409),
    "timed_out": Promise((_refused("a"),), 504),
    "impatient": Promise((_refused("a"),), 500),
    # two engines in one session, which have no common outcome if a COMMIT fails
    "routed_both": Promise((_A, _response("lm", "ledger"))),
    "routed_refuses": Promise((_refused("a"), _refused("l", "ledger")), 409),
    "routed_aborted": Promise((_refused("a"), _refused("l", "ledger")), 500, postgresql=True),
    "routed_hooked": Promise((_L, _tail("h", "ledger"), _after_rollback("r", "ledger"))),
    "named": Promise((_A, _L)),
    "named_aborted": Promise((_refused("a"), _refused("l", "ledger")), 500, postgresql=True),
    "sharded": Promise((_own("own", "a"), _own("away", "l", "ledger"))),
    "sharded_aborted": Promise((_refused("a"), _refused("l", "ledger")), 500, postgresql=True),
    # a second driver
    "second_plain": Promise((_response("ab"),)),
    "second_hooked": Promise((_A, _tail("h"), _after_rollback("r"))),
    "second_stream": Promise((_A, _tail("t"))),
    "second_aborted": Promise((_refused("a"),), 500, postgresql=True),
    "second_timed_out": Promise((_refused("a"),), 504),
    "second_exposed": Promise((_refused("a"),), 409),
    # listeners that fail
    "listener": Promise(
        (_own("hand", "ab"), _after_own("h", "hand"), _after_rollback("r", "hand")),
        500,
    ),
    "listener_refuses": Promise((_refused("a"), _after_rollback("r"), _never("h")), 409),
    # tasks, event loops and processes
    "joined_task": Promise((_response("abe"),)),
    "joined_too_long": Promise((_refused("abe"),), 500),
    "joined_by_hand": Promise((_response("abe"),)),
    "joined_dependency": Promise((_HELD,)),
    "other_loop": Promise((_A, _never("o"))),
    "job": Promise((_own("j", "j"), _own("k", "k"))),
    "child": Promise((_own("g", "g"), _own("h", "h"), _own("child", "c"), _response("ab"))),
}


@frozen
class Answer:
    """What a client knows of one request when it is over."""

    number: int
    route: str
    seen: Seen
    status: int = 0
    done: frozenset[str] = frozenset()
    """The transactions that the answer names as committed."""
    doubt: frozenset[str] = frozenset()
    """The databases whose COMMIT was cut short, as the answer says."""
    calm: bool = False
    """No fault was about, and the client waited for the whole answer."""
    at: float = 0.0
    """When the status was seen, on the clock of the event loop."""
    error: str = ""
    """What a refusal says, for the report."""

    def due(self, transaction: Transaction) -> Due:
        """Return what must be found of a transaction."""
        told = {"acknowledged": self._acknowledged, "refused": self._refused, "unknown": self._unknown}
        return told[self.seen](transaction)

    def _acknowledged(self, transaction: Transaction) -> Due:
        if transaction.settled in {"own", "after own"}:
            return self._by_name(transaction)
        if transaction.settled == "tail" and not self.calm:
            return "all or nothing"
        return "absent" if transaction.settled in {"never", "after rollback"} else "there"

    def _refused(self, transaction: Transaction) -> Due:
        if transaction.settled in {"never", "refused", "tail"}:
            return "absent"
        if transaction.settled == "after rollback":
            if self.doubt or transaction.instead_of in self.done:  # no hook where the outcome is unknown
                return "absent"
            return "there" if self.calm else "all or nothing"
        return self._by_name(transaction)

    @staticmethod
    def _unknown(transaction: Transaction) -> Due:
        return "absent" if transaction.settled in {"never", "refused"} else "all or nothing"

    def _by_name(self, transaction: Transaction) -> Due:
        if transaction.settled == "after own":
            known = transaction.after in self.done
            return "absent" if not known else "there" if self.calm else "all or nothing"
        if transaction.name in self.done:
            return "there"
        return "all or nothing" if transaction.database in self.doubt else "absent"
