"""What integrators get wrong: each check looks at one thing, says what it found and how to mend it, and prints nothing."""

from __future__ import annotations

import base64
import difflib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from flask import Flask
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from clerkhooks import reports
from clerkhooks.auth import find_keys
from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.signing_keys import FetchedKeys, download, parse_key_set
from clerkhooks.errors import BackendApiError, Fault, SettingsError, describe
from clerkhooks.models import autocommit, db, init_database
from clerkhooks.ops import current_revisions, own_revisions
from clerkhooks.settings import PROJECT, VARIABLES, Settings, parse_publishable_key

T = TypeVar("T")
SECONDS = 5.0  # for one question to somebody else
DATABASE_SECONDS = 15.0  # for all questions to the database, each of which has its own limit
CLOCK_WARNING, CLOCK_WRONG = 5.0, 300.0  # seconds: the leeway of session tokens, the tolerance of Svix's timestamps
SILENCE = timedelta(days=7)
UPGRADE = "flask --app wsgi db upgrade"
PLACEHOLDER = "whsec_" + base64.b64encode(bytes(24)).decode()
SECRET_VARIABLES = ("CLERK_WEBHOOK_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET")
KEY_VARIABLES = ("CLERK_JWT_KEY", "CLERK_PUBLISHABLE_KEY", "CLERK_JWKS_URL", "CLERK_SECRET_KEY", "CLERK_API_URL")
# What Clerk's own SDKs read, and may share an environment with us.
_OF_OTHERS = re.compile(
    r"CLERK_(SIGN_(IN|UP)_.*|.*REDIRECT_URL|TELEMETRY_.*|DOMAIN|IS_SATELLITE|PROXY_URL|JS_.*|API_VERSION|ENCRYPTION_KEY|MACHINE_.*|FAPI|DEBUG)"
)
_FRONT_END_KEY = re.compile(r"(NEXT_PUBLIC|VITE|REACT_APP|EXPO_PUBLIC|NUXT_PUBLIC|PUBLIC|GATSBY)_CLERK_PUBLISHABLE_KEY")


class Level(StrEnum):
    """How much a finding matters; only what is wrong makes the whole diagnosis bad."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: a stable *code*, what it is about, what is the case, and what to do about it. No secret is in it."""

    code: str
    level: Level
    subject: str
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Case:
    """What is examined: *settings* without the *faults*, so that one wrong variable hides nothing else."""

    environ: Mapping[str, str]
    settings: Settings
    faults: tuple[Fault, ...]
    project: Path

    @cached_property
    def wrong(self) -> frozenset[str]:
        """The variables that cannot work."""
        return frozenset(fault.variable for fault in self.faults)

    @cached_property
    def offset(self) -> float | None:
        """Seconds that this machine's clock is ahead of Clerk's; None where Clerk's is not to be had."""
        try:
            return _within(SECONDS, lambda: _measure_clock(self.settings.api_url))
        except Exception:  # noqa: BLE001  # offline, in whichever of the many ways
            return None

    def text(self, variable: str) -> str:
        """The value of a variable; one that is empty counts as unset."""
        return self.environ.get(variable, "").strip()


Check = Callable[[Case], Iterator[Finding]]


def diagnose(environ: Mapping[str, str], *, unread: Sequence[Fault] = (), project: Path = PROJECT) -> Iterator[Finding]:
    """
    Everything that is found in *environ* and behind it, well or not, check by check.

    *unread*: faults that were met before, such as those of a .env file. Takes at most some seconds a check, changes nothing
    and raises nothing.
    """
    settings, faults = read_settings(environ)
    case = Case(environ, settings, (*unread, *faults), project)
    for check in CHECKS:
        try:
            yield from check(case)
        except Exception as error:  # noqa: BLE001  # one check that breaks on odd settings must not hide the others
            yield Finding(
                "check_broken",
                Level.WRONG,
                check.__name__.removeprefix("check_"),
                f"This check broke: {describe(error)}.",
                "Look at the findings above first.",
            )


