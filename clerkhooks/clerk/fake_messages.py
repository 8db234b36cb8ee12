"""The data of events about people: emails, text messages, sessions and the waitlist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clerkhooks.clerk.fake import derive_id

if TYPE_CHECKING:
    from clerkhooks import payloads
    from clerkhooks.clerk.fake_events import Scene

CODE = "424242"
"""The one-time passcode in the data of ``email.created`` and ``sms.created``."""
PHONE_NUMBERS = ("+15555550100", "+15555550101")
DAY = 24 * 60 * 60 * 1000  # milliseconds


def email(scene: Scene) -> payloads.EmailEventPayload:
    """Return an email with a one-time passcode."""
    text = f"{CODE} is your verification code."
    return {
        "body": f"<p>{text}</p>",
        "body_plain": text,
        "data": {"app": {"name": "Example"}, "otp_code": CODE},
        "delivered_by_clerk": True,
        "email_address_id": scene.user["primary_email_address_id"],
        "from_email_name": "notifications",
        "id": scene.id("ema"),
        "object": "email",
        "reply_to_email_name": None,
        "slug": "verification_code",
        "status": "queued",
        "subject": text,
        "to_email_address": scene.email,
        "user_id": scene.user["id"],
    }


def sms(scene: Scene) -> payloads.SmsEventPayload:
    """Return a text message with a one-time passcode."""
    return {
        "created_at_ms": scene.at,
        "data": {"app": {"name": "Example"}, "otp_code": CODE},
        "delivered_by_clerk": True,
        "from_phone_number": PHONE_NUMBERS[0],
        "id": scene.id("sms"),
        "message": f"{CODE} is your verification code.",
        "object": "sms",
        "phone_number_id": scene.user["primary_phone_number_id"],
        "slug": "verification_code",
        "status": "queued",
        "to_phone_number": PHONE_NUMBERS[1],
        "user_id": scene.user["id"],
    }


def session(scene: Scene) -> payloads.SessionEventPayload:
    """Return a session of the user in the organization."""
    return {
        "abandon_at": scene.at + 30 * DAY,
        "actor": None,
        "client_id": scene.id("client"),
        "created_at": scene.at,
        "expire_at": scene.at + 7 * DAY,
        "id": scene.id("sess"),
        "last_active_at": scene.at,
        "last_active_organization_id": scene.organization["id"],
        "latest_activity": None,
        "object": "session",
        "status": "active" if scene.action == "created" else scene.action,
        "updated_at": scene.at,
        "user": scene.user,
        "user_id": scene.user["id"],
    }


def waitlist_entry(scene: Scene) -> payloads.WaitlistEntry:
    """Return the user's entry: pending when it is created, and invited later."""
    is_invited, id_ = scene.action == "updated", derive_id("wle", scene.email)
    invitation: payloads.Invitation = {
        "created_at": scene.at,
        "email_address": scene.email,
        "expires_at": scene.at + 30 * DAY,
        "id": derive_id("inv", scene.email),
        "object": "invitation",
        "public_metadata": {},
        "revoked": False,
        "status": "pending",
        "updated_at": scene.at,
        "url": f"https://accounts.example.com/tickets/{id_}",
    }
    return {
        "created_at": scene.at,
        "email_address": scene.email,
        "id": id_,
        "invitation": invitation if is_invited else None,
        "is_locked": False,
        "object": "waitlist_entry",
        "status": "invited" if is_invited else "pending",
        "updated_at": scene.at,
    }
