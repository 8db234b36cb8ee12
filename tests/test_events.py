"""Parsing of Clerk's events and user objects."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk.events import LAST_MILLISECOND, ReceivedEvent, parse_event, storable
from clerkhooks.clerk.kinds import USER, Profile, parse_profile
from clerkhooks.clerk.signatures import VerifiedMessage
from clerkhooks.errors import EventError
from clerkhooks.events import Version
from tests.support import DATA

USER_ID = "user_29w83sxmDNGwOuEthce5gg56FcC"
ATTEMPT = 1_800_000_000
ODD: list[Any] = [
    None,
    "",
    " \t",
    5,
    1.5,
    True,
    [],
    {},
    ["x"],
    {"x": 1},
    "nul\x00",
    "lone \ud800",
    "\udfff",
]


def event(body: str | dict[str, Any], message_id: str = "msg_1") -> ReceivedEvent:
    """Parse *body* and return the event."""
    return parse_event(
        VerifiedMessage(message_id, ATTEMPT, body if isinstance(body, str) else json.dumps(body))
    )


def user_event(data: dict[str, Any] | None = None, **envelope: Any) -> ReceivedEvent:
    """Return a parsed update of a user with these fields."""
    parsed = event({"type": "user.updated", "data": {"id": USER_ID} | (data or {})} | envelope)
    assert parsed.user_id == USER_ID
    return parsed


def profile(email: Any = None, **data: Any) -> Profile:
    """Return the parsed profile of a user with one email address and these fields."""
    address = {
        "primary_email_address_id": "idn_1",
        "email_addresses": [{"id": "idn_1", "email_address": email}],
    }
    return parse_profile(address | data)


@pytest.mark.parametrize(
    ("name", "version", "kept"),
    [
        (
            "user.created",
            (1654012591835, 1654012591835),
            ("example@example.org", "Example Example", "https://img.clerk.com/xxxxxx"),
        ),
        ("user.created.minimal", (-1, ATTEMPT * 1000), ("minimal@example.org", "minimal", None)),
        (
            "user.updated",
            (1611948436000, 1731000000000),
            ("john.doe@clerk.test", "John Doe", "https://clerk.com"),
        ),
        ("user.deleted", (1661861640000, 1661861640000), None),
    ],
)
def test_parses_clerks_own_payloads(
    name: str, version: tuple[int, int], kept: tuple[str, str, str | None] | None
) -> None:
    """Payloads from Clerk's documentation and test suite are parsed correctly."""
    body = (DATA / f"{name}.json").read_text()
    parsed = event(body)
    assert (parsed.message_id, parsed.user_id) == ("msg_1", json.loads(body)["data"]["id"])
    assert parsed.type in name
    assert parsed.version == Version(*version, "msg_1")
    shown = tuple(parsed.values[column] for column in ("email", "name", "image_url"))
    assert shown == (kept or (None, "Deleted User", None))
    assert parsed.is_deletion == (kept is None)


def test_parses_every_payload_file() -> None:
    """The test above covers every payload file."""
    assert sorted(path.stem for path in Path(DATA).glob("user.*.json")) == [
        "user.created",
        "user.created.minimal",
        "user.deleted",
        "user.updated",
    ]


@pytest.mark.parametrize(
    ("reason", "bodies"),
    [
        (
            "body_not_json",
            [
                "",
                "{",
                "\ufeff{}",
                '{"type": NaN}',
                '{"type": -Infinity}',
                "[" * 100_000,
                '{"a":' * 100_000,
            ],
        ),
        ("body_not_an_object", ["[]", "null", '"user.created"', "1" * 5000]),
        (
            "event_type_missing",
            ["{}", '{"type": ""}', '{"type": null}', '{"type": ["user.created"]}'],
        ),
    ],
)
def test_refuses_a_body_that_is_not_an_event(reason: str, bodies: list[str]) -> None:
    """The error's reason describes the problem with the body."""
    for body in bodies:
        with pytest.raises(EventError) as refused:
            event(body)
        assert refused.value.reason == reason


@pytest.mark.parametrize("event_type", ["user.created", "user.updated", "user.deleted"])
@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "x",
        {},
        *(
            {"id": value}
            for value in [
                None,
                5,
                "",
                "usr_1",
                "user_",
                "user_é",
                "user_" + "a" * 65,
                USER_ID + "\n",
            ]
        ),
    ],
)
def test_refuses_a_user_event_without_a_user_id(event_type: str, data: Any) -> None:
    """A user event without a valid user id is refused: it cannot be assigned to a row."""
    with pytest.raises(EventError) as refused:
        event({"type": event_type, "data": data})
    assert refused.value.reason == "user_id_malformed"


