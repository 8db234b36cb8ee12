"""Events of every type: complete, consistent with each other, and delivered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from clerkhooks import Event
from clerkhooks.clerk.fake import clerk_id
from clerkhooks.service import create_app
from clerkhooks.testing import ClerkService
from clerkhooks.web.state import disconnect
from tests.application import Application
from tests.server import Server
from tests.support import load

pytest_plugins = ["tests.application"]
SPECIFICATION = load("events.json")
TYPES: dict[str, list[type]] = {
    "string": [str],
    "integer": [int],
    "number": [int, float],
    "boolean": [bool],
    "object": [dict],
    "array": [list],
}
EVENTS = list(SPECIFICATION["events"])
UNLISTED = {"pending"}  # the status of a session for which Clerk has an event, but no value


def problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the differences between *value* and *schema*. Each one begins with its path."""
    schema = resolve(schema)
    if value is None:
        if not schema.get("nullable"):
            yield f"{path} is null"
    elif options := schema.get("oneOf"):
        if all([*problems(value, option, path)] for option in options):
            yield f"{path} matches no schema"
    elif type(value) not in TYPES[schema.get("type", "object")]:
        yield f"{path} is not of the type {schema['type']}"
    elif value not in schema.get("enum", [value]) and value not in UNLISTED:
        yield f"{path} is {value!r}"
    else:
        yield from inner_problems(value, schema, path)


