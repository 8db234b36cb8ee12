"""Verification of session tokens: in Clerk's order, and never looser than Clerk's SDK."""

from __future__ import annotations

import base64
import json
import re
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flask import Flask
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk import session_tokens
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.clerk.session_tokens import (
    ANY_CATEGORY,
    LAST_SECOND,
    MAX_LENGTH,
    Session,
    SessionVerifier,
    TokenRules,
)
from clerkhooks.clerk.signing_keys import ConfiguredKeys
from clerkhooks.errors import Unauthenticated
from clerkhooks.web.sign_in import find_tokens
from clerkhooks.web.state import Authenticator
from tests.support import load

SDK = load("session_tokens.json")
SDK_KEY = load_pem_public_key(SDK["public_key"].encode())
SDK_RULES = TokenRules(frozenset([SDK["issuer"]]), frozenset(SDK["authorized_parties"]))
STRICTER = {
    "far": "token_exp_malformed",
    "crit": "token_header_critical",
    "iat required": "token_iat_malformed",
    "issuer": "token_issuer_mismatch",
    "sid required": "token_session_missing",
    "sts": "session_status_unknown",
    "user id": "token_subject_malformed",
}
CLERK = FakeClerk()
KEY = CLERK.private_key.public_key()
ISSUER = f"https://{CLERK.frontend_api}"
RULES = TokenRules(
    frozenset([ISSUER, "https://clerk.second.example"]),
    frozenset([CLERK.authorized_party]),
    frozenset(["a", "b"]),
)
NOW = 1_800_000_000
USER_ID = "user_29w83sxmDNGwOuEthce5gg56FcC"
ABSENT: Any = object()
INVALID_TIMES: list[Any] = [
    None,
    "1800000000",
    True,
    [],
    {},
    LAST_SECOND + 1,
    -LAST_SECOND - 1,
    10**400,
]
HEADER: dict[str, Any] = {"alg": "RS256", "cat": "cl_B7d4PD111AAA", "kid": "ins_1", "typ": "JWT"}
TIMES = {"exp": NOW + 60, "iat": NOW, "nbf": NOW - 10}
CLAIMS: dict[str, Any] = TIMES | {
    "azp": CLERK.authorized_party,
    "iss": ISSUER,
    "sid": "sess_1",
    "sts": "active",
    "sub": USER_ID,
}


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def raw_token(header: bytes, payload: bytes) -> str:
    """Return a token with this header and payload, signed by the instance."""
    signed = f"{base64url(header)}.{base64url(payload)}"
    signature = CLERK.private_key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{signed}.{base64url(signature)}"


def token(header: dict[str, Any] | None = None, **claims: Any) -> str:
    """Return a valid token with header fields and claims replaced; ABSENT omits a field."""
    parts = (HEADER | (header or {}), CLAIMS | claims)
    return raw_token(
        *(
            as_json({name: value for name, value in part.items() if value is not ABSENT})
            for part in parts
        )
    )


def verify_session_token(
    text: str, keys: list[RSAPublicKey], rules: TokenRules, now: float
) -> Session:
    """Verify a token."""
    return SessionVerifier(ConfiguredKeys(tuple(keys)), rules).verify(text, now)


def reason_of(
    text: str, now: float = NOW, key: RSAPublicKey = KEY, rules: TokenRules = RULES
) -> str | None:
    """Return why a token is refused, or None if it is valid."""
    try:
        session = verify_session_token(text, [key], rules, now)
    except Unauthenticated as error:
        return error.reason
    assert isinstance(session, Session)
    assert session.user_id.startswith("user_")
    return None


def sdk_verdict(case: dict[str, Any]) -> str | None:
    """Return why the request of a recorded SDK case is refused, or None if it is accepted."""
    scheme, _, text = case["authorization"].partition(" ")
    if scheme.lower() != "bearer":
        return "token_missing"
    assert isinstance(SDK_KEY, RSAPublicKey)
    return reason_of(text, SDK["now"], SDK_KEY, SDK_RULES)


def test_gives_every_verdict_of_clerks_sdk() -> None:
    """No result is looser than the SDK's. A stricter one has a reason that the case allows."""
    assert len(SDK["cases"]) == 400
    compared = [
        case for case in SDK["cases"] if not {"scheme", "o shape"} & set(case["may_be_stricter"])
    ]
    differing = [
        (case, sdk_verdict(case))
        for case in compared
        if (sdk_verdict(case) is None) is not case["accept"]
    ]
    assert [case["name"] for case, _ in differing if not case["accept"]] == []
    unexplained = [
        (case["name"], reason)
        for case, reason in differing
        if reason not in [STRICTER.get(rule) for rule in case["may_be_stricter"]]
    ]
    assert unexplained == []


