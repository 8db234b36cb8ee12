"""Whether Clerk, asked over the network, agrees: its keys, its clock, its Backend API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from clerkhooks.auth import find_keys
from clerkhooks.clerk.backend_api import BackendApi
from clerkhooks.clerk.signing_keys import FetchedKeys, download, parse_key_set
from clerkhooks.diagnosis import findings
from clerkhooks.diagnosis.findings import Case, Finding, Level, within
from clerkhooks.errors import BackendApiError, describe

CLOCK_WARNING, CLOCK_WRONG = 5.0, 300.0  # seconds: the leeway of session tokens, the tolerance of Svix's timestamps
KEY_VARIABLES = ("CLERK_JWT_KEY", "CLERK_PUBLISHABLE_KEY", "CLERK_JWKS_URL", "CLERK_SECRET_KEY", "CLERK_API_URL")


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
    return within(findings.SECONDS, lambda: parse_key_set(download(url, headers)))


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
        with BackendApi(api_url, key, patience=findings.SECONDS / 2, timeout=findings.SECONDS / 2) as api:
            count = within(findings.SECONDS, api.count_users)
    except TimeoutError:
        return Finding("secret_key_not_tried", Level.SKIPPED, subject, "Not tried, for Clerk's Backend API did not answer in time.")
    except BackendApiError as error:
        what, _, remedy = str(error).partition("\n")
        if error.reason in ("rate_limited", "api_unreachable"):
            return Finding("secret_key_not_tried", Level.SKIPPED, subject, what, remedy)
        return Finding("secret_key_refused", Level.WRONG, subject, what, remedy)
    return Finding("secret_key_accepted", Level.OK, subject, f"Clerk's Backend API takes it; the instance has {count:,} users.")
