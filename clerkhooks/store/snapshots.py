"""A read-only copy of a user's row, independent of any database session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Never, cast

import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import Mapper, QueryableAttribute

from clerkhooks.store.models import VERSION_COLUMNS, ClerkUser

_MISSING: Any = object()


class Snapshot:
    """
    A copy of the columns of one row, read only.

    Properties and methods of the model work on it as long as they only read columns; relationships
    do not.
    """

    __slots__ = ()
    _model: type[ClerkUser]

    def __setattr__(self, name: str, value: object) -> Never:
        """Raise AttributeError: the copy is never written back."""
        model = self._model.__name__
        raise AttributeError(
            f"current_user is a read-only copy of the row, so {name} cannot be set. "
            f"Change the row itself: db.session.get({model}, current_user.id)"
        )

    def __delattr__(self, name: str) -> Never:
        """Raise AttributeError."""
        raise AttributeError(f"current_user is read-only: {name} cannot be deleted.")

    def __getattr__(self, name: str) -> Any:
        """Return a property, a method or a plain attribute of the model."""
        owners = (vars(each) for each in self._model.__mro__)
        found = next((owner[name] for owner in owners if name in owner), _MISSING)
        if found is _MISSING or isinstance(found, QueryableAttribute) or name.startswith("__"):
            model = self._model.__name__
            raise AttributeError(
                f"current_user has no column {name!r}. For relationships read the row itself: "
                f"db.session.get({model}, current_user.id)"
            )
        if isinstance(found, hybrid_property):
            return found.fget(self)
        if isinstance(found, cached_property):
            return found.func(self)  # there is no __dict__ to cache the result in
        return found.__get__(self, self._model) if hasattr(type(found), "__get__") else found

    def __eq__(self, other: object) -> bool:
        """Compare all columns."""
        if not isinstance(other, Snapshot):
            return NotImplemented
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash((self._model, self.id))

    def __repr__(self) -> str:
        return f"<{self._model.__name__} {self.id}>"  # no profile data: it may be logged


def _values(snapshot: Snapshot) -> list[Any]:
    names: tuple[str, ...] = type(snapshot).__slots__
    return [getattr(snapshot, name) for name in names]


def read_columns(mapper: Mapper[Any]) -> list[sa.Column[Any]]:
    """Return the columns of a snapshot: all but the version columns and deferred ones."""
    return [
        column
        for column in cast("sa.Table", mapper.local_table).c
        if column.name not in VERSION_COLUMNS
        and not (column in mapper.columns.values() and _property(mapper, column).deferred)
    ]


def make_snapshots(
    mapper: Mapper[Any], columns: Sequence[sa.Column[Any]]
) -> Callable[[Sequence[Any]], Any]:
    """Return a function that makes a snapshot from a row of these *columns*."""
    mapped = mapper.columns.values()
    names = [
        _property(mapper, column).key if column in mapped else column.key for column in columns
    ]
    model = mapper.class_
    kind: Any = type(model.__name__, (Snapshot,), {"__slots__": tuple(names), "_model": model})
    assign = [kind.__dict__[name].__set__ for name in names]

    def make(row: Sequence[Any]) -> Any:
        snapshot = object.__new__(kind)
        for set_value, value in zip(assign, row, strict=True):
            set_value(snapshot, value)
        return snapshot

    return make


def _property(mapper: Mapper[Any], column: sa.Column[Any]) -> Any:
    return mapper.get_property_by_column(column)
