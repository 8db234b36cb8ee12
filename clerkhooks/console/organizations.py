"""The console's pages about organizations, which exist with CLERK_TABLES=organizations."""

from __future__ import annotations

from flask import Response, abort

from clerkhooks.clerk.kinds import ORGANIZATION
from clerkhooks.console.pages import PAGE, parse_cursor, read_argument, render
from clerkhooks.store import Store
from clerkhooks.store.organization_queries import find_memberships, list_organizations
from clerkhooks.web.state import current_state

MAX_MEMBERS = 100  # members shown on an organization's page


def show_organizations() -> Response:
    """Show organizations, newest first."""
    page = list_organizations(_get_store()).read_page(PAGE, parse_cursor(read_argument("after")))
    return render("organizations", page=page)


def show_organization(organization_id: str) -> Response:
    """Show an organization's row and its members."""
    store = _get_store()
    if not ORGANIZATION.is_id(organization_id):
        abort(404)
    found = find_memberships(store, MAX_MEMBERS + 1, organization_id=organization_id)
    return render(
        "organization",
        organization=list_organizations(store).find(organization_id),
        organization_id=organization_id,
        members=found[:MAX_MEMBERS],
        has_more=len(found) > MAX_MEMBERS,
    )


def _get_store() -> Store:
    """Return the store. The response is a 404 if it has no organizations."""
    store = current_state().store
    if ORGANIZATION not in store.by_kind:
        abort(404)
    return store
