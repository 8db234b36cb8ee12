"""Whether the variables, and the file that they may come from, are as they should be."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from clerkhooks.diagnosis.findings import SECONDS, Case, Finding, Level
from clerkhooks.settings import VARIABLES, parse_publishable_key

SECRET_VARIABLES = ("CLERK_WEBHOOK_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET")
# What Clerk's own SDKs read, and may share an environment with us.
_OF_OTHERS = re.compile(
    r"CLERK_(SIGN_(IN|UP)_.*|.*REDIRECT_URL|TELEMETRY_.*|DOMAIN|IS_SATELLITE|PROXY_URL|JS_.*|API_VERSION|ENCRYPTION_KEY|MACHINE_.*|FAPI|DEBUG)"
)
_FRONT_END_KEY = re.compile(r"(NEXT_PUBLIC|VITE|REACT_APP|EXPO_PUBLIC|NUXT_PUBLIC|PUBLIC|GATSBY)_CLERK_PUBLISHABLE_KEY")


def check_settings(case: Case) -> Iterator[Finding]:
    """Every variable is one that can work."""
    for fault in case.faults:
        yield Finding("variable_wrong", Level.WRONG, fault.variable, f"{fault.variable} {fault.problem}", fault.remedy)
    if not case.faults:
        yield Finding("settings_valid", Level.OK, "settings", "Every variable is well-formed.")


def check_names(case: Case) -> Iterator[Finding]:
    """No variable is misspelt, or left where only a front end looks for it."""
    for name in sorted(case.environ):
        if name.startswith("CLERK_") and name not in VARIABLES and not _OF_OTHERS.fullmatch(name) and case.text(name):
            near = difflib.get_close_matches(name, VARIABLES, 1)
            remedy = f"Did you mean {near[0]}?" if near else "Remove it, unless another program here reads it."
            yield Finding("variable_unknown", Level.WARNING, name, f"{name} is set, and nothing here reads it.", remedy)
        elif _FRONT_END_KEY.fullmatch(name) and case.text(name):
            yield from _compare_front_end(case, name)


def _compare_front_end(case: Case, name: str) -> Iterator[Finding]:
    own = case.text("CLERK_PUBLISHABLE_KEY")
    if not own:
        what = f"{name} is read by front ends only, and CLERK_PUBLISHABLE_KEY is not set."
        yield Finding("publishable_key_misplaced", Level.WARNING, name, what, "Set CLERK_PUBLISHABLE_KEY to the same value.")
    elif own != case.text(name):
        what = f"{name} and CLERK_PUBLISHABLE_KEY are not the same key: tokens of that front end will be refused."
        yield Finding("publishable_keys_differ", Level.WARNING, name, what, "Take both from the same Clerk instance.")


def check_webhook_secrets(case: Case) -> Iterator[Finding]:
    """One signing secret is configured, and once."""
    if case.wrong.intersection(SECRET_VARIABLES):
        return
    secrets = case.settings.webhook_secrets
    first, second = map(case.text, SECRET_VARIABLES)
    if first and second and first != second:
        what = f"{SECRET_VARIABLES[1]} is not read, for {SECRET_VARIABLES[0]} is set to something else."
        yield Finding("webhook_secret_unread", Level.WARNING, SECRET_VARIABLES[1], what, "Keep the right one, and remove the other.")
    if len(set(secrets)) < len(secrets):
        yield Finding(
            "webhook_secret_repeated", Level.WARNING, "signing secret", "The same signing secret is listed twice.", "Remove one of them."
        )
    if len(set(secrets)) > 1:
        what = f"{len(set(secrets))} signing secrets are accepted: a rotation is under way."
        remedy = (
            "Once the Dashboard shows deliveries only under the new secret (Svix signs with the old one for 24 hours), remove the old one."
        )
        yield Finding("webhook_secret_rotation", Level.WARNING, "signing secret", what, remedy)
    elif len(secrets) == 1:
        yield Finding("webhook_secret_set", Level.OK, "signing secret", "One signing secret is configured.")


def check_instance(case: Case) -> Iterator[Finding]:
    """Keys and issuer are those of one Clerk instance."""
    publishable, secret, issuer = case.settings.publishable_key, case.settings.secret_key, case.settings.issuer
    if case.wrong.intersection({"CLERK_PUBLISHABLE_KEY", "CLERK_SECRET_KEY", "CLERK_ISSUER"}):
        return
    if publishable and secret and publishable[3:7] != secret[3:7]:
        what = f"The publishable key is of a {_kind(publishable)} instance, the secret key of a {_kind(secret)} one."
        yield Finding(
            "keys_of_two_instances", Level.WRONG, "API keys", what, "Take both from the same instance: Clerk Dashboard, API keys."
        )
    if publishable and issuer != (own := f"https://{parse_publishable_key(publishable)}"):
        what = f"CLERK_ISSUER is {issuer}, and the publishable key says {own}."
        remedy = "Unset CLERK_ISSUER, unless Clerk is behind a proxy of your own: tokens of any other issuer are refused."
        yield Finding("issuer_differs", Level.WARNING, "CLERK_ISSUER", what, remedy)


def _kind(key: str) -> str:
    return "production" if key[3:7] == "live" else "development"


def check_authorized_parties(case: Case) -> Iterator[Finding]:
    """It is said whose pages may hold a token."""
    parties, name = case.settings.authorized_parties, "CLERK_AUTHORIZED_PARTIES"
    if name in case.wrong:
        return
    local = [party for party in parties if _is_local(urlsplit(party).hostname or "")]
    is_live = any(key and key[3:7] == "live" for key in (case.settings.publishable_key, case.settings.secret_key))
    if not parties:
        what = "Tokens of any origin are accepted, cookies and cross-origin calls are not."
        yield Finding("authorized_parties_unset", Level.WARNING, name, what, f"Set {name}. {VARIABLES[name]}")
    elif local and is_live:
        what = f"With a key of production, pages of {', '.join(local)} may hold a token."
        yield Finding("authorized_parties_local", Level.WARNING, name, what, "Leave only the origins of production.")
    else:
        yield Finding("authorized_parties_set", Level.OK, name, f"Tokens of {', '.join(parties)} are accepted.")


def _is_local(host: str) -> bool:
    return host in ("localhost", "::1") or host.endswith(".localhost") or host.startswith("127.")


def check_env_file(case: Case) -> Iterator[Finding]:
    """What .env holds stays on this machine."""
    file = case.project / ".env"
    if not file.exists():
        yield Finding("env_file_absent", Level.OK, ".env", "There is none: the environment alone counts.")
        return
    found = [*_judge_git(case.project), *_judge_permissions(file)]
    yield from found or [Finding("env_file_private", Level.OK, ".env", "It is ignored by git, and nobody else can read it.")]


def _judge_git(project: Path) -> Iterator[Finding]:
    tracked = _git(project, "ls-files", "--error-unmatch", ".env")
    if tracked == 0:
        remedy = "git rm --cached .env, commit, and then replace every secret in it: the history keeps them."
        yield Finding(
            "env_file_committed", Level.WRONG, ".env", "It is in git's index: everybody with the repository has its secrets.", remedy
        )
    elif tracked != 1:
        yield Finding(
            "env_file_git_unknown", Level.SKIPPED, ".env", "Not looked for in git: there is no repository here that git can read."
        )
    elif _git(project, "check-ignore", "--quiet", ".env") != 0:
        yield Finding(
            "env_file_not_ignored",
            Level.WARNING,
            ".env",
            "git does not ignore it: the next git add takes it.",
            "Add a line .env to .gitignore.",
        )


def _judge_permissions(file: Path) -> Iterator[Finding]:
    if file.stat().st_mode & 0o044:
        yield Finding("env_file_readable", Level.WARNING, ".env", "Other users of this machine can read it.", "chmod 600 .env")


def _git(project: Path, *arguments: str) -> int | None:
    """The exit status; None where git cannot be run."""
    # Within a hook of git these would name another repository.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(project), *arguments]
    try:
        return subprocess.run(command, env=environ, capture_output=True, timeout=SECONDS, check=False).returncode  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
