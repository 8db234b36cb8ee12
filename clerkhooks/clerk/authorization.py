"""What a session may do: the answers of Clerk's own ``has()``, from the claims of a verified token."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

Level = Literal["first_factor", "second_factor", "multi_factor"]
Preset = Literal["strict_mfa", "strict", "moderate", "lax"]


class Reverification(TypedDict):
    """How lately which factors must have been verified, in Clerk's own names."""

    level: Level
    afterMinutes: float


PRESETS: dict[str, Reverification] = {
    "strict_mfa": {"afterMinutes": 10, "level": "multi_factor"},
    "strict": {"afterMinutes": 10, "level": "second_factor"},
    "moderate": {"afterMinutes": 60, "level": "second_factor"},
    "lax": {"afterMinutes": 1440, "level": "second_factor"},
}
LEVELS = ("first_factor", "second_factor", "multi_factor")
_SCOPED = r"((o|org|organization|u|user):)?[^\s:,]+"
_FORMS = {
    "role": (r"(org:)*[^\s:,]+", "org:admin"),
    "permission": (r"(org:)*(?!sys_)[^\s:,]+:[^\s:,]+", "org:invoices:read"),
    "feature": (_SCOPED, "org:dashboard"),
    "plan": (_SCOPED, "user:pro"),
}
_SCOPES = {"o": "o", "org": "o", "organization": "o", "u": "u", "user": "u"}


class MalformedClaims(Exception):
    """Claims whose shape Clerk's SDK does not bear: they authorize nothing."""


@dataclass(frozen=True, slots=True)
class Organization:
    """The active organization of a session. Role and permissions carry Clerk's prefix: ``org:admin``, ``org:invoices:read``."""

    id: str
    slug: str | None
    role: str | None
    permissions: tuple[str, ...]


def parse_organization(claims: Mapping[str, Any]) -> Organization | None:
    """
    The active organization, as either version of the claims tells it; None where there is none.

    Raises:
        MalformedClaims: where Clerk's SDK throws.

    Source: Clerk, "Session tokens", default claims, versions 1 and 2.
    """
    if claims.get("v") == 2:
        told = claims.get("o")
        if _is_falsy(told):
            return None
        told = told if isinstance(told, dict) else {}
        role = f"org:{told['rol']}" if isinstance(told.get("rol"), str) and told["rol"] else None
        return _organization(told.get("id"), told.get("slg"), role, _permissions(claims, told))
    listed = claims.get("org_permissions")
    permissions = (
        tuple(text for text in listed if isinstance(text, str)) if isinstance(listed, list) else ()
    )
    return _organization(
        claims.get("org_id"), claims.get("org_slug"), claims.get("org_role"), permissions
    )


def is_authorized(
    claims: Mapping[str, Any],
    *,
    role: str | None = None,
    permission: str | None = None,
    feature: str | None = None,
    plan: str | None = None,
    reverification: Preset | Reverification | None = None,
) -> bool:
    """
    Return whether the session meets every question, of which there must be one.

    What is missing or malformed denies.

    Source: @clerk/shared 4, createCheckAuthorization; Clerk, "Verify whether a user has access" and
    "Reverification".
    """
    try:
        organization = parse_organization(claims)
        answers = [
            role is None or _has_role(organization, role),
            permission is None
            or (organization is not None and _with_prefix(permission) in organization.permissions),
            feature is None or _is_listed(claims.get("fea"), feature),
            plan is None or _is_listed(claims.get("pla"), plan),
            reverification is None or _is_fresh(claims.get("fva"), reverification),
        ]
    except MalformedClaims:
        return False
    asked = (role, permission, feature, plan, reverification)
    return all(answers) and any(question is not None for question in asked)


def parse_factor_verification_age(claims: Mapping[str, Any]) -> tuple[float, float] | None:
    """Minutes since the first and the second factor were verified, -1 for one that is not set up; None if unknown."""
    fva = claims.get("fva")
    if isinstance(fva, list) and len(fva) == 2 and all(map(_is_factor_age, fva)):
        return (fva[0], fva[1])
    return None


def parse_reverification(reverification: object) -> Reverification | None:
    """A preset or an object in the long form; None if it is neither."""
    if isinstance(reverification, str):
        return PRESETS.get(reverification)
    if not isinstance(reverification, Mapping):
        return None
    level, after = reverification.get("level"), reverification.get("afterMinutes")
    if (
        level not in LEVELS
        or isinstance(after, bool)
        or not isinstance(after, int | float)
        or not after > 0
    ):
        return None
    return {"afterMinutes": after, "level": level}


