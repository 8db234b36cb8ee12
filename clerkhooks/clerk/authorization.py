"""An implementation of Clerk's ``has()`` for the claims of a verified session token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

from clerkhooks.clerk import strict_json

Level = Literal["first_factor", "second_factor", "multi_factor"]
Preset = Literal["strict_mfa", "strict", "moderate", "lax"]


class Reverification(TypedDict):
    """The factors to verify and their maximum age in minutes. Clerk uses the same names."""

    level: Level
    afterMinutes: float


class Conditions(TypedDict, total=False):
    """The conditions of ``has()`` and ``require_auth``. A condition of None is ignored."""

    role: str | None
    permission: str | None
    feature: str | None
    plan: str | None
    reverification: Preset | Reverification | None


PRESETS: dict[str, Reverification] = {
    "strict_mfa": {"afterMinutes": 10, "level": "multi_factor"},
    "strict": {"afterMinutes": 10, "level": "second_factor"},
    "moderate": {"afterMinutes": 60, "level": "second_factor"},
    "lax": {"afterMinutes": 1440, "level": "second_factor"},
}
LEVELS: tuple[Level, ...] = get_args(Level)
NAMES = tuple(Conditions.__annotations__)
_SCOPED = r"((o|org|organization|u|user):)?[^\s:,]+"
_FORMS = {
    "role": (r"(org:)*[^\s:,]+", "org:admin"),
    "permission": (r"(org:)*(?!sys_)[^\s:,]+:[^\s:,]+", "org:invoices:read"),
    "feature": (_SCOPED, "org:dashboard"),
    "plan": (_SCOPED, "user:pro"),
}
_SCOPES = {"o": "o", "org": "o", "organization": "o", "u": "u", "user": "u"}


class MalformedClaims(Exception):
    """The claims are malformed, so Clerk's SDK rejects them. They grant nothing."""


@dataclass(frozen=True, slots=True)
class Organization:
    """
    The active organization of a session.

    The role and the permissions include Clerk's prefix: ``org:admin``, ``org:invoices:read``.
    """

    id: str
    slug: str | None
    role: str | None
    permissions: tuple[str, ...]


def parse_organization(claims: Mapping[str, Any]) -> Organization | None:
    """
    Return the active organization from *claims*, or None if it is missing or invalid.

    Tokens of version 1 and version 2 are supported.

    Raises:
        MalformedClaims: Clerk's SDK throws an error for these claims.

    Source: Clerk, "Session tokens", default claims, versions 1 and 2.
    """
    if claims.get("v") == 2:
        packed = claims.get("o")
        if _is_falsy(packed):
            return None
        packed = packed if isinstance(packed, dict) else {}
        permissions = _unpack_permissions(claims, packed)
        id_, slug, role = (packed.get(name) for name in ("id", "slg", "rol"))
        role = f"org:{role}" if isinstance(role, str) and role else None
    else:
        listed = claims.get("org_permissions")
        listed = listed if isinstance(listed, list) else []
        permissions = tuple(text for text in listed if isinstance(text, str))
        id_, slug, role = (claims.get(f"org_{name}") for name in ("id", "slug", "role"))
    if not isinstance(id_, str) or not id_:
        return None
    slug, role = (text if isinstance(text, str) else None for text in (slug, role))
    return Organization(id_, slug, role or None, permissions)


def is_authorized(claims: Mapping[str, Any], **conditions: Unpack[Conditions]) -> bool:
    """
    Return whether the session meets every condition. Without conditions, return False.

    Missing or malformed claims meet no condition.

    Raises:
        TypeError: the name of a condition is unknown.

    Source: @clerk/shared 4, createCheckAuthorization; Clerk, "Verify whether a user has access" and
    "Reverification".
    """
    given = _drop_absent(conditions)
    try:
        organization = parse_organization(claims)
        return bool(given) and all(
            _is_met(name, value, claims, organization) for name, value in given.items()
        )
    except MalformedClaims:
        return False


def parse_factor_ages(claims: Mapping[str, Any]) -> tuple[float, float] | None:
    """
    Return the minutes since each of the two factors was verified, or None if unknown.

    The value -1 means that the factor is not set up.
    """
    fva = claims.get("fva")
    if not isinstance(fva, list) or len(fva) != 2:
        return None
    for age in fva:
        if not strict_json.is_number(age) or not (age == -1 or 0 <= age < math.inf):
            return None
    return (fva[0], fva[1])


def parse_reverification(reverification: object) -> Reverification | None:
    """Return the level and age that *reverification* requires, or None if it is invalid."""
    if isinstance(reverification, str):
        return PRESETS.get(reverification)
    if not isinstance(reverification, Mapping):
        return None
    level, after = reverification.get("level"), reverification.get("afterMinutes")
    if level not in LEVELS or not strict_json.is_number(after) or not after > 0:
        return None
    return {"afterMinutes": after, "level": level}


