"""Sessions that take the models of their own database alone."""

from __future__ import annotations

from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, Union, cast, get_args, get_origin
from weakref import WeakSet

from attrs import Factory, define
from sqlalchemy import event, inspect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.mapper import _all_registries
from sqlalchemy.sql.schema import MetaData, Table
from sqlalchemy.sql.visitors import iterate
from typing_extensions import get_original_bases

from ..exceptions import ConfigurationError, WrongDatabaseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import Session, registry
    from sqlalchemy.sql.compiler import Compiled
    from sqlalchemy.sql.elements import ClauseElement

    from .state import Shared, StatefulSession

B_contra = TypeVar("B_contra", contravariant=True)

_ATTRIBUTE: Final = "_fastapi_async_sqlalchemy"
"""The attribute of a session class, and of a compiled statement, that holds its `Models`."""


class ModelSession(AsyncSession, Generic[B_contra]):
    """A session that takes the models of one declarative base, or of a union of them.

    ``class ShopSession(ModelSession[ShopBase])`` is the session class of a pair. Type checkers refuse other
    models in ``add``, ``add_all``, ``delete``, ``refresh``, ``expunge``, ``get`` and the like. At run time
    the pair's sessions raise ``WrongDatabaseError`` for them, in statements too, before any is sent.

    Raises:
        ConfigurationError: the parameter of a subclass is neither a class nor a union of classes.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        argument = _argument(cls)
        if argument is not None and not isinstance(argument, TypeVar):
            setattr(cls, _ATTRIBUTE, Models(cls, _classes(cls, argument)))


@define(eq=False, repr=False)
class Models:
    """The models that a session class takes. Each class and table is decided about once."""

    session_class: type[AsyncSession]
    bases: tuple[type, ...]
    pairs: WeakSet[Shared] = Factory(WeakSet["Shared"])
    """The databases with sessions of this class."""
    known: set[object] = Factory(set[object])
    """The mappers and classes that it takes, so far as anybody has asked."""
    _tables: WeakSet[Table] = Factory(WeakSet[Table])

    def follow(self, session_class: type[Session]) -> None:
        """Refuse objects of other databases on their way into a session, also by a cascade."""
        event.listen(session_class, "before_attach", self._before_attach)

    def _before_attach(self, session: StatefulSession, instance: object) -> None:
        kind = type(instance)
        if kind not in self.known:
            self.require(kind, session)

    def require(self, entity: object, session: StatefulSession) -> None:
        """Raise ``WrongDatabaseError`` for a mapper or a class that belongs to another database."""
        inspected = inspect(entity, raiseerr=False)
        model: type | None = None if inspected is None else inspected.mapper.class_
        if model is not None and not issubclass(model, self.bases):
            raise self._error(session, f"{model.__name__} is a model of {_base_of(model)}", model)
        self.known.add(entity)

    def decided(self, compiled: Compiled | None) -> bool:
        """Whether a compiled statement is known to have no table of another database."""
        return getattr(compiled, _ATTRIBUTE, None) is self

    def require_statement(self, compiled: Compiled, session: StatefulSession) -> None:
        """Raise ``WrongDatabaseError`` for a statement with a table that belongs to another database.

        A compiled statement is kept by SQLAlchemy, and so is the decision.
        """
        if self.decided(compiled):
            return
        state: object = getattr(compiled, "compile_state", None)  # with joins that loader options have added
        statement: ClauseElement | None = getattr(state, "statement", compiled.statement)
        if statement is not None:
            for element in iterate(statement):
                if _is_table(element):
                    table: Any = element  # some are derived, as by an alias
                    self._require_table(table.metadata.tables.get(table.key, table), session)
        setattr(compiled, _ATTRIBUTE, self)

    def _require_table(self, table: Table, session: StatefulSession) -> None:
        if table in self._tables:
            return
        registries = _all_registries()
        models = [mapper.class_ for one in registries for mapper in one.mappers if table in mapper.tables]
        if models and not any(issubclass(model, self.bases) for model in models):
            model = models[0]
            fact = f"{table.name!r} is the table of {model.__name__}, a model of {_base_of(model)}"
            raise self._error(session, fact, model)
        if not models and not self._may_use(table.metadata, registries):
            raise self._error(session, f"{table.name!r} is a table of another database's metadata", table)
        self._tables.add(table)

    def _may_use(self, metadata: MetaData, registries: set[registry]) -> bool:
        """Whether metadata with a table that has no model is its own, or no other database's."""
        if any(_metadata_of(base) is metadata for base in self.bases):
            return True
        sharing = [one for one in registries if one.metadata is metadata]
        if any(issubclass(mapper.class_, self.bases) for one in sharing for mapper in one.mappers):
            return True
        return not sharing and not any(_metadata_of(base) is metadata for one in _all() for base in one.bases)

    def _error(self, session: StatefulSession, fact: str, what: type | Table) -> WrongDatabaseError:
        pairs = [pair for one in _all() if one.owns(what) for pair in one.pairs if pair.engine is not None]
        own = session._fastapi_async_sqlalchemy.shared.name
        bases = [base.__name__ for base in self.bases]
        return WrongDatabaseError(own, fact, bases, pairs[0].name if pairs else None)

    def owns(self, what: type | Table) -> bool:
        """Whether a model, or a table without one, is of its bases."""
        if isinstance(what, type):
            return issubclass(what, self.bases)
        return any(_metadata_of(base) is what.metadata for base in self.bases)