@pytest.mark.parametrize("user_id", ["user_a", "user_" + "Z9" * 32, USER_ID])
def test_recognizes_a_user_id(user_id: str) -> None:
    """A user id is ``user_`` followed by 1 to 64 base-62 characters."""
    assert USER.is_id(user_id)
    assert not USER.is_id(user_id.replace("user_", "user_-"))


@pytest.mark.parametrize(
    "event_type", ["session.created", "user.promoted", "User.created", "user.created "]
)
@pytest.mark.parametrize("data", [None, {"id": 5}, {"id": USER_ID}])
def test_parses_other_events_without_a_user(event_type: str, data: Any) -> None:
    """An event of another type is valid with any data, and has no user."""
    parsed = event({"type": event_type, "data": data})
    assert (parsed.type, parsed.kind, parsed.user_id) == (event_type, None, None)


def test_cleans_ids_and_types_for_the_database() -> None:
    """Ids and types may contain any characters, so they are cleaned for the database."""
    parsed = event({"type": "é\x00\ud800" + "x" * 300}, message_id="\x00" + "m" * 300)
    assert parsed.type == "é\ufffd\ufffd" + "x" * 252
    assert parsed.message_id == parsed.version.message_id
    assert parsed.message_id.startswith("\ufffd" + "m" * 190)
    assert len(parsed.message_id) == 255
    assert parsed.message_id != event({"type": "x"}, message_id="\x00" + "m" * 301).message_id


@pytest.mark.parametrize(("length", "kept"), [(254, 254), (255, 255), (256, 255)])
def test_cuts_a_label_at_255(length: int, kept: int) -> None:
    """Ids and types are truncated to 255 characters, the length of their columns."""
    assert storable("x" * length) == "x" * kept


@pytest.mark.parametrize(
    ("data", "email"),
    [
        ({"primary_email_address_id": "b"}, "b@example.org"),
        ({"primary_email_address_id": "c"}, None),
        ({"primary_email_address_id": None}, None),
        ({"primary_email_address_id": 5}, None),
        ({}, None),
        ({"primary_email_address_id": "b", "email_addresses": "b"}, None),
        ({"primary_email_address_id": "b", "email_addresses": {"b": 1}}, None),
        ({"primary_email_address_id": "b", "email_addresses": [None, 5, "b", {"id": "b"}]}, None),
        (
            {
                "primary_email_address_id": "b",
                "email_addresses": [None, {"id": "b", "email_address": "x@example.org"}],
            },
            "x@example.org",
        ),
    ],
)
def test_uses_the_primary_email_address(data: dict[str, Any], email: str | None) -> None:
    """The email is the address with the primary id, not the first or newest address."""
    addresses = [{"id": name, "email_address": f"{name}@example.org"} for name in ("a", "b")]
    assert parse_profile({"email_addresses": addresses} | data).email == email


@pytest.mark.parametrize("value", ODD)
def test_treats_an_odd_field_as_absent(value: Any) -> None:
    """An optional field with an invalid value counts as absent. The event stays valid."""
    assert profile(
        value, first_name=value, last_name=value, username=value, image_url=value
    ) == Profile("New User")
    assert profile("ada@example.org", first_name=value, username="u").name == "ada"


@pytest.mark.parametrize(("field", "limit"), [("email", 320), ("image_url", 2048)])
def test_drops_a_text_that_does_not_fit(field: str, limit: int) -> None:
    """An email address or URL that is too long is dropped. A truncated one would be useless."""
    fitting, long = ("x" * (limit - 2) + "@é", "x" * (limit - 1) + "@é")
    assert getattr(profile(**{field: fitting}), field) == fitting
    assert getattr(profile(**{field: long}), field) is None


@pytest.mark.parametrize(
    ("first", "last", "name"),
    [
        ("x" * 254, None, "x" * 254),
        ("x" * 255, None, "x" * 255),
        ("x" * 256, None, "x" * 255),
        ("x" * 127, "y" * 127, "x" * 127 + " " + "y" * 127),
        ("x" * 127, "y" * 128, "x" * 127 + " " + "y" * 127),
    ],
)
def test_cuts_a_name_at_255(first: str, last: str | None, name: str) -> None:
    """First and last name are joined, and then truncated to 255 characters."""
    assert profile(first_name=first, last_name=last).name == name


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"first_name": " Ada ", "last_name": "\tLovelace\n"}, "Ada Lovelace"),
        ({"first_name": "Ada"}, "Ada"),
        ({"last_name": "Lovelace", "first_name": " "}, "Lovelace"),
        ({"username": "ada"}, "local"),
        ({"email": "a@b@example.org"}, "a@b"),
        ({"email": "@example.org", "username": " ada "}, "ada"),
        ({"email": "no-at-sign"}, "no-at-sign"),
        ({"email": None, "username": "ada"}, "ada"),
        ({"email": None}, "New User"),
        ({"email": "x" * 321, "username": ""}, "New User"),
    ],
)
def test_derives_a_name(data: dict[str, Any], name: str) -> None:
    """Without a first or last name, the email's local part, username or "New User" is used."""
    assert profile(**{"email": "local@example.org"} | data).name == name


