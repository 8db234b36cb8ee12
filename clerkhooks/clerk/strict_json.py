"""A strict JSON parser, like JavaScript's ``JSON.parse``."""

from __future__ import annotations

import json
from typing import Any, Never, TypeGuard


def parse(text: bytes | str) -> Any:
    """
    Parse *text* and return its value.

    Raises:
        ValueError: *text* is not JSON in UTF-8, contains NaN or Infinity, or is nested too deeply.

    Source: RFC 8259.
    """
    try:
        return _decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_number(value: object) -> TypeGuard[float]:
    """Return whether *value* is a JSON number. A bool is an int in Python, but not in JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _parse_int(digits: str) -> int | float:
    # Python refuses to parse an integer with thousands of digits. JavaScript parses it as a float.
    return int(digits) if len(digits) < 300 else float(digits)


_decoder = json.JSONDecoder(parse_int=_parse_int, parse_constant=_refuse_constant)