def check_conditions(conditions: Mapping[str, Any]) -> Conditions:
    """
    Validate *conditions*, and return all conditions that are not None.

    Raises:
        TypeError: the name of a condition is unknown, or its value has the wrong type.
        ValueError: no session can meet the condition. For example, tokens never contain system
            permissions.
    """
    given = _drop_absent(conditions)
    for name, value in given.items():
        if name == "reverification":
            _check_reverification(value)
        else:
            _check_name(name, value)
    return cast("Conditions", given)


def _drop_absent(conditions: Mapping[str, Any]) -> dict[str, Any]:
    for name in conditions:
        if name not in NAMES:
            raise TypeError(f"{name!r} is not a condition. Use {', '.join(NAMES)}.")
    return {name: value for name, value in conditions.items() if value is not None}


def _check_name(kind: str, value: object) -> None:
    pattern, example = _FORMS[kind]
    if not isinstance(value, str):
        raise TypeError(f"{kind} must be a string, such as {example!r}; not {value!r}.")
    if not re.fullmatch(pattern, value):
        raise ValueError(
            f"{kind} must be a name such as {example!r}; not {value!r}. "
            "Tokens never contain system permissions."
        )


def _check_reverification(value: object) -> None:
    wanted = parse_reverification(value)
    is_exact = isinstance(value, str) or value == wanted
    if wanted is None or not is_exact or math.isinf(wanted["afterMinutes"]):
        raise ValueError(
            f"reverification must be one of {', '.join(PRESETS)}, "
            f"or a level and afterMinutes; not {value!r}."
        )


def _is_falsy(value: object) -> bool:
    """Return whether *value* is falsy in JavaScript. Empty arrays and objects are truthy."""
    return value is None or value is False or value in ("", 0)


def _unpack_permissions(claims: Mapping[str, Any], packed: Mapping[str, Any]) -> tuple[str, ...]:
    """
    Return the permissions from claims of version 2.

    ``per`` lists action names. ``fpm`` contains one bit mask for each feature of the organization.
    The position of each set bit is an index into ``per``.
    """
    features = _split_by_scope(claims.get("fea"))["o"]
    per, fpm = packed.get("per"), packed.get("fpm")
    if _is_falsy(per) or _is_falsy(fpm):
        return ()
    if not isinstance(per, str) or not isinstance(fpm, str):
        raise MalformedClaims
    names = [name.strip() for name in per.split(",")]
    numbers = map(_parse_bits, fpm.split(","))
    # A feature whose bit mask is missing or malformed grants nothing.
    return tuple(
        f"org:{feature}:{name}"
        for feature, bits in zip(features, numbers, strict=False)
        for at, name in enumerate(names)
        if bits >> at & 1
    )


def _parse_bits(text: str) -> int:
    digits = text.strip()
    return int(digits) if re.fullmatch("[0-9]{1,4000}", digits) else 0


def _split_by_scope(listed: object) -> dict[str, list[str]]:
    """Group the values of a claim such as ``o:dashboard,u:ai,ou:teams`` by scope."""
    found: dict[str, list[str]] = {"o": [], "u": []}
    if _is_falsy(listed):
        return found
    if not isinstance(listed, str):
        raise MalformedClaims
    for element in listed.split(","):
        scopes, colon, value = element.strip().partition(":")
        if not colon:
            raise MalformedClaims
        for scope in scopes if scopes in ("o", "u", "ou", "uo") else ():
            found[scope].append(value)
    return found


def _is_listed(listed: object, wanted: str) -> bool:
    """Return whether a claim lists *wanted*. A prefix (``org:`` or ``user:``) selects a scope."""
    if not isinstance(listed, str) or not listed:
        return False
    found = _split_by_scope(listed)
    first, colon, rest = wanted.partition(":")
    if not colon:
        return wanted in found["o"] or wanted in found["u"]
    scope = _SCOPES.get(first)
    return scope is not None and (rest.partition(":")[0] or first) in found[scope]


def _is_met(
    name: str, wanted: Any, claims: Mapping[str, Any], organization: Organization | None
) -> bool:
    match name:
        case "role":
            held = organization.role if organization is not None else None
            return held is not None and is_same_role(held, wanted)
        case "permission":
            permissions = organization.permissions if organization is not None else ()
            return _with_prefix(wanted) in permissions
        case "feature":
            return _is_listed(claims.get("fea"), wanted)
        case "plan":
            return _is_listed(claims.get("pla"), wanted)
        case _:
            return _is_fresh(claims, wanted)


def is_same_role(one: str, other: str) -> bool:
    """Compare two roles, with or without the prefix ``org:``."""
    return _with_prefix(one) == _with_prefix(other)


def _with_prefix(text: str) -> str:
    return re.sub("^(org:)*", "org:", text, count=1)


def _is_fresh(claims: Mapping[str, Any], reverification: object) -> bool:
    ages, wanted = parse_factor_ages(claims), parse_reverification(reverification)
    if ages is None or wanted is None or ages == (-1, -1):
        return False
    first, second = (age != -1 and wanted["afterMinutes"] > age for age in ages)
    # If no second factor is set up, the first factor is checked instead.
    if wanted["level"] == "first_factor" or ages[1] == -1:
        return first
    if wanted["level"] == "second_factor":
        return second
    return first and second  # a first factor that is not set up counts as unverified