@pytest.mark.parametrize(
    "odd", [None, True, False, -1, -0.5, 0.5, "1", [], {}, LAST_MILLISECOND + 1, 10**400, 1e300]
)
def test_replaces_a_missing_time_by_the_other(odd: Any) -> None:
    """
    If one of an event's two times is malformed, the other replaces it.

    If both are malformed, the event ranks lowest.
    """
    assert user_event({"updated_at": odd}, timestamp=7).version == Version(7000, 7000, "msg_1")
    assert user_event({"updated_at": 5}, timestamp=odd).version == Version(5000, 5000, "msg_1")
    timeless = user_event({"updated_at": odd}, timestamp=odd)
    assert (timeless.version, timeless.occurred_at) == (Version(-1, ATTEMPT * 1000, "msg_1"), None)
    assert timeless.version < user_event({"updated_at": 0}, timestamp=0).version


@pytest.mark.parametrize(
    ("time", "milliseconds"),
    [
        (0, 0),
        (1.0, 1000),
        (1_700_000_000, 1_700_000_000_000),
        (10**11 - 1, 99_999_999_999_000),
        (10**11, 10**11),
        (1_700_000_000_000.0, 1_700_000_000_000),
        (LAST_MILLISECOND, LAST_MILLISECOND),
    ],
)
def test_accepts_seconds_and_milliseconds(time: float, milliseconds: int) -> None:
    """A time below 10**11 is in seconds, as in Clerk's examples. Integral floats are accepted."""
    parsed = user_event({"updated_at": time})
    assert parsed.version == Version(milliseconds, milliseconds, "msg_1")
    assert parsed.occurred_at == datetime.fromtimestamp(milliseconds / 1000, UTC)


def test_dates_an_event_by_its_envelope() -> None:
    """Versions are compared by ``updated_at`` first. ``timestamp`` is the time of the event."""
    parsed = user_event({"updated_at": 9}, timestamp=5)
    assert parsed.version == Version(9_000, 5_000, "msg_1")
    assert parsed.occurred_at == datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)


texts = st.text(st.characters() | st.sampled_from("\x00\ud800@ ")) | st.text(
    "x@", min_size=250, max_size=330
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from([USER_ID, "idn_1", "user.created", "user.deleted"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
names = (
    "primary_email_address_id",
    "first_name",
    "last_name",
    "username",
    "image_url",
    "updated_at",
)
addresses = (
    st.lists(
        st.fixed_dictionaries({"id": st.just("idn_1") | scalars, "email_address": values}) | values,
        max_size=3,
    )
    | values
)
profiles = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(names, scalars) | {"email_addresses": addresses}
)
users = st.builds(
    lambda data, user_id: data | {"id": user_id}, profiles, st.just(USER_ID) | scalars
)
types = (
    st.sampled_from(["user.created", "user.updated", "user.deleted", "session.created"]) | scalars
)
envelopes = st.fixed_dictionaries(
    {}, optional={"type": types, "data": users | values, "timestamp": scalars}
)


@given(st.text() | (envelopes | values).map(json.dumps), st.text(), st.integers(0, 10**11))
def test_raises_nothing_but_its_own_error(body: str, message_id: str, attempt: int) -> None:
    """Parsing a body either returns an event that can be stored, or raises EventError."""
    try:
        parsed = parse_event(VerifiedMessage(message_id, attempt, body))
    except EventError:
        return
    (parsed.type + parsed.message_id + parsed.version.message_id).encode()
    assert all(-1 <= number <= LAST_MILLISECOND for number in parsed.version[:2])


@given(profiles)
def test_keeps_only_what_a_database_can_store(data: dict[str, Any]) -> None:
    """Each string fits its column and contains no NUL or surrogate. The name is never empty."""
    kept = parse_profile(
        data | {"primary_email_address_id": data.get("primary_email_address_id", "idn_1")}
    )
    assert kept.name
    for text, limit in [(kept.email or "", 320), (kept.name, 255), (kept.image_url or "", 2048)]:
        assert len(text) <= limit
        assert b"\x00" not in text.encode()
