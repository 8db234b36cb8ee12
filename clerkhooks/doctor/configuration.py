"""Checks of the variables, and of the file that they may come from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from clerkhooks.doctor.findings import Case, Finding, Level
from clerkhooks.parsing import NATIVE, parse_publishable_key
from clerkhooks.settings import SECRET_VARIABLES, VARIABLES, ServiceSettings

# Variables of Clerk's own SDKs, which may share an environment with this program.
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
    """Check that no variable is misspelt, or set only under a name that front ends read."""
    for name in sorted(case.values):
        if not case.text(name):
            continue
        if name.startswith("CLERK_") and name not in VARIABLES and not _OF_OTHERS.fullmatch(name):
            near = difflib.get_close_matches(name, VARIABLES, 1)
            remedy = "Remove it, unless another program reads it."
            if near:
                remedy = f"Did you mean {near[0]}?"
            what = f"{name} is set, but clerkhooks has no such variable."
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
        what = (
            f"{name} and CLERK_PUBLISHABLE_KEY are different keys: tokens of that front end are "
            "refused."
        )
        remedy = "Copy both from the same Clerk instance."
        yield Finding("publishable_keys_differ", Level.WARNING, name, what, remedy)


def check_webhook_secrets(case: Case) -> Iterator[Finding]:
    """Check that one signing secret is configured, and only once."""
    if case.invalid.intersection(SECRET_VARIABLES):
        return
    secrets, subject = case.settings.webhook_secrets, "signing secret"
    first, second = map(case.text, SECRET_VARIABLES)
    if first and second and first != second:
        name = SECRET_VARIABLES[1]
        what = f"{name} is ignored because {SECRET_VARIABLES[0]} is set to another value."
        remedy = "Keep the right one and remove the other."
        yield Finding("webhook_secret_unread", Level.WARNING, name, what, remedy)
    if len(set(secrets)) < len(secrets):
        what = "The same signing secret is listed twice."
        yield Finding(
            "webhook_secret_repeated", Level.WARNING, subject, what, "Remove one of them."
        )
    if len(set(secrets)) > 1:
        what = f"{len(set(secrets))} signing secrets are accepted: a rotation is in progress."
        remedy = (
            "Svix signs with the old secret for 24 hours after a rotation. Remove the old secret "
            "after that."
        )
        yield Finding("webhook_secret_rotation", Level.WARNING, subject, what, remedy)
    elif len(secrets) == 1:
        what = "One signing secret is configured."
        yield Finding("webhook_secret_set", Level.OK, subject, what)


def check_instance(case: Case) -> Iterator[Finding]:
    """Check that keys and issuers belong to one Clerk instance."""
    publishable, secret = case.settings.publishable_key, case.settings.secret_key
    if case.invalid.intersection({"CLERK_PUBLISHABLE_KEY", "CLERK_SECRET_KEY", "CLERK_ISSUER"}):
        return
    if publishable and secret and publishable[3:7] != secret[3:7]:
        what = (
            f"The publishable key belongs to a {_kind(publishable)} instance, the secret key to a "
            f"{_kind(secret)} instance."
        )
        remedy = "Copy both from the same instance: Clerk Dashboard, API keys."
        yield Finding("keys_of_two_instances", Level.ERROR, "API keys", what, remedy)
    yield from _check_issuers(case.settings.issuers, publishable)


def _check_issuers(issuers: Sequence[str], publishable: str | None) -> Iterator[Finding]:
    subject = "CLERK_ISSUER"
    own = f"https://{parse_publishable_key(publishable)}" if publishable else None
    if own is not None and own not in issuers:
        what = f"CLERK_ISSUER is {', '.join(issuers)}, but the publishable key's issuer is {own}."
        remedy = (
            "Unset CLERK_ISSUER unless Clerk is behind a proxy of your own. Tokens of any other "
            "issuer are refused."
        )
        yield Finding("issuer_differs", Level.WARNING, subject, what, remedy)
    if len(set(issuers)) > 1:
        what = f"Session tokens of {len(set(issuers))} issuers are accepted: {', '.join(issuers)}."
        remedy = "List several only while your instance moves to another domain or proxy."
        yield Finding("issuers_several", Level.WARNING, subject, what, remedy)


def _kind(key: str) -> str:
    return "production" if key[3:7] == "live" else "development"


def check_authorized_parties(case: Case) -> Iterator[Finding]:
    """Check that the origins which may hold a session token are listed."""
    parties, name = case.settings.authorized_parties, "CLERK_AUTHORIZED_PARTIES"
    if name in case.invalid:
        return
    local = [party for party in parties if _is_local(urlsplit(party).hostname or "")]
    keys = (case.settings.publishable_key, case.settings.secret_key)
    is_live = any(key and _kind(key) == "production" for key in keys)
    if not parties:
        what = "Bearer tokens of any origin are accepted; cookies and cross-origin calls are not."
        remedy = f"Set {name}. {VARIABLES[name]}"
        yield Finding("authorized_parties_unset", Level.WARNING, name, what, remedy)
    elif local and is_live:
        what = f"The key is a production key, but tokens of {', '.join(local)} are accepted."
        remedy = "List only the origins of production."
        yield Finding("authorized_parties_local", Level.WARNING, name, what, remedy)
    else:
        accepted = [party for party in parties if party != NATIVE]
        if NATIVE in parties:
            accepted.append("native clients")
        what = f"Tokens of {', '.join(accepted)} are accepted."
        yield Finding("authorized_parties_set", Level.OK, name, what)


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.endswith(".localhost") or host.startswith("127.")


def check_env_file(case: Case) -> Iterator[Finding]:
    """Check that only this user can read the service's ``.env``."""
    if not isinstance(case.settings, ServiceSettings):
        return
    file = case.project / ".env"
    if not file.exists():
        what = "There is no such file: only the environment is read."
        yield Finding("env_file_absent", Level.OK, ".env", what)
        return
    what = "No other user of this machine can read it."
    yield from _judge_permissions(file) or [Finding("env_file_private", Level.OK, ".env", what)]


def _judge_permissions(file: Path) -> list[Finding]:
    if not file.stat().st_mode & 0o044:
        return []
    what = "Other users of this machine can read it."
    return [Finding("env_file_readable", Level.WARNING, ".env", what, "chmod 600 .env")]