def read_settings(environ: Mapping[str, str]) -> tuple[Settings, tuple[Fault, ...]]:
    """What is good in *environ*, and what is not. Where no signing secret is good, a placeholder stands for it."""
    try:
        return Settings.from_environ(environ), ()
    except SettingsError as error:
        faults = error.faults
    wrong = {fault.variable for fault in faults}
    usable = {name: value for name, value in environ.items() if name not in wrong | {"DYNO"}}
    if wrong.intersection(SECRET_VARIABLES):
        usable[SECRET_VARIABLES[0]] = PLACEHOLDER
    return Settings.from_environ(usable), faults


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


def check_database(case: Case) -> Iterator[Finding]:
    """The database answers, is migrated, and its users and messages are well."""
    if "DATABASE_URL" in case.wrong:
        yield Finding("database_skipped", Level.SKIPPED, "database", "Not asked, for DATABASE_URL is wrong.")
        return
    url = make_url(case.settings.database_url)
    is_sqlite = url.get_backend_name() == "sqlite"
    if is_sqlite and case.text("DYNO"):
        what = "SQLite lies on this platform's disk, which is thrown away with every restart."
        yield Finding("sqlite_on_platform", Level.WRONG, "database", what, "Attach a PostgreSQL, whose URL comes as DATABASE_URL.")
    where = _name_database(case)
    # To open SQLite makes the file, and this changes nothing.
    if (
        is_sqlite
        and not (url.database or "").startswith("file:")
        and not Path(Flask("clerkhooks").instance_path, url.database or "").exists()
    ):
        yield Finding("database_not_migrated", Level.WRONG, "database", f"{where} is not there yet.", f"Make it: {UPGRADE}")
        return
    try:
        yield from _within(DATABASE_SECONDS, lambda: _look_into_database(case.settings.database_url, where))
    except (SQLAlchemyError, TimeoutError) as error:
        remedy = f"Is it running, and reachable from here, with this user and password? {VARIABLES['DATABASE_URL']}"
        yield Finding("database_unreachable", Level.WRONG, "database", f"{where} does not answer ({describe(error)}).", remedy)


def _name_database(case: Case) -> str:
    """Kind, host and name, without user and password."""
    url = make_url(case.settings.database_url)
    if url.get_backend_name() == "sqlite":
        return f"SQLite in {(url.database or '').partition('?')[0]}"
    # With an @ that nobody escaped, a part of the password is taken for the host or the name.
    if case.text("DATABASE_URL").count("@") > 1:
        return "PostgreSQL (its URL has more than one @; in a password write %40)"
    host = url.host or url.query.get("host") or "the local socket"
    return f"PostgreSQL on {host if isinstance(host, str) else ','.join(host)}, {url.database or 'its default database'},"


def _look_into_database(database_url: str, where: str) -> list[Finding]:
    app = Flask("clerkhooks")
    init_database(app, database_url)
    with app.app_context():
        try:
            with autocommit() as connection:
                current = current_revisions(connection)
            newest, known = own_revisions(str(PROJECT / "migrations"))
            schema = _judge_schema(current, newest, known, where)
            if schema.level is Level.WRONG:
                return [schema]
            return [schema, _judge_failures(), _judge_last_webhook(), _judge_unfilled()]
        finally:
            db.session.remove()
            db.engine.dispose()


def _judge_schema(current: set[str], newest: frozenset[str], known: frozenset[str], where: str) -> Finding:
    if current - known:
        remedy = "Deploy that release here as well, or expect it to be rolled out now."
        return Finding("schema_newer", Level.WARNING, "database", f"{where} is at a migration of a later release.", remedy)
    if not current >= newest:
        what = f"{where} answers, and is {'at an older migration' if current else 'not migrated'}."
        return Finding("database_not_migrated", Level.WRONG, "database", what, f"Migrate: {UPGRADE}")
    return Finding("database_ready", Level.OK, "database", f"{where} answers and is at the newest migration.")


def _judge_failures() -> Finding:
    failed = reports.count_failures(datetime.now(UTC) - timedelta(days=1))
    if not failed:
        return Finding("messages_well", Level.OK, "webhooks", "No message of the last day is left failed.")
    remedy = "See why: flask --app wsgi webhooks log --failed. Then: flask --app wsgi users sync --failed"
    return Finding(
        "messages_failed", Level.WRONG, "webhooks", f"Of the last day's messages {failed:,} failed, and no retry has succeeded.", remedy
    )


