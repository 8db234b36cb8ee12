"""JSON as browsers read it: what JavaScript's JSON.parse refuses is refused here too."""

from __future__ import annotations

import json
from typing import Any, Never


def parse(text: bytes | str) -> Any:
    """
    The value that *text* stands for.

    Raises:
        ValueError: for all that is not JSON in UTF-8, also for NaN and for nesting too deep to be
        meant.

    Source: RFC 8259.
    """
    try:
        return _decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _parse_int(digits: str) -> int | float:
    # Python refuses to convert thousands of digits; JavaScript reads them as a float, and so does
    # this.
    return int(digits) if len(digits) < 300 else float(digits)


_decoder = json.JSONDecoder(parse_int=_parse_int, parse_constant=_refuse_constant)