def test_differs_from_clerks_sdk_in_the_scheme_and_in_odd_features_only() -> None:
    """The scheme is required but not case-sensitive; a malformed ``fea`` claim is tolerated."""
    odd = [case for case in SDK["cases"] if {"scheme", "o shape"} & set(case["may_be_stricter"])]
    looser = {case["name"] for case in odd if not case["accept"] and sdk_verdict(case) is None}
    stricter = {case["name"] for case in odd if case["accept"] and sdk_verdict(case) is not None}
    assert (looser, stricter) == ({"scheme", "fea odd"}, {"no scheme", "scheme + no scheme"})


def test_returns_the_session() -> None:
    """The session contains its own id, the user's id and all claims."""
    session = verify_session_token(token(org_role="admin"), [KEY], RULES, NOW)
    assert (session.id, session.user_id, session.actor, session.impersonated) == (
        "sess_1",
        USER_ID,
        None,
        False,
    )
    assert session.claims["org_role"] == "admin"


@pytest.mark.parametrize(
    ("act", "actor"),
    [({"sub": "user_2"}, {"sub": "user_2"}), ({}, {}), ("user_2", None), (False, None)],
)
def test_detects_impersonation(act: Any, actor: Any) -> None:
    """An ``act`` claim of any shape counts as impersonation."""
    session = verify_session_token(token(act=act), [KEY], RULES, NOW)
    assert (session.actor, session.impersonated) == (actor, True)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "a",
            "a.b",
            "a.b.c",
            "....",
            "a.b.c.d",
            "é.é.é",
            "\ud800.a.b",
            "aa.aa.aa",
            "a=.b=.c=",
        ),
        *(token() + end for end in (".", "=", "\n", " ", "\x85", "\N{NO-BREAK SPACE}", " x")),
        *(start + token() for start in (" ", "A", ".", "Bearer ")),
        *(token().replace(".", inside, 1) for inside in ("\n.", "+.", ".A", "..", "")),
    ],
)
def test_refuses_a_malformed_token(text: str) -> None:
    """A token is three base64url parts with nothing before or after them."""
    assert reason_of(text) == "token_malformed"


def test_refuses_stray_bits_at_the_end_of_a_part() -> None:
    """The four unused bits at the end of a signature must be zero, so its encoding is unique."""
    valid = token()
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    stray = valid[:-1] + digits[digits.index(valid[-1]) + 1]
    assert base64.urlsafe_b64decode(stray.rpartition(".")[2] + "==") == base64.urlsafe_b64decode(
        valid.rpartition(".")[2] + "=="
    )
    assert reason_of(stray) == "token_malformed"


@pytest.mark.parametrize(
    ("length", "reason"), [(MAX_LENGTH, "token_malformed"), (MAX_LENGTH + 1, "token_too_long")]
)
def test_reads_no_more_than_16_kib(length: int, reason: str) -> None:
    """A token over 16 KiB is refused before it is parsed."""
    assert reason_of("A" * length) == reason


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"[]", b"null", b"5", b"{", b"\xff", b'{"a":NaN}', b"\xef\xbb\xbf{}", b"[" * 5000),
        b"[" + b"1" * 5000 + b"," + b"[" * 5000,
    ],
)
def test_refuses_a_part_that_is_not_an_object(raw: bytes) -> None:
    """The header and the payload must be JSON objects in UTF-8."""
    assert reason_of(raw_token(raw, as_json(CLAIMS))) == "token_malformed"
    assert reason_of(raw_token(as_json(HEADER), raw)) == "token_malformed"


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("typ", ["jwt", "at+jwt", "application/at+jwt", None, "", ["JWT"]], "token_type_mismatch"),
        (
            "alg",
            ["none", "HS256", "RS384", "RS512", "PS256", "rs256", None, ABSENT, ["RS256"]],
            "token_algorithm_refused",
        ),
        (
            "cat",
            ["cl_B7d4PD222AAA", "cl_B7d4PD333AAA", "", None, [], {}],
            "token_category_mismatch",
        ),
        ("crit", [["exp"], [], None], "token_header_critical"),
        ("typ", ["JWT", ABSENT], None),
        ("cat", [ABSENT, ANY_CATEGORY], None),
        ("kid", [ABSENT, 5], None),
        ("jwk", [{}], None),
    ],
)
def test_checks_the_header(name: str, values: list[Any], reason: str | None) -> None:
    """The type, algorithm and category must fit a session token; ``crit`` must be absent."""
    assert {reason_of(token({name: value})) for value in values} == {reason}