def _judge_last_webhook() -> Finding:
    last = reports.find_last_received()
    if last is None:
        remedy = "Try it without Clerk: flask --app wsgi webhooks send user.created. Then look at Clerk Dashboard, Webhooks, your endpoint."
        return Finding("webhook_never_received", Level.WARNING, "webhooks", "No verified webhook has ever come.", remedy)
    age = datetime.now(UTC) - last
    what = f"The last verified webhook came {age / timedelta(hours=1):,.1f} hours ago."
    if age > SILENCE:
        remedy = (
            "If that is odd, look at the attempts in Clerk Dashboard, Webhooks, your endpoint; Svix switches off one that keeps failing."
        )
        return Finding("webhooks_silent", Level.WARNING, "webhooks", what, remedy)
    return Finding("webhook_received", Level.OK, "webhooks", what)


def _judge_unfilled() -> Finding:
    unfilled = reports.count_unfilled(timedelta(hours=1))
    if not unfilled:
        return Finding("users_filled", Level.OK, "users", "No row has waited for its webhook for more than an hour.")
    what = f"Users without a profile after an hour, for no webhook has filled them in: {unfilled:,}."
    remedy = "Is the endpoint subscribed to user.created and user.updated? Then: flask --app wsgi users sync --missing"
    return Finding("users_unfilled", Level.WRONG, "users", what, remedy)


def check_keys(case: Case) -> Iterator[Finding]:
    """There are keys to verify session tokens with, and they are this instance's."""
    keys, subject = find_keys(case.settings), "session keys"
    if isinstance(keys, FetchedKeys):
        yield _judge_fetch(keys)
    elif keys.keys:
        yield Finding("jwt_keys_configured", Level.OK, subject, f"Tokens are verified without a network: {_count(keys.keys)} configured.")
        if case.settings.jwks_url:
            yield _compare_keys(case.settings.jwks_url, keys.keys)
    elif wrong := [name for name in KEY_VARIABLES if name in case.wrong]:
        yield Finding("keys_skipped", Level.SKIPPED, subject, f"No key is known, for of {', '.join(wrong)} nothing can be read.")
    else:
        remedy = "Set CLERK_PUBLISHABLE_KEY or CLERK_JWT_KEY: Clerk Dashboard, API keys."
        yield Finding(
            "keys_not_configured", Level.WARNING, subject, "There is no key for session tokens: protected routes answer 503.", remedy
        )


def _judge_fetch(keys: FetchedKeys) -> Finding:
    host = urlsplit(keys.url).hostname
    try:
        found = _fetch_keys(keys.url, keys.headers)
    except Exception as error:  # noqa: BLE001  # whatever an endpoint may answer
        remedy = "Is the network open, and are the keys of an instance that exists? To need no network, set CLERK_JWT_KEY."
        return Finding("keys_not_fetched", Level.WRONG, "session keys", f"{host} gives no keys ({_say(error)}).", remedy)
    return Finding("keys_fetched", Level.OK, "session keys", f"{host} gives {_count(found)} for session tokens.")


def _compare_keys(url: str, keys: Sequence[RSAPublicKey]) -> Finding:
    host, subject = urlsplit(url).hostname, "CLERK_JWT_KEY"
    try:
        found = _fetch_keys(url, {})
    except Exception as error:  # noqa: BLE001  # whatever an endpoint may answer
        return Finding(
            "jwt_keys_not_compared", Level.SKIPPED, subject, f"Not compared with the instance's keys: {host} gives none ({_say(error)})."
        )
    if not {key.public_numbers() for key in keys} & {key.public_numbers() for key in found.values()}:
        remedy = "Copy the JWT public key of the same instance: Clerk Dashboard, API keys. Until then every token is refused."
        return Finding("jwt_key_of_another_instance", Level.WRONG, subject, f"It is none of the keys that {host} publishes.", remedy)
    return Finding("jwt_keys_match", Level.OK, subject, f"It is a key that {host} publishes.")


