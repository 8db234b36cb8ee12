"""Declared columns: validation of values, and their encoding for the database."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import partial
from typing import Any, TypeGuard
from uuid import UUID

import sqlalchemy as sa

from clerkhooks.clerk.fields import Field
from clerkhooks.clerk.kinds import UNSTORABLE

logger = logging.getLogger(__name__)
MAX_INDEXED = 2000  # in bytes; a btree index rejects rows larger than about 2.7 kB
# The maximum number of digits, and the maximum exponent. PostgreSQL stores up to 16,383 decimal
# places.
MAX_DIGITS = 2000
MAX_SINGLE_PRECISION = 24  # in bits; PostgreSQL uses REAL (four bytes) up to FLOAT(24)
MIN_SINGLE, MAX_SINGLE = 1.2e-38, 3.4e38
MAX_DEPTH = 200  # levels of nested JSON; PostgreSQL and SQLite have much higher limits
_EXACT = Context(prec=1000)
_INTEGERS = {sa.SmallInteger: 2**15, sa.BigInteger: 2**63, sa.Integer: 2**31}


def read_fields(
    fields: Mapping[sa.Column[Any], Field], data: Mapping[str, Any], dialect: sa.Dialect
) -> dict[str, Any]:
    """Return the values of the declared columns. Absent and unstorable values become None."""
    return {
        column.name: _read_field(column, field, data, dialect) for column, field in fields.items()
    }


def _read_field(
    column: sa.Column[Any], field: Field, data: Mapping[str, Any], dialect: sa.Dialect
) -> Any:
    try:
        value = field.find(data)
        bound = _bind(column.type, value, dialect)
        if bound is None or not _is_storable(column, bound):
            return None
        return _normalize(column.type, value, dialect)
    except ValueError:
        return None
    except Exception as error:  # noqa: BLE001  # an application's parser may raise anything
        # The error's message is not logged, because it may quote the value.
        extra = {"column": column.name, "error": type(error).__name__}
        logger.warning("column_not_parsed", extra=extra)
        return None


def _normalize(type_: sa.types.TypeEngine[Any], value: Any, dialect: sa.Dialect) -> Any:
    """Convert *value* to the form that the database returns, to compare it with the row."""
    if isinstance(type_, sa.DateTime) and isinstance(value, datetime) and value.tzinfo is not None:
        value = value.astimezone(UTC)  # SQLite stores no time zone
        keeps_zone = type_.timezone and dialect.name != "sqlite"
        return value if keeps_zone else value.replace(tzinfo=None)
    if _is_numeric(type_) and _is_number(value, float | Decimal):
        rounded = _round(type_, value)
        return rounded if type_.asdecimal else float(rounded)
    return value


def _round(type_: sa.Numeric[Any], value: float | Decimal) -> Decimal:
    """Round *value* in the same way as the database."""
    exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if type_.precision is None:
        return exact
    return exact.quantize(Decimal(1).scaleb(-(type_.scale or 0)), ROUND_HALF_UP, _EXACT)


def _bind(type_: sa.types.TypeEngine[Any], value: Any, dialect: sa.Dialect) -> Any:
    """Convert *value* with the application's type decorators."""
    while isinstance(type_, sa.types.TypeDecorator) and value is not None:
        if type(type_).process_bind_param is not sa.types.TypeDecorator.process_bind_param:
            value = type_.process_bind_param(value, dialect)
        type_ = type_.impl_instance
    return value


def is_supported(type_: sa.types.TypeEngine[Any]) -> bool:
    """Return whether the limits of *type_* are known, so that every value can be checked."""
    return not isinstance(type_, sa.Interval) and isinstance(_implementation(type_), tuple(_CHECKS))


def _is_storable(column: sa.Column[Any], value: Any) -> bool:
    """
    Return whether *column* can store *value*, a result of ``_bind``.

    Raises:
        ValueError: *value* is malformed.
    """
    kind = _implementation(column.type)
    check = next(check for type_, check in _CHECKS.items() if isinstance(kind, type_))
    return check(kind, value) and _fits_index(column, value)


def _fits_index(column: sa.Column[Any], value: Any) -> bool:
    """Return whether *value* is short enough for the btree indexes on *column*."""
    sizes = [len(index.columns) for index in column.table.indexes if _is_btree_of(index, column)]
    if not sizes or not isinstance(value, str | dict | list):
        return True
    text = value if isinstance(value, str) else to_json(value)
    return len(text.encode()) <= MAX_INDEXED // max(sizes)


def _is_btree_of(index: sa.Index, column: sa.Column[Any]) -> bool:
    using = index.dialect_options["postgresql"]["using"] or "btree"
    return using == "btree" and column in index.columns.values()


def _is_storable_enum(kind: sa.Enum, value: Any) -> bool:
    if kind.enum_class is not None:
        return isinstance(value, kind.enum_class)
    return isinstance(value, str) and value in kind.enums


