"""SQLAlchemy's own methods and attributes of a session, for what the package itself asks a session.

A user's session class may give these names another meaning. SQLAlchemy never calls them on the session, so
the package must not do so either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.util import IdentitySet


def _getter(attribute: object) -> Callable[[Session], Any]:
    """Return the function that computes a property."""
    return cast("Callable[[Session], Any]", cast("property", attribute).fget)


in_transaction: Final = Session.in_transaction
in_nested_transaction: Final = Session.in_nested_transaction
get_transaction: Final = Session.get_transaction
get_nested_transaction: Final = Session.get_nested_transaction
is_active: Final[Callable[[Session], bool]] = _getter(Session.is_active)

objects_of: Final = Session.__iter__
new_of: Final[Callable[[Session], IdentitySet]] = _getter(Session.new)
dirty_of: Final[Callable[[Session], IdentitySet]] = _getter(Session.dirty)
deleted_of: Final[Callable[[Session], IdentitySet]] = _getter(Session.deleted)
is_modified: Final = Session.is_modified
expunge: Final = Session.expunge
expire: Final = Session.expire