def _fetch_keys(url: str, headers: Mapping[str, str]) -> dict[str, RSAPublicKey]:
    return _within(SECONDS, lambda: parse_key_set(download(url, headers)))


def _count(keys: Sequence[object] | Mapping[str, object]) -> str:
    return "1 key" if len(keys) == 1 else f"{len(keys)} keys"


def _say(error: Exception) -> str:
    """What went wrong. A ValueError's text is our own or a parser's, and quotes nothing only where it is ours."""
    return "no such key set" if isinstance(error, ValueError) else describe(error)


def check_clock(case: Case) -> Iterator[Finding]:
    """The clock of this machine is Clerk's."""
    offset, remedy = case.offset, "Let the machine keep time by NTP: timedatectl set-ntp true"
    if offset is None:
        yield Finding(
            "clock_not_compared",
            Level.SKIPPED,
            "clock",
            f"Not compared with Clerk's: {urlsplit(case.settings.api_url).hostname} does not say.",
        )
        return
    what = f"This machine's clock is {abs(offset):,.0f} s {'ahead of' if offset > 0 else 'behind'} Clerk's."
    if abs(offset) > CLOCK_WRONG:
        yield Finding("clock_wrong", Level.WRONG, "clock", f"{what} Every webhook is refused.", remedy)
    elif abs(offset) > CLOCK_WARNING:
        yield Finding("clock_off", Level.WARNING, "clock", f"{what} Session tokens may be refused.", remedy)
    else:
        yield Finding("clock_right", Level.OK, "clock", "This machine's clock is right, to some seconds.")


def _measure_clock(url: str) -> float:
    before = time.time()
    with httpx.stream("GET", url, timeout=SECONDS / 2, follow_redirects=False, verify=urlsplit(url).scheme != "http") as response:
        after = time.time()
        said = parsedate_to_datetime(response.headers["Date"])
    # The header leaves out the part of the second.
    return (before + after) / 2 - (said.replace(tzinfo=said.tzinfo or UTC).timestamp() + 0.5)


def check_secret_key(case: Case) -> Iterator[Finding]:
    """Clerk's Backend API takes the secret key."""
    key, subject = case.settings.secret_key, "CLERK_SECRET_KEY"
    if subject in case.wrong:
        return
    if key is None:
        yield Finding("secret_key_unset", Level.SKIPPED, subject, "Not set: flask --app wsgi users sync needs it.")
    elif case.offset is None:
        yield Finding("secret_key_not_tried", Level.SKIPPED, subject, "Not tried, for Clerk's Backend API cannot be reached from here.")
    else:
        yield _judge_secret_key(case.settings.api_url, key)


def _judge_secret_key(api_url: str, key: str) -> Finding:
    subject = "CLERK_SECRET_KEY"
    try:
        with BackendApi(api_url, key, patience=SECONDS / 2, timeout=SECONDS / 2) as api:
            count = _within(SECONDS, api.count_users)
    except TimeoutError:
        return Finding("secret_key_not_tried", Level.SKIPPED, subject, "Not tried, for Clerk's Backend API did not answer in time.")
    except BackendApiError as error:
        what, _, remedy = str(error).partition("\n")
        if error.reason in ("rate_limited", "api_unreachable"):
            return Finding("secret_key_not_tried", Level.SKIPPED, subject, what, remedy)
        return Finding("secret_key_refused", Level.WRONG, subject, what, remedy)
    return Finding("secret_key_accepted", Level.OK, subject, f"Clerk's Backend API takes it; the instance has {count:,} users.")


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


def _within(seconds: float, work: Callable[[], T]) -> T:
    """
    What *work* gives. It goes on in a thread of its own when it is given up, as where the resolver hangs.

    Raises:
        TimeoutError: if it takes longer.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # it is raised again where somebody waits
            future.set_exception(error)

    threading.Thread(target=run, name="diagnosis", daemon=True).start()
    return future.result(seconds)


CHECKS: tuple[Check, ...] = (
    check_settings,
    check_names,
    check_env_file,
    check_webhook_secrets,
    check_instance,
    check_authorized_parties,
    check_keys,
    check_clock,
    check_secret_key,
    check_database,
)
