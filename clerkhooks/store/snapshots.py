"""A read-only copy of a user's row, independent of any database session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Never, cast

import sqlalchemy as sa
from sqlalchemy.orm import Mapper, QueryableAttribute

from clerkhooks.store.models import VERSION_COLUMNS, ClerkUser

_MISSING: Any = object()


class Snapshot:
    """
    A read-only copy of the columns of one row.

    Properties and methods of the model work if they only read columns. Relationships do not work.
    """

    _model: type[ClerkUser]

    def __setattr__(self, name: str, value: object) -> Never:
        """Raise AttributeError, because a change would never be saved."""
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
        if name == "memberships" and found is _MISSING:
            raise AttributeError("current_user.memberships needs CLERK_TABLES=organizations.")
        if found is _MISSING or isinstance(found, QueryableAttribute) or name.startswith("__"):
            model = self._model.__name__
            raise AttributeError(
                f"current_user has no column {name!r}. For relationships, read the row itself: "
                f"db.session.get({model}, current_user.id)"
            )
        return found.__get__(self, self._model) if hasattr(type(found), "__get__") else found

    def __eq__(self, other: object) -> bool:
        """Compare all columns."""
        if type(self) is not type(other):
            return NotImplemented
        names: tuple[str, ...] = vars(type(self))["__slots__"]
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def __hash__(self) -> int:
        return hash((self._model, self.id))

    def __repr__(self) -> str:
        return f"<{self._model.__name__} {self.id}>"  # no profile data, because it may be logged


def read_columns(mapper: Mapper[Any]) -> list[sa.Column[Any]]:
    """Return the columns of a snapshot: all except version columns and deferred columns."""
    properties = _properties(mapper)
    return [
        column
        for column in cast("sa.Table", mapper.local_table).c
        if column.name not in VERSION_COLUMNS
        and not (column in properties and properties[column].deferred)
    ]


def make_snapshots(
    mapper: Mapper[Any],
    columns: Sequence[sa.Column[Any]],
    load_memberships: Callable[[str], Any] | None = None,
) -> Callable[[Sequence[Any]], Any]:
    """
    Return a function that makes a snapshot from a row with these *columns*.

    With *load_memberships*, a snapshot has ``memberships``, unless the model has such an attribute.
    They are loaded on first access.
    """
    properties, model = _properties(mapper), mapper.class_
    names = tuple(properties.get(column, column).key for column in columns)
    attributes: dict[str, Any] = {"__slots__": names, "_model": model}
    if load_memberships is not None and not hasattr(model, "memberships"):
        loaded = cached_property(lambda snapshot: load_memberships(snapshot.id))
        attributes["memberships"] = loaded
    kind: Any = type(model.__name__, (Snapshot,), attributes)
    assign = [kind.__dict__[name].__set__ for name in names]

    def make(row: Sequence[Any]) -> Any:
        snapshot = object.__new__(kind)
        for set_value, value in zip(assign, row, strict=True):
            set_value(snapshot, value)
        return snapshot

    return make


def _properties(mapper: Mapper[Any]) -> dict[Any, Any]:
    """Return the model's properties by column. Some columns have no property."""
    return {column: one for one in mapper.column_attrs for column in one.columns}
