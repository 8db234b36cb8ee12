"""The types of events' data agree with Clerk's specification."""

from __future__ import annotations

from typing import NotRequired, get_origin, get_type_hints

import pytest

from clerkhooks import payloads
from tests.generate_payloads import MODULE, Generator
from tests.support import load

SPECIFICATION = load("events.json")


def test_is_what_the_generator_writes() -> None:
    """The committed module is current: ``python -m tests.generate_payloads`` changes nothing."""
    assert MODULE.read_text() == Generator(SPECIFICATION).write()


@pytest.mark.parametrize(
    ("name", "required", "optional"),
    [
        ("DeletedObject", {"object", "deleted"}, {"id", "slug", "external_id"}),
        ("OrganizationInvitationAcceptedPayload", {"user_id", "data", "role"}, {"status"}),
        ("OrganizationInvitationEventPayload", {"role", "inviter_id"}, {"data"}),
        ("SessionEventPayload", {"user", "client_id"}, {"actor"}),
    ],
)
def test_separates_required_and_optional_fields(
    name: str, required: set[str], optional: set[str]
) -> None:
    """Fields that Clerk does not require are optional, also those of a schema that is extended."""
    hints = get_type_hints(getattr(payloads, name), include_extras=True)
    found = {field for field, hint in hints.items() if get_origin(hint) is NotRequired}
    assert optional <= found
    assert required <= hints.keys() - found


def test_exists_at_run_time() -> None:
    """Annotations can be evaluated, as some frameworks and documentation tools do."""
    hints = get_type_hints(payloads.OrganizationMembership)
    assert hints["organization"] is payloads.Organization
    for name in Generator(SPECIFICATION).data.values():
        assert get_type_hints(getattr(payloads, name))
