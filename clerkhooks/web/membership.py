"""Conditions on an organization, which the tables answer if they are newer than the token."""

from __future__ import annotations

from flask import request

from clerkhooks.clerk.authorization import Conditions, is_same_role
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
    active = session.organization
    organization_id = active.id if active is not None else None
    if parameter is not None:
        organization_id = (request.view_args or {}).get(parameter)
        if organization_id is None:
            raise Forbidden("organization_required")
    elif not {"role", "permission"} & conditions.keys():
        return conditions
    memberships = current_state().store.memberships
    if parameter is not None and memberships is None:
        raise RuntimeError(TABLES_MISSING)
    if organization_id is None or memberships is None:
        return conditions
    is_member, role = _find_role(memberships, session, str(organization_id))
    if not is_member:
        raise Forbidden("forbidden" if parameter is None else "not_a_member")
    rest = conditions.copy()
    wanted = rest.pop("role", None)
    if wanted is not None and (role is None or not is_same_role(role, wanted)):
        raise Forbidden("forbidden")
    is_active = active is not None and active.id == organization_id
    if not is_active and any(_needs_organization(rest.get(name)) for name in _SCOPED):
        raise Forbidden("organization_required")
    return rest


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


def _needs_organization(value: object) -> bool:
    """Return whether a permission, feature or plan may come from the active organization."""
    return isinstance(value, str) and not value.startswith(("user:", "u:"))
