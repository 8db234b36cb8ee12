"""Verification of webhooks: Svix's scheme, with the same results as Clerk's SDK."""

from __future__ import annotations

import base64
import string
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from svix.webhooks import Webhook

from clerkhooks.clerk import strict_json
from clerkhooks.clerk.fake import FakeClerk
from clerkhooks.clerk.signatures import SigningSecret, VerifiedMessage, verify_signature
from clerkhooks.errors import SignatureError
from clerkhooks.settings import PROJECT
from tests.support import load

SDK = load("webhooks.json")
SDK_SECRET = SigningSecret(base64.b64decode(SDK["secret"].removeprefix("whsec_")))
NOW = 1_800_000_000
BODY = b'{"type":"user.created","data":{}}'


def signed(clerk: FakeClerk, body: bytes = BODY, at: int = NOW) -> dict[str, str]:
    """Return Svix's headers with lower-case names, as ``verify_signature`` expects."""
    return {name.lower(): value for name, value in clerk.headers(body, "msg_1", at).items()}


def reason_of(
    headers: dict[str, str], clerk: FakeClerk, body: bytes = BODY, now: float = NOW
) -> str | None:
    """Return why a message is refused, or None if it is accepted."""
    try:
        verify_signature(headers, body, [SigningSecret(clerk.secret)], now)
    except SignatureError as error:
        return error.reason
    return None


def is_accepted(case: dict[str, Any]) -> bool:
    """Return whether the request of a recorded SDK case is accepted and its body can be parsed."""
    body = base64.b64decode(case["body_base64"])
    try:
        message = verify_signature(case["headers"], body, [SDK_SECRET], SDK["now"])
        strict_json.parse(message.body)
    except (SignatureError, ValueError):
        return False
    return True


def test_gives_every_verdict_of_clerks_sdk() -> None:
    """No result is looser than the SDK's recorded result, and only marked cases are stricter."""
    assert len(SDK["cases"]) == 300
    differing = [case for case in SDK["cases"] if is_accepted(case) is not case["accept"]]
    assert [case["name"] for case in differing if not case["accept"]] == []
    assert {rule for case in differing for rule in case["may_be_stricter"]} == {"timestamp form"}
    assert all(case["may_be_stricter"] for case in differing)


def test_returns_what_was_signed(clerk: FakeClerk) -> None:
    """A verified message contains the signed id, the timestamp and the unchanged text."""
    body = '{"name": "Zoë",  "x": 1.0}'.encode()
    message = verify_signature(signed(clerk, body), body, [SigningSecret(clerk.secret)], NOW)
    assert message == VerifiedMessage("msg_1", NOW, body.decode())


@pytest.mark.parametrize("name", ["svix-id", "svix-timestamp", "svix-signature"])
@pytest.mark.parametrize("value", [None, "", " ", "\t", "\N{NO-BREAK SPACE}"])
def test_refuses_a_missing_header(clerk: FakeClerk, name: str, value: str | None) -> None:
    """A header that is absent or blank counts as missing."""
    headers = signed(clerk)
    del headers[name]
    assert (
        reason_of(headers | ({} if value is None else {name: value}), clerk)
        == "signature_headers_missing"
    )


@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "1e3",
        "1_800_000_000",
        "+1800000000",
        "1800000000.5",
        "-1",
        "0x6b49d200",
        "\N{ARABIC-INDIC DIGIT ONE}",
        "1" * 13,
        "Infinity",
    ],
)
def test_refuses_a_timestamp_that_is_not_digits(clerk: FakeClerk, value: str) -> None:
    """Svix sends whole seconds in digits; other number formats are refused."""
    assert reason_of(signed(clerk) | {"svix-timestamp": value}, clerk) == "timestamp_malformed"


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (300, None),
        (-300, None),
        (301, "timestamp_out_of_tolerance"),
        (-301, "timestamp_out_of_tolerance"),
        (0, None),
    ],
)
@pytest.mark.parametrize("fraction", [0, 0.999])
def test_tolerates_five_minutes(
    clerk: FakeClerk, age: int, fraction: float, reason: str | None
) -> None:
    """A timestamp may be up to 300 seconds in the past or in the future."""
    assert reason_of(signed(clerk, at=NOW - age), clerk, now=NOW + fraction) == reason


def test_refuses_a_body_changed_after_signing(clerk: FakeClerk) -> None:
    """Adding one byte to the body invalidates the signature."""
    assert reason_of(signed(clerk), clerk, BODY + b" ") == "signature_mismatch"


@pytest.mark.parametrize("header", ["svix-id", "svix-timestamp"])
def test_refuses_a_header_changed_after_signing(clerk: FakeClerk, header: str) -> None:
    """The id and the timestamp are signed as well."""
    value = {"svix-id": "msg_2", "svix-timestamp": str(NOW + 1)}[header]
    assert reason_of(signed(clerk) | {header: value}, clerk) == "signature_mismatch"


def test_refuses_a_body_that_is_not_utf8(clerk: FakeClerk) -> None:
    """Svix signs text, so it never sends a body that is not valid UTF-8."""
    assert reason_of(signed(clerk), clerk, b"\xff") == "body_not_utf8"


def test_refuses_a_stranger(clerk: FakeClerk) -> None:
    """A signature made with another secret does not verify."""
    stranger = FakeClerk(b"x" * 24, clerk.private_key)
    assert reason_of(signed(stranger), clerk) == "signature_mismatch"