def _is_storable_text(kind: sa.String, value: Any) -> bool:
    return _is_clean(value) and (kind.length is None or len(value) <= kind.length)


def _is_storable_integer(kind: sa.Integer, value: Any) -> bool:
    most = next(most for type_, most in _INTEGERS.items() if isinstance(kind, type_))
    return _is_number(value, int) and -most <= value < most


def _is_storable_float(kind: sa.Float[Any], value: Any) -> bool:
    if not _is_number(value, int | float) or not abs(value) <= sys.float_info.max:  # not NaN
        return False
    is_single = isinstance(kind, sa.REAL) or (kind.precision or 53) <= MAX_SINGLE_PRECISION
    return not is_single or value == 0 or MIN_SINGLE <= abs(value) <= MAX_SINGLE


def _is_storable_numeric(kind: sa.Numeric[Any], value: Any) -> bool:
    if not _is_number(value, int | float | Decimal) or not _is_short(value):
        return False
    if abs(value) > sys.float_info.max:  # SQLite stores the number as a float
        return False
    return kind.precision is None or bool(
        abs(_round(kind, value)) < Decimal(10) ** (kind.precision - (kind.scale or 0))
    )


def _is_short(value: float | Decimal) -> bool:
    """
    Return whether *value* is finite and does not have too many digits.

    A value such as 1E-999999999 would exhaust memory.
    """
    _, digits, exponent = (value if isinstance(value, Decimal) else Decimal(value)).as_tuple()
    return isinstance(exponent, int) and len(digits) <= MAX_DIGITS and abs(exponent) <= MAX_DIGITS


def _is_storable_datetime(kind: sa.DateTime, value: Any) -> bool:
    return isinstance(value, datetime) and (value.tzinfo is not None or not kind.timezone)


def _is_storable_uuid(kind: sa.Uuid[Any], value: Any) -> bool:
    if kind.as_uuid:
        return isinstance(value, UUID)
    return isinstance(value, str) and str(UUID(value)) == value


_CHECKS: dict[type[sa.types.TypeEngine[Any]], Callable[[Any, Any], bool]] = {
    sa.JSON: lambda _, value: _is_storable_json(value),
    sa.Enum: _is_storable_enum,
    sa.String: _is_storable_text,
    sa.Boolean: lambda _, value: isinstance(value, bool),
    sa.Integer: _is_storable_integer,
    sa.Float: _is_storable_float,
    sa.Numeric: _is_storable_numeric,
    sa.DateTime: _is_storable_datetime,
    sa.Date: lambda _, value: isinstance(value, date) and not isinstance(value, datetime),
    sa.Time: lambda _, value: isinstance(value, time) and value.tzinfo is None,
    sa.Uuid: _is_storable_uuid,
}
"""The supported types and the check of a value for each. Subclasses precede their bases."""


def make_encoder(
    type_: sa.types.TypeEngine[Any], dialect: sa.Dialect
) -> Callable[[Any], Any] | None:
    """Return a function that encodes values of *type_* for JSON, or None if none is needed."""
    kind = _implementation(type_)
    if isinstance(kind, sa.JSON):
        # With sorted keys, equal objects are equal texts for the change feed.
        return partial(to_json, sort_keys=True) if dialect.name == "sqlite" else None
    process = type_.dialect_impl(dialect).bind_processor(dialect)
    if process is None and isinstance(kind, sa.String | sa.Boolean | sa.Integer | sa.Float):
        return None

    def encode(value: Any) -> Any:
        bound = process(value) if process is not None else value
        return bound if isinstance(bound, bool | int | float | str) else str(bound)

    return encode


def _implementation(type_: sa.types.TypeEngine[Any]) -> sa.types.TypeEngine[Any]:
    while isinstance(type_, sa.types.TypeDecorator):
        type_ = type_.impl_instance
    return type_


def _is_numeric(type_: sa.types.TypeEngine[Any]) -> TypeGuard[sa.Numeric[Any]]:
    return isinstance(type_, sa.Numeric) and not isinstance(type_, sa.Float)


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_clean(value: Any) -> bool:
    return isinstance(value, str) and not UNSTORABLE.search(value)


def _is_storable_json(value: Any, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        items = value.values()
        return all(map(_is_clean, value)) and all(
            _is_storable_json(one, depth + 1) for one in items
        )
    if isinstance(value, list | tuple):
        return all(_is_storable_json(one, depth + 1) for one in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or _is_clean(value)


def to_json(value: Any, *, sort_keys: bool = False) -> str:
    """
    Encode *value* as JSON, without escapes for non-ASCII characters.

    PostgreSQL may reject such escapes if the database's encoding is not UTF-8.
    """
    return json.dumps(value, ensure_ascii=False, sort_keys=sort_keys)