def check_questions(questions: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a copy of *questions*, refusing any that no session could ever meet.

    Raises:
        TypeError: if one is of a wrong type. ValueError: if one is malformed, or asks for a system
        permission, which Clerk puts into no token.
    """
    return {
        name: _check_reverification(value) if name == "reverification" else _check_name(name, value)
        for name, value in questions.items()
    }


def _check_name(kind: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{kind} is a string, such as {_FORMS[kind][1]!r}; not {value!r}.")
    if not re.fullmatch(_FORMS[kind][0], value):
        raise ValueError(
            f"{kind} is a name such as {_FORMS[kind][1]!r}; not {value!r}. System permissions are in no token."
        )
    return value


def _check_reverification(value: object) -> object:
    wanted = parse_reverification(value)
    if wanted is None or (
        isinstance(value, Mapping)
        and (set(value) != set(wanted) or not math.isfinite(wanted["afterMinutes"]))
    ):
        raise ValueError(
            f"reverification is one of {', '.join(PRESETS)}, or a level and afterMinutes; not {value!r}."
        )
    return value if isinstance(value, str) else wanted


def _is_falsy(value: object) -> bool:
    """Whether JavaScript takes *value* for absent: unlike Python, not an empty list or object."""
    return value is None or value is False or value in ("", 0)


def _organization(
    id_: object, slug: object, role: object, permissions: tuple[str, ...]
) -> Organization | None:
    if not isinstance(id_, str) or not id_:
        return None
    return Organization(
        id_,
        slug if isinstance(slug, str) else None,
        role if isinstance(role, str) and role else None,
        permissions,
    )


def _permissions(claims: Mapping[str, Any], told: Mapping[str, Any]) -> tuple[str, ...]:
    """Version 2 packs permissions: ``fpm`` has a number for each organization-scoped feature, whose bits index ``per``."""
    features = _split_by_scope(claims.get("fea"))["o"]
    per, fpm = told.get("per"), told.get("fpm")
    if _is_falsy(per) or _is_falsy(fpm):
        return ()
    if not isinstance(per, str) or not isinstance(fpm, str):
        raise MalformedClaims
    names = [name.strip() for name in per.split(",")]
    # A feature beyond the map, and a number that is none, give nothing.
    packed = [
        int(bits) if re.fullmatch("[0-9]{1,4000}", bits) else 0
        for bits in map(str.strip, fpm.split(","))
    ]
    pairs = zip(features, packed, strict=False)
    return tuple(
        f"org:{feature}:{name}"
        for feature, bits in pairs
        for at, name in enumerate(names)
        if bits >> at & 1
    )


def _split_by_scope(listed: object) -> dict[str, list[str]]:
    """``o:dashboard,u:ai,ou:teams`` as what the organization has and what the user has."""
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


def _is_listed(listed: object, asked: str) -> bool:
    """Whether a feature or plan is in a claim; ``org:`` or ``user:`` before it asks in that scope alone."""
    if not isinstance(listed, str) or not listed:
        return False
    found = _split_by_scope(listed)
    first, colon, rest = asked.partition(":")
    if not colon:
        return asked in found["o"] or asked in found["u"]
    scope = _SCOPES.get(first)
    return scope is not None and (rest.partition(":")[0] or first) in found[scope]


def _has_role(organization: Organization | None, role: str) -> bool:
    return (
        organization is not None
        and organization.role is not None
        and _with_prefix(organization.role) == _with_prefix(role)
    )


def _with_prefix(text: str) -> str:
    return re.sub("^(org:)*", "org:", text, count=1)


def _is_factor_age(age: object) -> bool:
    return (
        isinstance(age, int | float)
        and not isinstance(age, bool)
        and math.isfinite(age)
        and (age == -1 or age >= 0)
    )


def _is_fresh(fva: object, reverification: object) -> bool:
    ages, wanted = parse_factor_verification_age({"fva": fva}), parse_reverification(reverification)
    if ages is None or wanted is None or ages == (-1, -1):
        return False
    first, second = (age != -1 and wanted["afterMinutes"] > age for age in ages)
    if (
        wanted["level"] == "first_factor" or ages[1] == -1
    ):  # without a second factor the first one stands in
        return first
    if wanted["level"] == "second_factor":
        return second
    return first and second  # where the first factor is not set up, it cannot be fresh
