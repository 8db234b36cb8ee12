"""Declared columns: additional fields of Clerk's user object that an application stores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PHONE_NUMBER = "primary_phone_number"
_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[^.\s][^.]*)*")


@dataclass(frozen=True, slots=True)
class Field:
    """The source of a declared column: a path in Clerk's user object, and a parser."""

    path: str
    parse: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        """
        Reject a malformed path, or a path to a value that must not be stored.

        Raises:
            ValueError: the path is malformed or leads into ``private_metadata``.
        """
        if not isinstance(self.path, str) or not _PATH.fullmatch(self.path):
            raise ValueError(
                f"{self.path!r} is not a path into Clerk's user object. "
                "Use a field such as 'username', or a dotted path such as 'public_metadata.plan'."
            )
        if self.path.partition(".")[0] == "private_metadata":
            raise ValueError(
                "private_metadata is for your back end's secrets and must not be kept in a column. "
                "Use public_metadata."
            )

    def find(self, data: Any) -> Any:
        """
        Return the field's value in the user object *data*, or None if it is absent.

        Raises:
            Exception: ``parse`` raised an exception, for example for an unexpected value.
        """
        value, path = data, self.path
        if path == PHONE_NUMBER:
            value = find_primary(data, "primary_phone_number_id", "phone_numbers")
            path = "phone_number"
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if value is None or self.parse is None else self.parse(value)


def find_primary(data: Mapping[str, Any], id_name: str, list_name: str) -> Mapping[str, Any]:
    """Return the primary item of a list in *data*, or an empty mapping if it is missing."""
    primary, listed = data.get(id_name), data.get(list_name)
    if not isinstance(primary, str) or not isinstance(listed, list):
        return {}
    for item in listed:
        if isinstance(item, dict) and item.get("id") == primary:
            return item
    return {}
