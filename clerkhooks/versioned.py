"""Versioned writes to the application's own tables."""

from __future__ import annotations

from typing import Any, cast

import sqlalchemy as sa
from flask import current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Mapper

from clerkhooks.events import Event
from clerkhooks.store.models import VERSION_COLUMNS, Versioned


def upsert(model: type[Versioned], event: Event, **values: Any) -> bool:
    """
    Write a row to one of the application's tables, unless the stored row is newer.

    *values* contains the primary key and the other columns. If the row exists, it is updated only
    if its version is older than *event*'s. Return whether the row was written. Call this function
    in a handler: it writes through ``db.session``, in the message's transaction.

    Raises:
        TypeError: *model* does not derive from ``Versioned``.
        ValueError: a primary key column has no value, or a column does not exist.
    """
    if not (isinstance(model, type) and issubclass(model, Versioned)):
        raise TypeError("upsert needs a model that derives from Versioned.")
    table = cast("sa.Table", sa.inspect(model).local_table)
    mapper: Mapper[Any] = sa.inspect(model)
    if unknown := values.keys() - mapper.columns.keys():
        raise ValueError(f"{model.__name__} has no column {', '.join(sorted(unknown))}.")
    row = {mapper.columns[name].name: value for name, value in values.items()}
    keys = [column.name for column in table.primary_key]
    if missing := [key for key in keys if row.get(key) is None]:
        raise ValueError(f"upsert needs a value for the primary key: {', '.join(missing)}.")
    session = cast("SQLAlchemy", current_app.extensions["sqlalchemy"]).session
    connection = session.connection(bind_arguments={"mapper": mapper})
    kind = postgresql if connection.dialect.name == "postgresql" else sqlite
    row |= dict(zip(VERSION_COLUMNS, event.version, strict=True))
    insert = kind.insert(table).values(row)
    own = sa.tuple_(*(table.c[name] for name in VERSION_COLUMNS))
    new = sa.tuple_(*(insert.excluded[name] for name in VERSION_COLUMNS))
    statement = insert.on_conflict_do_update(
        index_elements=keys,
        set_={name: insert.excluded[name] for name in row if name not in keys},
        where=sa.or_(table.c.version_updated_at.is_(None), own < new),
    ).returning(*table.primary_key)
    return bool(connection.execute(statement).all())
