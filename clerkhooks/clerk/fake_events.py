"""
The data of each of Clerk's event types, built so that the events of an instance fit together.

Most ids are derived from the ids of the user and the organization, so separate events about the
same membership, session or invitation have the same id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from clerkhooks.clerk import fake_billing, fake_messages
from clerkhooks.clerk.fake import clerk_id, derive_id, user_data
from clerkhooks.clerk.fields import find_primary

if TYPE_CHECKING:
    from clerkhooks import payloads

ADA = {"email": "ada@example.org", "first_name": "Ada", "last_name": "Lovelace"}
DAY = 24 * 60 * 60 * 1000  # milliseconds
_REMEMBERED = ("user.created", "user.updated", "organization.created", "organization.updated")


@dataclass(frozen=True)
class Scene:
    """The subject of an event. *action* is the part of the type after the dot."""

    family: str
    action: str
    user: payloads.User
    organization: payloads.Organization
    at: int

    @property
    def email(self) -> str:
        """The user's primary email address. It is empty if the user has no address."""
        address = find_primary(self.user, "primary_email_address_id", "email_addresses")
        return str(address.get("email_address") or "")

    def id(self, prefix: str, *names: str) -> str:
        """Return the id of an object that belongs to the user and the organization."""
        return derive_id(prefix, self.user["id"], self.organization["id"], *names)


