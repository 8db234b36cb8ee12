"""Checks of the keys, the clock and the Backend API. They send requests to Clerk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from clerkhooks.clerk.backend_api import API_VERSION, BackendApi
from clerkhooks.clerk.download import Connection, download
from clerkhooks.clerk.signing_keys import FetchedKeys, fetch_key_set
from clerkhooks.doctor import findings
from clerkhooks.doctor.findings import Case, Finding, Level, count, run_with_timeout
from clerkhooks.errors import PROXY_REMEDY, BackendApiError, ProxyUrlError, describe
from clerkhooks.web.auth import find_keys

MAX_TOKEN_SKEW = 5.0  # the leeway for session tokens, in seconds
MAX_WEBHOOK_SKEW = 300.0  # Svix's tolerance for timestamps, in seconds
KEY_VARIABLES = (
    "CLERK_JWT_KEY",
    "CLERK_PUBLISHABLE_KEY",
    "CLERK_JWKS_URL",
    "CLERK_SECRET_KEY",
    "CLERK_API_URL",
)
RETIRED = Finding(
    "api_version_retired",
    Level.ERROR,
    "Backend API",
    f"Clerk no longer accepts version {API_VERSION} of its Backend API, so every sync fails.",
    "Upgrade clerkhooks. Webhooks and session tokens do not depend on this version.",
)


def check_proxies(case: Case) -> Iterator[Finding]:
    """Check that the environment's proxy variables are valid."""
    try:
        Connection(case.settings.api_url, {}, timeout=findings.TIMEOUT, max_size=0).close()
    except ProxyUrlError as error:
        what = f"{error.what}: Clerk cannot be reached."
        yield Finding("proxy_invalid", Level.ERROR, "proxy", what, PROXY_REMEDY)


def check_keys(case: Case) -> Iterator[Finding]:
    """Check that session tokens can be verified with the keys of this instance."""
    keys, subject = find_keys(case.settings), "session keys"
    if isinstance(keys, FetchedKeys):
        yield _judge_fetch(case, keys)
    elif keys.keys:
        found = count(len(keys.keys), "key")
        what = f"Tokens are verified without network access: {found} configured."
        yield Finding("jwt_keys_configured", Level.OK, subject, what)
        if case.settings.jwks_url:
            yield _compare_keys(case, case.settings.jwks_url, keys.keys)
    elif invalid := [name for name in KEY_VARIABLES if name in case.invalid]:
        verb = "is" if len(invalid) == 1 else "are"
        what = f"No session key could be loaded: {', '.join(invalid)} {verb} malformed."
        yield Finding("keys_skipped", Level.SKIPPED, subject, what)
    else:
        what = "No key for session tokens is configured: protected routes return 503."
        remedy = "Set CLERK_PUBLISHABLE_KEY or CLERK_JWT_KEY: Clerk Dashboard → API keys."
        yield Finding("keys_not_configured", Level.WARNING, subject, what, remedy)


def _judge_fetch(case: Case, keys: FetchedKeys) -> Finding:
    subject = "session keys"
    try:
        found = _fetch_keys(case, keys.url, keys.headers)
    except _NotFetchedError as error:
        what = f"Session tokens cannot be verified: {error}."
        remedy = (
            "Check the network, and that the API keys belong to an existing instance. With "
            "CLERK_JWT_KEY, no network access is needed."
        )
        return Finding("keys_not_fetched", Level.ERROR, subject, what, remedy)
    what = f"{urlsplit(keys.url).hostname} publishes {count(len(found), 'key')} for session tokens."
    return Finding("keys_fetched", Level.OK, subject, what)


def _compare_keys(case: Case, url: str, keys: Sequence[RSAPublicKey]) -> Finding:
    host, subject = urlsplit(url).hostname, "CLERK_JWT_KEY"
    try:
        found = _fetch_keys(case, url, {})
    except _NotFetchedError as error:
        what = f"Not compared with the instance's keys: {error}."
        return Finding("jwt_keys_not_compared", Level.SKIPPED, subject, what)
    published = {key.public_numbers() for key in found.values()}
    if published.isdisjoint(key.public_numbers() for key in keys):
        what = f"{host} does not publish this key, so every token is refused."
        remedy = "Copy the JWT public key of the same instance: Clerk Dashboard → API keys."
        return Finding("jwt_key_of_another_instance", Level.ERROR, subject, what, remedy)
    return Finding("jwt_keys_match", Level.OK, subject, f"{host} publishes this key.")


class _NotFetchedError(Exception):
    """No key could be fetched. The message names the host and the cause."""


def _fetch_keys(case: Case, url: str, headers: Mapping[str, str]) -> dict[str, RSAPublicKey]:
    """
    Return the key set at *url*, which is fetched once per diagnosis.

    Raises:
        _NotFetchedError: the fetch failed, now or in an earlier check.
    """
    request = (url, *headers.items())
    if request not in case.key_sets:
        case.key_sets[request] = _try_to_fetch(url, headers)
    found: dict[str, RSAPublicKey] | _NotFetchedError = case.key_sets[request]
    if isinstance(found, _NotFetchedError):
        raise found
    return found


def _try_to_fetch(
    url: str, headers: Mapping[str, str]
) -> dict[str, RSAPublicKey] | _NotFetchedError:
    try:
        return run_with_timeout(findings.TIMEOUT, lambda: fetch_key_set(url, headers))
    except Exception as error:  # noqa: BLE001  # an endpoint may return anything
        # The message of a parser's ValueError is omitted, because it quotes the input.
        cause = "no key set" if isinstance(error, ValueError) else describe(error)
        host = urlsplit(url).hostname
        return _NotFetchedError(f"no key could be fetched from {host} ({cause})")


