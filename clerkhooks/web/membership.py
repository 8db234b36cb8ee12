"""Conditions on an organization, which the tables answer if they are newer than the token."""

from __future__ import annotations

from flask import request

from clerkhooks.clerk.authorization import Conditions, is_same_role
from clerkhooks.clerk.kinds import ORGANIZATION
from clerkhooks.clerk.session_tokens import Session
from clerkhooks.errors import Forbidden
from clerkhooks.store.memberships import MembershipReader
from clerkhooks.web.state import current_state

TABLES_MISSING = "require_auth(organization=…) needs CLERK_TABLES=organizations."
_SCOPED = ("permission", "feature", "plan")


def check_membership(session: Session, conditions: Conditions, parameter: str | None) -> Conditions:
    """
    Check the conditions that depend on the caller's membership, and return the others.

    The organization is the one that the path names in *parameter*, or the active one. Without the
    tables, all conditions are returned.

    Raises:
        Forbidden: ``not_a_member``; ``forbidden``; ``organization_required``, because the route has
            no such parameter, or a condition needs a token for this organization.
        RuntimeError: the application does not store memberships.
    """
    organization_id = _find_organization(session, conditions, parameter)
    memberships = current_state().store.memberships
    if parameter is not None and memberships is None:
        raise RuntimeError(TABLES_MISSING)
    if organization_id is None or memberships is None:
        return conditions
    is_member, role = _find_role(memberships, session, organization_id)
    if not is_member:
        raise Forbidden("forbidden" if parameter is None else "not_a_member")
    rest = conditions.copy()
    wanted = rest.pop("role", None)
    if wanted is not None and not _is_same(role, wanted):
        raise Forbidden("forbidden")
    active = session.organization
    if active is None or active.id != organization_id:
        if _need_organization(rest):
            raise Forbidden("organization_required")
    elif "permission" in rest and not _is_same(role, active.role):
        raise Forbidden("forbidden")  # the token has the permissions of another role
    return rest


def _find_organization(
    session: Session, conditions: Conditions, parameter: str | None
) -> str | None:
    """
    Return the id of the organization about which the tables are asked, or None.

    A malformed id is never asked about, because a database may refuse its characters.
    """
    if parameter is None:
        active = session.organization
        is_needed = "role" in conditions or _need_organization(conditions)
        return active.id if active and is_needed and ORGANIZATION.is_id(active.id) else None
    organization_id = (request.view_args or {}).get(parameter)
    if organization_id is None:
        raise Forbidden("organization_required")
    if not ORGANIZATION.is_id(organization_id):
        raise Forbidden("not_a_member")
    return str(organization_id)


def _find_role(
    memberships: MembershipReader, session: Session, organization_id: str
) -> tuple[bool, str | None]:
    """
    Return whether the caller is a member of the organization, and the caller's role.

    Both the tables and the token may be out of date. The token tells only about its organization,
    as of the time at which it was issued. A membership tells as of its version, and a tombstone as
    of the time at which it was written.
    """
    active = session.organization
    standing = memberships.find_standing(organization_id, session.user_id)
    if active is not None and active.id == organization_id:
        issued_at = session.claims["iat"] * 1000
        if standing is None or standing.at < issued_at:
            return True, active.role
    return (standing.is_member, standing.role) if standing is not None else (False, None)


def _is_same(one: str | None, other: str | None) -> bool:
    return one == other or (one is not None and other is not None and is_same_role(one, other))


def _need_organization(conditions: Conditions) -> bool:
    """Return whether a permission, feature or plan may come from the active organization."""
    wanted = (conditions.get(name) for name in _SCOPED)
    return any(isinstance(each, str) and not each.startswith(("user:", "u:")) for each in wanted)