@pytest.mark.parametrize("position", [0, 1, 2])
def test_accepts_every_secret_of_a_rotation(clerk: FakeClerk, position: int) -> None:
    """During a rotation, a signature made with any of the secrets is accepted."""
    secrets = [SigningSecret(b"a" * 24), SigningSecret(b"b" * 24)]
    secrets.insert(position, SigningSecret(clerk.secret))
    assert verify_signature(signed(clerk), BODY, secrets, NOW).message_id == "msg_1"


@given(
    st.binary(min_size=1),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(0, 10**10),
)
def test_signs_as_svix_does(secret: bytes, message_id: str, body: str, at: int) -> None:
    """Svix's own library produces the same signature."""
    moment = datetime.fromtimestamp(at, UTC)
    theirs = Webhook(secret).sign(message_id, moment, body)
    assert SigningSecret(secret).sign(message_id, moment, body) == theirs


@pytest.mark.slow
def test_does_not_load_the_client_of_svix() -> None:
    """Svix's API client would cost each worker 16 MB of memory and 0.2 s at startup."""
    code = "import sys, clerkhooks.service; sys.exit('svix' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=60)


def test_refuses_everything_without_a_secret(clerk: FakeClerk) -> None:
    """Without a secret, even a correctly signed message does not verify."""
    with pytest.raises(SignatureError, match="signature_mismatch"):
        verify_signature(signed(clerk), BODY, [], NOW)


@pytest.mark.parametrize(
    "garbage",
    [
        "v1,",
        ",",
        "v1,a,b,c",
        "v1",
        "v2,abc",
        "é",
        "v1,é",
        "v1,\udcff",
        " ",
        "v1,====",
        "v1," + "A" * 9000,
        "v1a,x",
    ],
)
def test_finds_a_good_signature_among_garbled_ones(clerk: FakeClerk, garbage: str) -> None:
    """One valid signature is enough, regardless of any other text before or after it."""
    headers = signed(clerk)
    good = headers["svix-signature"]
    assert reason_of(headers | {"svix-signature": f"{garbage} {good}"}, clerk) is None
    assert reason_of(headers | {"svix-signature": f"{good} {garbage}"}, clerk) is None
    assert (
        reason_of(headers | {"svix-signature": garbage if garbage.strip() else "x"}, clerk)
        == "signature_mismatch"
    )


@pytest.mark.parametrize("separator", [",", "\t", ";", "\n"])
def test_separates_signatures_by_spaces_only(clerk: FakeClerk, separator: str) -> None:
    """With any other separator, the list counts as one malformed signature, as in Clerk's SDK."""
    headers = signed(clerk)
    headers["svix-signature"] = f"v1,abc{separator}{headers['svix-signature']}"
    assert reason_of(headers, clerk) == "signature_mismatch"


@pytest.mark.parametrize("version", ["v2", "v1a", "V1", "", "v"])
def test_refuses_another_version(clerk: FakeClerk, version: str) -> None:
    """Only version 1 is an HMAC with the endpoint's secret."""
    headers = signed(clerk)
    headers["svix-signature"] = headers["svix-signature"].replace("v1", version, 1)
    assert reason_of(headers, clerk) == "signature_mismatch"


def test_refuses_lenient_base64(clerk: FakeClerk) -> None:
    """A signature that only a lenient base64 decoder accepts is refused."""
    good = signed(clerk)["svix-signature"]
    digits = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    stray_bits = good[:-2] + digits[digits.index(good[-2]) + 1] + "="
    assert base64.b64decode(stray_bits[3:]) == base64.b64decode(good[3:])
    for text in (
        stray_bits,
        good[:9] + "!" + good[9:],
        good.rstrip("="),
        good + "=",
        good[:9] + "\n" + good[9:],
    ):
        assert reason_of(signed(clerk) | {"svix-signature": text}, clerk) == "signature_mismatch"


@pytest.mark.parametrize("blank", ["\x1c", "\x85"])
def test_trims_only_what_javascript_trims(clerk: FakeClerk, blank: str) -> None:
    """Python's strip() removes more characters than Clerk's SDK does, so it is not used."""
    headers = signed(clerk)
    for name, reason in [
        ("svix-id", "signature_mismatch"),
        ("svix-timestamp", "timestamp_malformed"),
        ("svix-signature", "signature_mismatch"),
    ]:
        assert reason_of(headers | {name: headers[name] + blank}, clerk) == reason
        assert reason_of(headers | {name: f" {headers[name]}\t\N{NO-BREAK SPACE}"}, clerk) is None


texts = st.text() | st.sampled_from(["v1,", " ", str(NOW), "msg_1", "v1,abc v1,é"])


@given(
    st.dictionaries(st.sampled_from(["svix-id", "svix-timestamp", "svix-signature"]), texts),
    st.binary(),
    st.floats(0, 1e11),
)
def test_raises_nothing_but_its_own_error(headers: dict[str, str], body: bytes, now: float) -> None:
    """Arbitrary input raises SignatureError and nothing else."""
    with pytest.raises(SignatureError):
        verify_signature(headers, body, [SDK_SECRET], now)


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.characters(codec="latin-1")),
    st.lists(texts),
)
def test_verifies_anything_that_was_signed(body: str, message_id: str, garbage: list[str]) -> None:
    """Any signed body with any id is accepted, even with garbage around the signature."""
    message_id = f"m{message_id}m"
    signature = SDK_SECRET.sign(message_id, datetime.fromtimestamp(NOW, UTC), body)
    signatures = [*garbage, signature, *garbage]
    headers = {
        "svix-id": message_id,
        "svix-timestamp": str(NOW),
        "svix-signature": " ".join(signatures),
    }
    assert verify_signature(headers, body.encode(), [SDK_SECRET], NOW) == VerifiedMessage(
        message_id, NOW, body
    )
