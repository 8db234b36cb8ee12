"""
Compare ways to verify a session token.

    python -m tests.benchmarks.session_tokens

Clerk's own SDK is included if it is installed. Install it with ``pip install clerk-backend-api``;
it is not in any extra of clerkhooks. The rounds of all functions are interleaved, so that other
load on the machine affects all functions equally. The figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import cycle
from statistics import median
from timeit import Timer
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.session_tokens import (
    SessionVerifier,
    TokenRules,
    parse_form,
    verify_signature,
)
from clerkhooks.clerk.signing_keys import ConfiguredKeys

ROUNDS, CALLS = 41, 200
CLERK = FakeClerk()
KEY = CLERK.private_key.public_key()
ISSUER = f"https://{CLERK.frontend_api}"
RULES = TokenRules(frozenset([ISSUER]), frozenset([CLERK.authorized_party]))


def subjects() -> dict[str, Callable[[], object]]:
    """Return the functions to measure, by name. Each call verifies one user's token."""
    tokens = [CLERK.session_token(clerk_id("user"), lifetime=3600) for _ in range(CALLS)]
    token, keys, now = tokens[0], ConfiguredKeys((KEY,)), time.time()
    verifier, form = SessionVerifier(keys, RULES), parse_form(token)
    prepared, next_token = jwt.PyJWK.from_dict(jwk()), cycle(tokens).__next__
    jws = jwt.PyJWS(["RS256"])
    required: dict[str, Any] = {
        "algorithms": ["RS256"],
        "options": {"require": ["exp", "iat", "sub"]},
        "issuer": ISSUER,
    }
    found: dict[str, Callable[[], object]] = {
        "bare RSA verification": lambda: KEY.verify(
            form.signature, form.signed, padding.PKCS1v15(), hashes.SHA256()
        ),
        "form and signature": lambda: verify_signature(parse_form(next_token()), [KEY]),
        "form and signature by PyJWT": lambda: jws.decode_complete(next_token(), KEY, ["RS256"]),
        "PyJWT decode": lambda: jwt.decode(next_token(), prepared, **required),
        "new session token": lambda: SessionVerifier(keys, RULES).verify(next_token(), now),
        "known session token": lambda: verifier.verify(next_token(), now),
    }
    return found | clerks_sdk(token)


def jwk() -> dict[str, Any]:
    """Return the instance's public key as a JWK."""
    return {
        "kid": "ins_fake",
        "alg": "RS256",
        "use": "sig",
    } | jwt.algorithms.RSAAlgorithm.to_jwk(KEY, as_dict=True)


def clerks_sdk(token: str) -> dict[str, Callable[[], object]]:
    """Return a function that verifies *token* offline with Clerk's SDK, if it is installed."""
    try:
        security = import_module("clerk_backend_api.security")
        types = import_module("clerk_backend_api.security.types")
    except ImportError:
        return {}
    options = types.AuthenticateRequestOptions(
        jwt_key=CLERK.public_key_pem, authorized_parties=[CLERK.authorized_party]
    )
    request = httpx.Request(
        "GET", "https://app.example.com", headers={"Authorization": f"Bearer {token}"}
    )
    assert security.authenticate_request(request, options).is_signed_in
    return {"Clerk's authenticate_request": lambda: security.authenticate_request(request, options)}


def measure(found: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the duration of a call in microseconds, by name."""
    rounds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(ROUNDS):
        for name, call in found.items():
            rounds[name].append(Timer(call).timeit(CALLS) / CALLS * 1e6)
    return {name: median(times) for name, times in rounds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print each function's duration, and its ratios to the durations of all functions."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    times = measure(subjects())
    print(f"{'':30}{'µs':>9}" + "".join(f"{'/ ' + name:>32}" for name in times))
    for name, own in times.items():
        print(f"{name:30}{own:9.1f}" + "".join(f"{own / other:32.2f}" for other in times.values()))


if __name__ == "__main__":
    main()
