"""Authorization of a session, compared with recorded results of Clerk's own ``has()``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clerkhooks.clerk.authorization import (
    MalformedClaims,
    Organization,
    check_conditions,
    is_authorized,
    parse_organization,
)
from clerkhooks.clerk.session_tokens import Claims, Session
from tests.support import load

CASES = load("authorization.json")["cases"]
ORGANIZATION: dict[str, Any] = {
    "id": "org_1",
    "slg": "acme",
    "rol": "admin",
    "per": "read,manage",
    "fpm": "3,2",
}
PRO: dict[str, Any] = {"v": 2, "o": ORGANIZATION, "fea": "o:notes,u:ai,o:teams"}


def session(claims: dict[str, Any]) -> Session:
    """Return a session with *claims*."""
    return Session("sess_1", "user_1", Claims(claims))


@pytest.mark.parametrize("number", range(0, len(CASES), 100))
def test_answers_as_clerks_sdk_does(number: int) -> None:
    """``has()`` returns the same result as the SDK, or False if the SDK throws an error."""
    for case in CASES[number : number + 100]:
        assert session(case["claims"]).has(**case["question"]) is (case["has"] is True), case


def test_reads_the_organization_as_clerks_sdk_does() -> None:
    """
    Id, role, slug and permissions are the same as in the SDK.

    Permissions that are not a list are ignored.
    """
    compared = [case for case in CASES if "raises" not in case and case["has"] in (True, False)]
    assert len(compared) > len(CASES) / 2
    for case in compared:
        organization = session(case["claims"]).organization
        found = (
            (organization.id, organization.role, organization.slug)
            if organization
            else (None, None, None)
        )
        assert found == (case["org_id"], case["org_role"], case["org_slug"]), case
        permissions = case["org_permissions"] if isinstance(case["org_permissions"], list) else []
        assert list(organization.permissions if organization else ()) == permissions, case


def test_reads_the_packed_permissions() -> None:
    """``fpm`` applies to the organization's features, not to the user's feature ``u:ai``."""
    assert parse_organization(PRO) == Organization(
        "org_1", "acme", "org:admin", ("org:notes:read", "org:notes:manage", "org:teams:manage")
    )


BREAKING: list[dict[str, Any]] = [
    {"fea": 5},
    {"fea": "notes"},
    {"fea": {}},
    {"o": {**ORGANIZATION, "per": 5}},
    {"o": {**ORGANIZATION, "fpm": []}},
    {"o": {}, "fea": 5},
]


@pytest.mark.parametrize("claims", BREAKING)
def test_denies_everything_if_the_sdk_throws(claims: dict[str, Any]) -> None:
    """Malformed claims grant nothing, and ``has()`` raises no exception."""
    odd = PRO | claims
    with pytest.raises(MalformedClaims):
        parse_organization(odd)
    assert session(odd).organization is None
    assert not session(odd).has(role="org:admin")


def test_denies_without_a_condition() -> None:
    """``has()`` without arguments returns False."""
    assert not session(PRO).has()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["o:notes", "read", "3", "admin", "org_1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "slg", "rol", "per", "fpm", "x"]), inner)
    ),
)
names = st.sampled_from(
    [
        "v",
        "o",
        "fea",
        "pla",
        "fva",
        "org_id",
        "org_role",
        "org_slug",
        "org_permissions",
        "sts",
        "act",
    ]
)


@given(st.dictionaries(names, values | st.just(2)))
def test_tolerates_any_claims(claims: dict[str, Any]) -> None:
    """Properties are readable and ``has()`` returns a bool, regardless of the claims."""
    held = session(claims)
    assert held.organization is None or held.organization.id
    assert (held.actor is None) or held.impersonated
    assert held.factor_verification_age is None or len(held.factor_verification_age) == 2
    for condition in (
        {"role": "org:admin"},
        {"permission": "org:notes:read"},
        {"feature": "notes"},
        {"plan": "pro"},
        {"reverification": "lax"},
    ):
        assert held.has(**condition) in (True, False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conditions", "error", "names"),
    [
        ({"role": 5}, TypeError, "role"),
        ({"permission": ["org:a:b"]}, TypeError, "permission"),
        ({"role": ""}, ValueError, "role"),
        ({"feature": "team:notes"}, ValueError, "feature"),
        ({"plan": ":pro"}, ValueError, "plan"),
        ({"reverification": "stict"}, ValueError, "strict_mfa"),
        ({"reverification": {"level": "x", "afterMinutes": 5}}, ValueError, "afterMinutes"),
        (
            {"reverification": {"level": "first_factor", "afterMinutes": 0}},
            ValueError,
            "afterMinutes",
        ),
        ({"reverification": 5}, ValueError, "level"),
    ],
)
def test_refuses_an_impossible_condition(
    conditions: dict[str, Any], error: type[Exception], names: str
) -> None:
    """A condition that no session can meet raises an error, because it must be a mistake."""
    with pytest.raises(error, match=names):
        check_conditions(conditions)


def test_refuses_an_unknown_condition() -> None:
    """A misspelt condition raises TypeError, even if it is None. Ignoring it would be unsafe."""
    for misspelt in ({"rolle": "org:admin"}, {"role": "org:admin", "rolle": None}):
        with pytest.raises(TypeError, match="'rolle' is not a condition"):
            check_conditions(misspelt)
        with pytest.raises(TypeError, match="'rolle' is not a condition"):
            session(PRO).has(**misspelt)


def test_ignores_absent_conditions() -> None:
    """A condition that is None has no effect."""
    assert check_conditions({"role": "admin", "plan": None}) == {"role": "admin"}
    assert session(PRO).has(role="org:admin", permission=None, plan=None)
    assert not session(PRO).has(role=None)


@pytest.mark.parametrize(
    "conditions",
    [
        {"feature": "org:notes"},
        {"plan": "user:pro"},
        {"reverification": {"level": "multi_factor", "afterMinutes": 1.5}},
    ],
)
def test_accepts_documented_conditions(conditions: dict[str, Any]) -> None:
    """All forms of conditions in Clerk's documentation are valid."""
    check_conditions(conditions)
    assert not is_authorized({}, **conditions)