def test_accepts_deeply_nested_claims() -> None:
    """Custom claims may be nested 300 levels deep."""
    deep: list[object] = []
    for _ in range(300):
        deep = [deep]
    assert reason_of(token(deep=deep)) is None


@pytest.mark.parametrize("huge", [b"1e999", b"9" * 309, b"9" * 4000, b"9" * 5000])
def test_reads_a_huge_number_as_infinity(huge: bytes) -> None:
    """A number too large for a float is infinite, however it is written: not an age of a factor."""
    claims = as_json(CLAIMS | {"fva": ["HUGE", 1]}).replace(b'"HUGE"', huge)
    session = verify_session_token(raw_token(as_json(HEADER), claims), [KEY], RULES, NOW)
    assert session.factor_verification_age is None
    assert not session.has(reverification="strict")


def test_checks_in_clerks_order() -> None:
    """Claims are checked after the signature, so an unsigned token cannot probe these checks."""
    header, payload, signature = token({"alg": "none"}, sub=5).split(".")
    assert reason_of(f"{header}.{payload}.A") == "token_malformed"
    assert reason_of(f"{header}.{payload}.AAAA") == "token_algorithm_refused"
    assert reason_of(f"{token().split('.')[0]}.{payload}.{signature}") == "token_signature_mismatch"
    assert reason_of(token(sub=5)) == "token_subject_malformed"


def test_accepts_each_configured_key_and_no_other() -> None:
    """During a rotation, tokens signed with either key are accepted."""
    other = FakeClerk().private_key.public_key()
    assert verify_session_token(token(), [other, KEY], RULES, NOW).user_id == USER_ID
    with pytest.raises(Unauthenticated, match="token_signature_mismatch"):
        verify_session_token(token(), [other], RULES, NOW)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        (
            "sub",
            [
                ABSENT,
                None,
                "",
                5,
                "mch_1",
                "user_",
                "user_é",
                "user_" + "a" * 65,
                USER_ID + "\n",
                [USER_ID],
            ],
            "token_subject_malformed",
        ),
        ("sub", ["user_a", "user_" + "Z9" * 32], None),
        ("sid", [ABSENT, None, "", 5, ["sess_1"]], "token_session_missing"),
        *((name, [*INVALID_TIMES, ABSENT], f"token_{name}_malformed") for name in ("exp", "iat")),
        ("nbf", INVALID_TIMES, "token_nbf_malformed"),
        ("nbf", [ABSENT], None),
        ("sts", ["active", ABSENT], None),
        ("sts", ["pending"], "session_pending"),
        ("sts", ["ended", "Active", "", None, [], ["active"]], "session_status_unknown"),
        (
            "iss",
            [ABSENT, None, "", f"{ISSUER}/", "https://clerk.example.org", [ISSUER]],
            "token_issuer_mismatch",
        ),
        ("iss", [ISSUER, "https://clerk.second.example"], None),
        (
            "azp",
            [None, "", "https://example.com", [CLERK.authorized_party], {}],
            "token_authorized_party_mismatch",
        ),
        ("azp", [ABSENT], "token_authorized_party_missing"),
        ("aud", ["c", ["c"], 5, {"a": 1}, [["a"]], [5], False], "token_audience_mismatch"),
        ("aud", [ABSENT, None, "", [], "a", ["c", "b"], ["a", 5]], None),
        ("o", [None, 5, [], {"id": 5}], None),
    ],
)
def test_checks_the_claims(name: str, values: list[Any], reason: str | None) -> None:
    """Tokens with malformed claims are refused, as are tokens from a template, without ``sid``."""
    assert {reason_of(token(**{name: value})) for value in values} == {reason}


@pytest.mark.parametrize("parties", [frozenset[str](), RULES.authorized_parties])
def test_admits_native_apps_without_an_origin(parties: frozenset[str]) -> None:
    """A bearer token may lack ``azp``; a cookie may not, and a wrong ``azp`` is refused."""
    verifier = SessionVerifier(
        ConfiguredKeys((KEY,)), TokenRules(authorized_parties=parties, native=True)
    )
    text = token(azp=ABSENT)
    assert verifier.verify(text, NOW).user_id == USER_ID
    with pytest.raises(Unauthenticated, match="token_authorized_party_missing"):
        verifier.verify(text, NOW, in_cookie=True)
    for azp in (None, "", "https://evil.example.com"):
        with pytest.raises(Unauthenticated, match="token_authorized_party_mismatch"):
            verifier.verify(token(azp=azp), NOW)