class FakeObjects:
    """The users and organizations of a fake instance."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any]] = {}

    def event_data(
        self, event_type: str, user_id: str, organization_id: str, *, updated_at: int
    ) -> dict[str, Any]:
        """
        Return the complete ``data`` of an event. *updated_at* is in milliseconds.

        By default, the user is Ada Lovelace and the organization is Acme. For an event type that
        Clerk does not have, the data has an id and times.
        """
        family, _, action = event_type.partition(".")
        user = self._known.get(user_id) or user_data(user_id, **ADA, updated_at=updated_at)
        organization = self._known.get(organization_id) or dict(
            _new_organization(organization_id, user_id, updated_at)
        )
        subjects = (cast("payloads.User", user), cast("payloads.Organization", organization))
        scene = Scene(family, action, *subjects, updated_at)
        is_deletion = action == "deleted" and family in _DELETED
        return dict((_deleted if is_deletion else _BUILDERS.get(family, _unknown))(scene))

    def remember(self, event_type: str, data: Mapping[str, Any]) -> None:
        """Use the user or organization in *data* for later events. *data* may be incomplete."""
        known = data.get("id")
        if event_type in _REMEMBERED and isinstance(known, str):
            whole = self.event_data(event_type, known, known, updated_at=0)
            self._known[known] = {**whole, **data}


def _new_organization(organization_id: str, user_id: str, at: int) -> payloads.Organization:
    return {
        "admin_delete_enabled": True,
        "created_at": at,
        "created_by": user_id,
        "has_image": False,
        "id": organization_id,
        "image_url": f"https://img.clerk.com/{organization_id}",
        "last_active_at": at,
        "max_allowed_memberships": 5,
        "members_count": 1,
        "missing_member_with_elevated_permissions": False,
        "name": "Acme",
        "object": "organization",
        "pending_invitations_count": 0,
        "private_metadata": {},
        "public_metadata": {},
        "role_set_key": "role_set:default",
        "slug": "acme",
        "updated_at": at,
    }


def _user(scene: Scene) -> payloads.User:
    return {**scene.user, "updated_at": scene.at}


def _organization(scene: Scene) -> payloads.Organization:
    return {**scene.organization, "updated_at": scene.at}


def _deleted(scene: Scene) -> payloads.DeletedObject:
    """Return the data of a deletion. It has no times."""
    kind, prefix = _DELETED[scene.family]
    data: payloads.DeletedObject = {"deleted": True, "id": scene.id(prefix), "object": kind}
    if kind == "organization":
        data |= {"id": scene.organization["id"], "slug": scene.organization["slug"]}
    elif kind == "user":
        data["id"] = scene.user["id"]
        if external_id := scene.user["external_id"]:
            data["external_id"] = external_id
    return data


def _public_organization(
    scene: Scene,
) -> payloads.OrganizationInvitationPublicOrganizationData:
    organization = scene.organization
    return {
        "has_image": organization["has_image"],
        "id": organization["id"],
        "image_url": organization.get("image_url", ""),
        "name": organization["name"],
        "slug": organization["slug"],
    }


def _domain(scene: Scene) -> payloads.OrganizationDomain:
    verification: payloads.OrganizationDomainVerification = {
        "attempts": 1,
        "expire_at": scene.at + DAY,
        "status": "verified",
        "strategy": "email_code",
        "verified_at": scene.at,
    }
    domain = scene.email.rpartition("@")[2] or "example.org"
    return {
        "affiliation_email_address": f"admin@{domain}",
        "affiliation_verification": verification,
        "created_at": scene.at,
        "enrollment_mode": "automatic_invitation",
        "id": scene.id("orgdmn"),
        "name": domain,
        "object": "organization_domain",
        "organization_id": scene.organization["id"],
        "ownership_verification": None,
        "public_organization_data": _public_organization(scene),
        "total_pending_invitations": 0,
        "total_pending_suggestions": 0,
        "updated_at": scene.at,
        "verification": verification,
    }


def _invitation(scene: Scene) -> Mapping[str, object]:
    """Return an invitation of the user by the creator of the organization."""
    data: payloads.OrganizationInvitationEventPayload = {
        "created_at": scene.at,
        "data": {"public_organization_data": _public_organization(scene)},
        "email_address": scene.email,
        "expires_at": scene.at + 30 * DAY,
        "id": scene.id("orginv"),
        "inviter_id": scene.organization.get("created_by"),
        "object": "organization_invitation",
        "organization_id": scene.organization["id"],
        "private_metadata": {},
        "public_inviter_data": None,
        "public_metadata": {},
        "role": "org:member",
        "role_name": "Member",
        "status": "pending" if scene.action == "created" else scene.action,
        "updated_at": scene.at,
        "url": f"https://accounts.example.com/tickets/{scene.id('ticket')}",
    }
    if scene.action != "accepted":
        return data
    accepted: payloads.OrganizationInvitationAcceptedPayload
    accepted = {**data, "data": data["data"], "user_id": scene.user["id"]}
    return accepted


def _membership(scene: Scene) -> payloads.OrganizationMembership:
    user, is_admin = scene.user, scene.organization.get("created_by") == scene.user["id"]
    return {
        "created_at": scene.at,
        "id": scene.id("orgmem"),
        "object": "organization_membership",
        "organization": scene.organization,
        "permissions": ["org:sys_memberships:read"],
        "private_metadata": {},
        "public_metadata": {},
        "public_user_data": {
            "banned": user["banned"],
            "first_name": user["first_name"],
            "has_image": user["has_image"],
            "identifier": scene.email or user["username"],
            "image_url": user.get("image_url", ""),
            "last_name": user["last_name"],
            "profile_image_url": user.get("profile_image_url"),
            "user_id": user["id"],
            "username": user["username"],
        },
        "role": "org:admin" if is_admin else "org:member",
        "role_name": "Admin" if is_admin else "Member",
        "updated_at": scene.at,
    }


def _permission(scene: Scene) -> payloads.Permission:
    return {
        "created_at": scene.at,
        "description": "Delete notes of the organization",
        "id": scene.id("perm"),
        "key": "org:notes:delete",
        "name": "Delete notes",
        "object": "permission",
        "type": "user",
        "updated_at": scene.at,
    }


def _role(scene: Scene) -> payloads.Role:
    return {
        "created_at": scene.at,
        "description": "Edits the notes of the organization",
        "id": scene.id("role"),
        "is_creator_eligible": False,
        "key": "org:editor",
        "name": "Editor",
        "object": "role",
        "permissions": [_permission(scene)],
        "updated_at": scene.at,
    }


def _unknown(scene: Scene) -> Mapping[str, object]:
    times = {"created_at": scene.at, "updated_at": scene.at}
    return {"id": clerk_id("obj"), "object": scene.family, **times}


_DELETED = {
    "organization": ("organization", "org"),
    "organizationDomain": ("organization_domain", "orgdmn"),
    "permission": ("permission", "perm"),
    "role": ("role", "role"),
    "user": ("user", "user"),
}
_BUILDERS: dict[str, Callable[[Scene], Mapping[str, object]]] = {
    "email": fake_messages.email,
    "organization": _organization,
    "organizationDomain": _domain,
    "organizationInvitation": _invitation,
    "organizationMembership": _membership,
    "paymentAttempt": fake_billing.payment_attempt,
    "permission": _permission,
    "role": _role,
    "session": fake_messages.session,
    "sms": fake_messages.sms,
    "subscription": fake_billing.subscription,
    "subscriptionItem": fake_billing.subscription_item,
    "user": _user,
    "waitlistEntry": fake_messages.waitlist_entry,
}
