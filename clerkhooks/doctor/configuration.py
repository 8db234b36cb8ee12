"""Checks of the variables and of the ``.env`` file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from clerkhooks.doctor.findings import Case, Finding, Level
from clerkhooks.parsing import NATIVE, is_loopback, parse_publishable_key
from clerkhooks.settings import SECRET_VARIABLES, VARIABLES, ServiceSettings

# Clerk's own SDKs read these variables, and may share an environment with this program.
_OF_OTHERS = re.compile(
    r"CLERK_(SIGN_(IN|UP)_.*|.*REDIRECT_URL|TELEMETRY_.*|DOMAIN|IS_SATELLITE|PROXY_URL|JS_.*"
    r"|API_VERSION|ENCRYPTION_KEY|MACHINE_.*|FAPI|DEBUG)"
)
_FRONT_END_KEY = re.compile(
    r"(NEXT_PUBLIC|VITE|REACT_APP|EXPO_PUBLIC|NUXT_PUBLIC|PUBLIC|GATSBY)_CLERK_PUBLISHABLE_KEY"
)


def check_settings(case: Case) -> Iterator[Finding]:
    """Check that every variable is valid."""
    for fault in case.faults:
        what = f"{fault.variable} {fault.problem}"
        yield Finding("variable_wrong", Level.ERROR, fault.variable, what, fault.remedy)
    if not case.faults:
        yield Finding("settings_valid", Level.OK, "settings", "Every variable is valid.")


def check_names(case: Case) -> Iterator[Finding]:
    """Check for misspelled variables, and for publishable keys in front-end variables."""
    for name in sorted(case.values):
        if not case.text(name):
            continue
        is_unknown = name.startswith("CLERK_") and name not in VARIABLES
        if is_unknown and not _OF_OTHERS.fullmatch(name):
            near = difflib.get_close_matches(name, VARIABLES, 1)
            what = f"{name} is set, but clerkhooks has no such variable."
            unread = "Remove it, unless another program reads it."
            remedy = f"Did you mean {near[0]}?" if near else unread
            yield Finding("variable_unknown", Level.WARNING, name, what, remedy)
        elif _FRONT_END_KEY.fullmatch(name):
            yield from _compare_front_end(case, name)


def _compare_front_end(case: Case, name: str) -> Iterator[Finding]:
    own = case.text("CLERK_PUBLISHABLE_KEY")
    if not own:
        what = f"Only front ends read {name}, and CLERK_PUBLISHABLE_KEY is not set."
        remedy = "Set CLERK_PUBLISHABLE_KEY to the same value."
        yield Finding("publishable_key_misplaced", Level.WARNING, name, what, remedy)
    elif own != case.text(name):
        what = f"{name} and CLERK_PUBLISHABLE_KEY differ: tokens from that front end are refused."
        remedy = "Copy both from the same Clerk instance."
        yield Finding("publishable_keys_differ", Level.WARNING, name, what, remedy)


def check_webhook_secrets(case: Case) -> Iterator[Finding]:
    """Check for ignored or repeated signing secrets, and for a rotation in progress."""
    if case.invalid.intersection(SECRET_VARIABLES):
        return
    secrets, subject = case.settings.webhook_secrets, "signing secret"
    read, unread = SECRET_VARIABLES
    if case.text(read) and case.text(unread) not in ("", case.text(read)):
        what = f"{unread} is ignored because {read} is set to a different value."
        remedy = "Keep the variable with the correct value, and remove the other."
        yield Finding("webhook_secret_unread", Level.WARNING, unread, what, remedy)
    count = len(set(secrets))
    if count < len(secrets):
        what, remedy = "The same signing secret is listed more than once.", "List it once."
        yield Finding("webhook_secret_repeated", Level.WARNING, subject, what, remedy)
    if count > 1:
        what = f"{count} signing secrets are accepted: a rotation is in progress."
        remedy = "Remove the old secret 24 hours after the rotation. Svix uses it until then."
        yield Finding("webhook_secret_rotation", Level.WARNING, subject, what, remedy)
    elif len(secrets) == 1:
        what = "One signing secret is configured."
        yield Finding("webhook_secret_set", Level.OK, subject, what)


def check_instance(case: Case) -> Iterator[Finding]:
    """Check that keys and issuers belong to the same Clerk instance."""
    publishable, secret = case.settings.publishable_key, case.settings.secret_key
    if case.invalid.intersection({"CLERK_PUBLISHABLE_KEY", "CLERK_SECRET_KEY", "CLERK_ISSUER"}):
        return
    if publishable and secret and _kind(publishable) != _kind(secret):
        what = (
            f"The publishable key belongs to a {_kind(publishable)} instance, the secret key to a "
            f"{_kind(secret)} instance."
        )
        remedy = "Copy both from the same instance: Clerk Dashboard → API keys."
        yield Finding("keys_of_two_instances", Level.ERROR, "API keys", what, remedy)
    yield from _check_issuers(case.settings.issuers, publishable)


def _check_issuers(issuers: Sequence[str], publishable: str | None) -> Iterator[Finding]:
    subject, listed = "CLERK_ISSUER", ", ".join(issuers)
    own = f"https://{parse_publishable_key(publishable)}" if publishable else None
    if own is not None and own not in issuers:
        what = f"CLERK_ISSUER is {listed}, but the publishable key's issuer is {own}."
        remedy = (
            "Unset CLERK_ISSUER unless Clerk is behind your own proxy. Tokens from any other "
            "issuer are refused."
        )
        yield Finding("issuer_differs", Level.WARNING, subject, what, remedy)
    if len(set(issuers)) > 1:
        what = f"Session tokens from {len(set(issuers))} issuers are accepted: {listed}."
        remedy = "List several issuers only while your instance moves to another domain or proxy."
        yield Finding("issuers_several", Level.WARNING, subject, what, remedy)


def _kind(key: str) -> str:
    return "production" if key[3:7] == "live" else "development"


def check_authorized_parties(case: Case) -> Iterator[Finding]:
    """Check that authorized parties are set, and that production allows no local origins."""
    parties, name = case.settings.authorized_parties, "CLERK_AUTHORIZED_PARTIES"
    if name in case.invalid:
        return
    local = [party for party in parties if is_loopback(urlsplit(party).hostname or "")]
    keys = (case.settings.publishable_key, case.settings.secret_key)
    is_live = any(key and _kind(key) == "production" for key in keys)
    if not parties:
        what = (
            "Bearer tokens are accepted regardless of their origin. Cookies are refused, and "
            "browsers cannot call /api/me from other origins."
        )
        remedy = f"Set {name}. {VARIABLES[name]}"
        yield Finding("authorized_parties_unset", Level.WARNING, name, what, remedy)
    elif local and is_live:
        what = f"The key is a production key, but tokens from {', '.join(local)} are accepted."
        remedy = "List only production origins."
        yield Finding("authorized_parties_local", Level.WARNING, name, what, remedy)
    else:
        names = ["native clients" if party == NATIVE else party for party in parties]
        what = f"Tokens from {', '.join(names)} are accepted."
        yield Finding("authorized_parties_set", Level.OK, name, what)


def check_env_file(case: Case) -> Iterator[Finding]:
    """Check that only this user can read the service's ``.env``."""
    if not isinstance(case.settings, ServiceSettings):
        return
    file, subject = case.project / ".env", ".env"
    if not file.exists():
        what = "The file does not exist: only the environment is read."
        yield Finding("env_file_absent", Level.OK, subject, what)
    elif file.stat().st_mode & 0o044:
        what = "Other users of this machine can read the file."
        yield Finding("env_file_readable", Level.WARNING, subject, what, "chmod 600 .env")
    else:
        what = "No other user of this machine can read the file."
        yield Finding("env_file_private", Level.OK, subject, what)