def check_clock(case: Case) -> Iterator[Finding]:
    """Compare this machine's clock with Clerk's clock."""
    url = case.settings.api_url
    try:
        offset = run_with_timeout(findings.TIMEOUT, lambda: _measure_clock(url))
    except Exception:  # noqa: BLE001  # an offline machine fails in many ways
        what = f"Not compared: {urlsplit(url).hostname} did not send the time."
        yield Finding("clock_not_compared", Level.SKIPPED, "clock", what)
        return
    remedy = "Synchronize the clock with NTP: timedatectl set-ntp true"
    direction = "ahead of" if offset > 0 else "behind"
    what = f"This machine's clock is {abs(offset):,.0f} s {direction} Clerk's."
    if abs(offset) > MAX_WEBHOOK_SKEW:
        what = f"{what} Every webhook is refused."
        yield Finding("clock_wrong", Level.ERROR, "clock", what, remedy)
    elif abs(offset) > MAX_TOKEN_SKEW:
        what = f"{what} Session tokens may be refused."
        yield Finding("clock_off", Level.WARNING, "clock", what, remedy)
    else:
        what = "This machine's clock agrees with Clerk's to within 5 seconds."
        yield Finding("clock_right", Level.OK, "clock", what)


def _measure_clock(url: str) -> float:
    """Return by how many seconds this machine's clock is ahead of the clock at *url*."""
    before = time.time()
    answer = download(url, {}, timeout=findings.TIMEOUT / 2, max_size=1024 * 1024)
    date = parsedate_to_datetime(answer.headers["Date"])
    # The Date header contains only whole seconds.
    return (before + time.time()) / 2 - (date.timestamp() + 0.5)


def check_secret_key(case: Case) -> Iterator[Finding]:
    """Check that Clerk's Backend API accepts the secret key."""
    key, subject = case.settings.secret_key, "CLERK_SECRET_KEY"
    if subject in case.invalid:
        return
    if key is None:
        what = f"It is not set. {case.program.command} sync needs it."
        yield Finding("secret_key_unset", Level.SKIPPED, subject, what)
    else:
        yield _judge_secret_key(case.settings.api_url, key)


def _judge_secret_key(api_url: str, key: str) -> Finding:
    subject = "CLERK_SECRET_KEY"
    try:
        users = _count_users(api_url, key, API_VERSION)
    except TimeoutError:
        what = "Skipped: Clerk's Backend API did not respond in time."
        return Finding("secret_key_not_tried", Level.SKIPPED, subject, what)
    except BackendApiError as error:
        if error.reason in ("rate_limited", "api_unreachable", "proxy_invalid"):
            what = f"Skipped: no usable response from Clerk's Backend API ({error.reason})."
            return Finding("secret_key_not_tried", Level.SKIPPED, subject, what)
        if error.reason == "answer_unusable" and _is_retired(api_url, key):
            return RETIRED
        what, _, remedy = str(error).partition("\n")
        return Finding("secret_key_refused", Level.ERROR, subject, what, remedy)
    what = f"Clerk's Backend API accepts it; the instance has {count(users, 'user')}."
    return Finding("secret_key_accepted", Level.OK, subject, what)


def _count_users(api_url: str, key: str, version: str | None) -> int:
    limit = findings.TIMEOUT / 2
    with BackendApi(api_url, key, patience=limit, timeout=limit, version=version) as api:
        return run_with_timeout(findings.TIMEOUT, api.count_users)


def _is_retired(api_url: str, key: str) -> bool:
    """
    Return whether Clerk accepts a request only if it does not name our API version.

    Clerk does not document how it refuses a retired version.
    """
    try:
        _count_users(api_url, key, None)
    except (TimeoutError, BackendApiError):
        return False
    return True


def compare_instances(case: Case) -> Iterator[Finding]:
    """Compare key ids to check that both API keys belong to the same instance."""
    settings = case.settings
    publishable, secret, url = settings.publishable_key, settings.secret_key, settings.jwks_url
    if not case.invalid.isdisjoint(KEY_VARIABLES[1:]) or not (publishable and secret and url):
        return
    # A production key and a development key never match, so no request is needed for them.
    if publishable[3:7] == secret[3:7]:
        headers = {"Authorization": f"Bearer {secret}"}
        yield _compare_key_ids(case, f"{settings.api_url}/v1/jwks", headers, url)


def _compare_key_ids(
    case: Case, secret_url: str, headers: Mapping[str, str], publishable_url: str
) -> Finding:
    subject = "API keys"
    try:
        secret_keys = _fetch_keys(case, secret_url, headers)
        publishable_keys = _fetch_keys(case, publishable_url, {})
    except _NotFetchedError as error:
        return Finding("instances_not_compared", Level.SKIPPED, subject, f"Not compared: {error}.")
    if secret_keys.keys().isdisjoint(publishable_keys):
        what = (
            "The secret key and the publishable key belong to different instances: the keys at "
            f"{urlsplit(secret_url).hostname} and {urlsplit(publishable_url).hostname} differ."
        )
        remedy = "Copy both from the same instance: Clerk Dashboard → API keys."
        return Finding("keys_of_two_instances", Level.ERROR, subject, what, remedy)
    what = "The secret key and the publishable key belong to the same instance."
    return Finding("keys_of_one_instance", Level.OK, subject, what)
