"""The claims of session tokens about organizations, permissions, plans and features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_PERMISSION = re.compile(r"org:([^:,\s]+):([^:,\s]+)")


def session_claims(
    organization: str | None,
    role: str | None = None,
    permissions: Sequence[str] = (),
    plan: str | None = None,
    feature: str | None = None,
    default_organization: str | None = None,
) -> dict[str, Any]:
    """
    Return the claims of a member of *organization*, or of a user without an organization.

    Some claims require a membership. If *organization* is not set, these claims refer to
    *default_organization*.

    Raises:
        ValueError: Clerk would never put that permission, plan or feature in a token.

    Source: Clerk, "Session tokens", default claims, version 2.
    """
    if role or permissions or any(name and name.startswith("org:") for name in (plan, feature)):
        organization = organization or default_organization
    granted = [_parse_permission(permission) for permission in permissions]
    default = "o" if organization else "u"
    named = [_add_scope(feature, default)] if feature else []
    features = list(dict.fromkeys([f"o:{name}" for name, _ in granted] + named))
    claims: dict[str, Any] = {
        "fea": ",".join(features) or None,
        "pla": _add_scope(plan, default) if plan else None,
    }
    if not organization:
        return claims
    claims["o"] = {
        "id": organization,
        "rol": (role or "org:member").removeprefix("org:"),
        "slg": organization.removeprefix("org_").lower(),
    }
    actions = list(dict.fromkeys(action for _, action in granted))
    # One number for each organization feature, in the order of the ``fea`` claim. Bit n of the
    # number stands for action n of the ``per`` claim, counted from 0.
    packed = [
        sum(1 << at for at, action in enumerate(actions) if (name[2:], action) in granted)
        for name in features
        if name.startswith("o:")
    ]
    if packed:
        claims["o"] |= {"per": ",".join(actions), "fpm": ",".join(map(str, packed))}
    return claims


def _parse_permission(permission: str) -> tuple[str, str]:
    """Return the feature and the action of a permission such as ``org:notes:delete``."""
    found = _PERMISSION.fullmatch(permission)
    if found is None:
        raise ValueError(
            f"A permission is org:feature:action, such as org:notes:delete, not {permission!r}."
        )
    if found[1].startswith("sys_"):
        raise ValueError(
            f"Session tokens never contain system permissions, so {permission} would always be "
            "denied. Define your own permission."
        )
    return found[1], found[2]


def _add_scope(name: str, default: str) -> str:
    scope, colon, rest = name.partition(":")
    if colon and scope not in ("org", "user"):
        raise ValueError(
            f"{name!r} has an unknown prefix. A plan or feature may begin with org: or user:."
        )
    return f"{scope[0]}:{rest}" if colon else f"{default}:{name}"