def inner_problems(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the differences between the fields or items of *value* and *schema*."""
    if "items" in schema:
        for number, item in enumerate(value):
            yield from problems(item, schema["items"], f"{path}[{number}]")
    if "properties" in schema:
        yield from missing_and_unknown(value, schema, path)
        for key in value.keys() & schema["properties"].keys():
            yield from problems(value[key], schema["properties"][key], f"{path}.{key}")


def missing_and_unknown(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the required fields that *value* lacks, and its fields that *schema* lacks."""
    for key in set(schema.get("required", ())) - value.keys():
        yield f"{path}.{key} is missing"
    for key in value.keys() - schema["properties"].keys():
        yield f"{path}.{key} is unknown"


def resolve(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a reference by its schema, and parts by one schema with the fields of all."""
    whole = {key: schema[key] for key in schema if key not in ("$ref", "allOf")}
    if "$ref" in schema:
        whole = resolve(SPECIFICATION["schemas"][schema["$ref"].rpartition("/")[2]]) | whole
    for part in map(resolve, schema.get("allOf", ())):
        for key, empty in (("properties", {}), ("required", [])):
            known, added = whole.get(key, empty), part.get(key, empty)
            whole[key] = known | added if isinstance(known, dict) else [*known, *added]
    return whole


@pytest.fixture
def acme(clerk_service: ClerkService) -> ClerkService:
    """Sign up Grace, who creates Acme Inc., and Alan, who joins it."""
    grace = clerk_service.sign_up(
        first_name="Grace", last_name="Hopper", email="grace@example.com", external_id="567772"
    )
    data = clerk_service.event_data("organization.created", user_id=grace)
    clerk_service.deliver("organization.created", data | {"name": "Acme Inc.", "slug": "acme-inc"})
    clerk_service.sign_up(first_name="Alan", last_name="Turing", email="alan@example.com")
    return clerk_service


@pytest.mark.parametrize("event_type", EVENTS)
def test_builds_what_clerk_documents(clerk_service: ClerkService, event_type: str) -> None:
    """Every required field is present, no field is unknown, and all have the right type."""
    data = clerk_service.event_data(event_type)
    assert [*problems(data, SPECIFICATION["events"][event_type]["data"], "data")] == []
    assert json.loads(json.dumps(data)) == data


def test_finds_wrong_data(clerk_service: ClerkService) -> None:
    """The test above reports missing, unknown, null and mistyped fields at any depth."""
    data = clerk_service.event_data("organizationMembership.created")
    data["organization"] = data["organization"] | {"id": None, "nickname": "x"}
    data["role"] = 5
    del data["permissions"]
    schema = SPECIFICATION["events"]["organizationMembership.created"]["data"]
    assert sorted(problems(data, schema, "data")) == [
        "data.organization.id is null",
        "data.organization.nickname is unknown",
        "data.permissions is missing",
        "data.role is not of the type string",
    ]


def test_delivers_every_event(application: Application) -> None:
    """Handlers receive all 45 event types, with the data that was sent."""
    received: dict[str, Any] = {}

    @application.hooks.on("*")
    def receive(event: Event) -> None:
        received[event.type] = event.data

    service = application.clerk_service
    sent = {}
    for event_type in EVENTS:
        sent[event_type] = service.event_data(event_type)
        response = service.deliver(event_type, sent[event_type])
        assert (response.status_code, response.get_json()["outcome"]) in (
            (200, "applied"),
            (200, "stale"),
        )
    assert received == sent
    assert len(sent) == 45


def test_delivers_an_event_that_clerk_adds(application: Application) -> None:
    """Handlers receive an event type that the specification does not contain."""
    received: dict[str, Any] = {}

    @application.hooks.on("galaxy.collided")
    @application.hooks.on("galaxy.*")
    def receive(event: Event) -> None:
        received[event.message_id] = (event.type, event.data["object"], event.data["stars"])

    service = application.clerk_service
    data = service.event_data("galaxy.collided") | {"stars": [1, {"x": None}]}
    response = service.deliver("galaxy.collided", data)
    assert response.get_json()["outcome"] == "applied"
    assert list(received.values()) == [("galaxy.collided", "galaxy", [1, {"x": None}])]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")
def test_sends_every_event(server: Server) -> None:
    """``send`` posts complete data, for the user and the organization of the options."""
    app = create_app(
        server.clerk.environ | {"DATABASE_URL": server.database_url, "PORT": str(server.port)}
    )
    user_id, organization_id = clerk_id("user"), clerk_id("org")
    options = ["--user", user_id, "--organization", organization_id, "--json"]
    memberships = set()
    for event_type in EVENTS:
        result = app.test_cli_runner().invoke(args=["clerk", "send", event_type, *options])
        assert result.exit_code == 0, result.output
        data = json.loads(json.loads(result.stdout)["request"]["body"])["data"]
        assert [*problems(data, SPECIFICATION["events"][event_type]["data"], "data")] == []
        if event_type.startswith("organizationMembership"):
            assert data["organization"]["id"] == organization_id
            assert data["public_user_data"]["user_id"] == user_id
            memberships.add(data["id"])
    disconnect(app)
    assert len(memberships) == 1


def test_fits_members_to_users_and_organizations(acme: ClerkService) -> None:
    """A membership shows the user and the organization as their own events do."""
    member = acme.event_data("organizationMembership.created")
    user, organization = acme.event_data("user.updated"), acme.event_data("organization.updated")
    assert member["organization"] | {"updated_at": 0} == organization | {"updated_at": 0}
    assert (organization["name"], organization["slug"]) == ("Acme Inc.", "acme-inc")
    shown = member["public_user_data"]
    assert shown["identifier"] == user["email_addresses"][0]["email_address"] == "alan@example.com"
    for field in ("first_name", "last_name", "image_url", "has_image", "username", "banned"):
        assert shown[field] == user[field]
    assert (shown["user_id"], member["role"]) == (user["id"], "org:member")
    assert acme.event_data("organizationMembership.deleted")["id"] == member["id"]
    creator = organization["created_by"]
    admin = acme.event_data("organizationMembership.created", user_id=creator)
    assert (admin["role"], admin["public_user_data"]["first_name"]) == ("org:admin", "Grace")
    assert admin["id"] != member["id"]


def test_fits_a_member_to_an_updated_user(acme: ClerkService) -> None:
    """Fields of delivered events are kept in later updates, and shown in a membership."""
    first = acme.event_data("user.updated")
    acme.deliver("user.updated", first | {"username": "alan"})
    acme.update(acme.user_id, email="turing@example.com", banned=True)
    user, member = (
        acme.event_data("user.updated"),
        acme.event_data("organizationMembership.updated"),
    )
    assert (user["username"], user["last_name"]) == ("alan", "Turing")
    assert user["created_at"] == first["created_at"] < user["updated_at"]
    shown = member["public_user_data"]
    assert (shown["identifier"], shown["username"]) == ("turing@example.com", "alan")
    assert shown["banned"]
    acme.update(acme.user_id, email=None)
    assert acme.event_data("email.created")["to_email_address"] == ""
    assert acme.event_data("organizationMembership.updated")["public_user_data"]["banned"]


def test_fits_other_events_to_their_subjects(acme: ClerkService) -> None:
    """Invitations, sessions and payments are about the same user and organization."""
    user_id, organization_id = acme.user_id, acme.organization_id
    accepted = acme.event_data("organizationInvitation.accepted")
    assert (accepted["user_id"], accepted["organization_id"]) == (user_id, organization_id)
    assert accepted["email_address"] == "alan@example.com"
    assert accepted["id"] == acme.event_data("organizationInvitation.created")["id"]
    assert accepted["data"]["public_organization_data"]["name"] == "Acme Inc."
    session = acme.event_data("session.ended")
    assert (session["user_id"], session["user"]["id"]) == (user_id, user_id)
    assert session["status"] == "ended"
    subscription = acme.event_data("subscription.pastDue")
    [item], payment = subscription["items"], acme.event_data("paymentAttempt.updated")
    assert subscription["status"] == item["status"] == "past_due"
    assert item["subscription_id"] == subscription["id"]
    assert acme.event_data("subscriptionItem.ended")["id"] == item["id"]
    assert payment["subscription_items"][0]["id"] == item["id"]
    assert payment["payment_id"] == subscription["latest_payment_id"]
    for payer in (payment["payer"], item["payer"], subscription["payer"]):
        assert (payer["user_id"], payer["organization_id"]) == (user_id, organization_id)
        assert (payer["id"], payer["email"]) == (subscription["payer_id"], "alan@example.com")
    domain = acme.event_data("organizationDomain.created")
    assert acme.event_data("organizationDomain.deleted")["id"] == domain["id"]
    assert acme.event_data("email.created")["to_email_address"] == "alan@example.com"


def test_deletes_a_user_with_its_external_id(acme: ClerkService) -> None:
    """A deletion has the id that the application gave the user, if there is one."""
    creator = acme.event_data("organization.updated")["created_by"]
    assert acme.event_data("user.deleted", user_id=creator)["external_id"] == "567772"
    assert "external_id" not in acme.event_data("user.deleted")
    assert acme.deliver("user.deleted").get_json()["outcome"] == "applied"
    assert acme.event_data("organization.deleted")["slug"] == "acme-inc"