def models_of(session_class: type[AsyncSession]) -> Models | None:
    """Return which models a session class takes, if it says so; refuse a ``ModelSession`` that does not."""
    models: Models | None = getattr(session_class, _ATTRIBUTE, None)
    if models is None and ModelSession in session_class.__mro__:
        kind = session_class.__name__
        message = f"{kind} does not say whose models it takes: write `class ShopSession({kind}[ShopBase])`."
        raise ConfigurationError(message)
    return models


def _argument(kind: type) -> object:
    """Return what a class gives for the parameter of ``ModelSession``; None if nothing."""
    for base in get_original_bases(kind):
        origin: object = get_origin(base) or base
        given = get_args(base)
        if origin is ModelSession:
            return given[0] if given else None
        if ModelSession in getattr(origin, "__mro__", ()):
            inner = _argument(cast("type", origin))
            variables: tuple[object, ...] = getattr(origin, "__parameters__", ())
            return dict(zip(variables, given, strict=False)).get(inner) if inner in variables else inner
    return None


def _classes(session_class: type, argument: object) -> tuple[type, ...]:
    """Return the classes of a union, or the only one."""
    is_union = get_origin(argument) in {Union, UnionType}
    classes: tuple[Any, ...] = get_args(argument) if is_union else (argument,)
    if not all(isinstance(one, type) and get_origin(one) is None for one in classes):
        wanted = "a declarative base such as ModelSession[ShopBase], or a union of them"
        name = f"the parameter of {session_class.__name__}"
        raise ConfigurationError(name, wanted, argument)
    return classes


def _all(above: type = ModelSession) -> Iterator[Models]:
    """Yield the models of all session classes that say which they take."""
    kinds: list[type] = type.__subclasses__(above)
    for kind in kinds:
        if _ATTRIBUTE in vars(kind):
            models: Models = vars(kind)[_ATTRIBUTE]
            yield models
        yield from _all(kind)


def _metadata_of(kind: type) -> MetaData | None:
    metadata: object = getattr(kind, "metadata", None)
    return metadata if isinstance(metadata, MetaData) else None


def _base_of(model: type) -> str:
    """Name the declarative base of a model: the outermost class with its metadata."""
    metadata = _metadata_of(model)
    names = [
        one.__name__ for one in type.mro(model) if metadata is not None and _metadata_of(one) is metadata
    ]
    return names[-1] if names else "another base"


def _is_table(element: object) -> bool:
    """Whether an element is a table; hides its type parameter, which SQLAlchemy 2.0 lacks."""
    return isinstance(element, Table)