def test_verifies_a_known_token_again() -> None:
    """A token whose signature is known expires, and a view cannot change its later claims."""
    keys = ConfiguredKeys((cast("RSAPublicKey", SDK_KEY), KEY))
    verifier, text = SessionVerifier(keys, RULES), token(exp=NOW + 60)
    claims = cast("dict[str, Any]", verifier.verify(text, NOW).claims)
    claims |= {"sub": "user_" + "b" * 27, "exp": NOW + 600}
    assert verifier.verify(text, NOW).user_id == USER_ID
    assert text not in repr(verifier)
    with pytest.raises(Unauthenticated, match="token_expired"):
        verifier.verify(text, NOW + 66)
    header, _, signature = text.split(".")
    with pytest.raises(Unauthenticated, match="token_signature_mismatch"):
        verifier.verify(".".join([header, token(exp=NOW + 600).split(".")[1], signature]), NOW)


def test_forgets_known_tokens_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of remembered tokens is limited, and forgotten tokens are still accepted."""
    monkeypatch.setattr(session_tokens, "MAX_KNOWN", 3)
    verifier = SessionVerifier(ConfiguredKeys((KEY,)), RULES)
    texts = [token(sid=f"sess_{number}") for number in range(10)]
    for text in texts + texts:
        verifier.verify(text, NOW)
        assert len(verifier._known) <= 3


def test_enforces_configured_rules_only() -> None:
    """Issuer, authorized party and audience are checked only if configured."""
    odd = token(iss=ABSENT, azp=ABSENT, aud="c")
    assert verify_session_token(odd, [KEY], TokenRules(), NOW).user_id == USER_ID


@pytest.mark.parametrize(
    ("name", "good", "bad", "reason"),
    [
        ("exp", [NOW - 4, NOW - 3.9, LAST_SECOND], [NOW - 5, NOW - 4.1], "token_expired"),
        ("nbf", [NOW + 5, NOW + 5.9, -LAST_SECOND], [NOW + 6, LAST_SECOND], "token_not_active_yet"),
        ("iat", [NOW + 5, NOW + 5.9, 0], [NOW + 6, LAST_SECOND], "token_issued_in_the_future"),
    ],
)
def test_tolerates_five_seconds_of_clock_skew(
    name: str, good: list[Any], bad: list[Any], reason: str
) -> None:
    """Fractions of seconds in a token are truncated, as in JavaScript."""
    assert [reason_of(token(**{name: time})) for time in good] == [None] * len(good)
    assert [reason_of(token(**{name: time})) for time in bad] == [reason] * len(bad)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (NOW + 64.999, None),
        (NOW + 65, "token_expired"),
        (NOW - 5, None),
        (NOW - 5.001, "token_issued_in_the_future"),
    ],
)
def test_counts_fractions_of_its_own_clock(now: float, reason: str | None) -> None:
    """A token is refused exactly five seconds after ``exp``."""
    assert reason_of(token(), now) == reason


texts = st.text(max_size=8) | st.sampled_from([USER_ID, "JWT", "RS256", "active", "sess_1"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.integers(NOW - 100, NOW + 100)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
odd_header = st.dictionaries(st.sampled_from(sorted(HEADER)) | texts, values, max_size=1)
odd_claims = st.dictionaries(
    st.sampled_from([*CLAIMS, "aud", "act", "fea", "o", "fva"]) | texts, values, max_size=2
)
tokens = st.builds(
    raw_token,
    odd_header.map(HEADER.__or__).map(as_json),
    odd_claims.map(CLAIMS.__or__).map(as_json),
)
raw_tokens = st.builds(
    raw_token, st.just(as_json(HEADER)) | st.binary(), st.binary() | values.map(as_json)
)


@pytest.mark.parametrize(
    "text", ["", " ", " a.b.c", "a.b.c\x85", "a.b.c\xa0", "\x1ca.b.c", "a.b.c"]
)
def test_reads_the_token_of_a_header_unchanged(text: str) -> None:
    """Python's strip() is not used: it would admit tokens that Clerk's SDK refuses."""
    authenticator = Authenticator(SessionVerifier(ConfiguredKeys((KEY,)), RULES), frozenset(), ())
    with Flask(__name__).test_request_context(
        environ_overrides={"HTTP_AUTHORIZATION": f"bearer {text}"}
    ):
        if text:
            assert list(find_tokens(authenticator)) == [(text, False)]
            return
        with pytest.raises(Unauthenticated, match="token_missing"):
            list(find_tokens(authenticator))


@given(
    tokens
    | raw_tokens
    | st.text()
    | st.from_regex(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
)
def test_raises_nothing_but_its_own_error(text: str) -> None:
    """For any string, verification returns a Session or raises Unauthenticated."""
    reason = reason_of(text)
    assert reason is None or re.fullmatch("(token|session)_[a-z_]+", reason)
