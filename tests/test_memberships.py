"""``current_user.memberships``, and views for members of an organization."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, ClassVar

import pytest
from flask import Blueprint, Flask, jsonify
from flask.views import MethodView

from clerkhooks import ClerkUser, current_user, require_auth
from clerkhooks.clerk.fake import clerk_id, event_body
from clerkhooks.web.auth import Protection, refuse_unprotected
from tests.application import Application, MakeApplication
from tests.conftest import SLOW_ON_POSTGRESQL, MakeDatabase
from tests.racing import delivery, on_statement, run_contending
from tests.support import (
    deletion,
    membership_data,
    membership_event,
    organization_event,
    user_event,
)

pytest_plugins = ["tests.application"]
NOW = int(time.time())
MINUTES_AGO = (NOW - 300) * 1000
PATH = "/organizations/<organization_id>/notes"


@pytest.fixture
def storing(make_application: MakeApplication, empty_database: str) -> Application:
    """Create an application with tables of organizations."""
    return make_application(empty_database, CLERK_TABLES="organizations")


def add_view(app: Flask, path: str = PATH, **conditions: Any) -> None:
    """Add a protected view."""
    view = require_auth(organization="organization_id", **conditions)(lambda **_: jsonify(ok=True))
    app.add_url_rule(path, path, view)


def answer(application: Application, user_id: str, path: str, **claims: Any) -> Any:
    """Call a view, and return the reason of the refusal or the status 200."""
    response = application.call(user_id, path=path, **claims)
    return response.status_code if response.status_code == 200 else response.get_json()["reason"]


def token_for(organization_id: str, role: str = "member", at: float = NOW, **more: Any) -> Any:
    """Return the claims of a token for an active organization, issued at a time in seconds."""
    return {"o": {"id": organization_id, "rol": role, "slg": "acme"}, "iat": at, **more}


def test_lists_the_memberships(storing: Application) -> None:
    """They are frozen, typed, loaded on first access, and only those that have not ended."""
    user_id, acme, other = clerk_id("user"), clerk_id("org"), clerk_id("org")
    one, two, ended = (clerk_id("orgmem") for _ in range(3))
    selects: list[None] = []
    found: list[Any] = []

    def view() -> dict[str, bool]:
        count = len(selects)
        found.extend(current_user.memberships)
        assert current_user.memberships is storing.hooks.current_user.memberships
        return {"once": len(selects) == count + 1}

    storing.app.add_url_rule("/mine", "mine", require_auth(view))
    storing.outcome(membership_event((one, acme, user_id), role="org:admin"))
    storing.outcome(membership_event((two, other, user_id)))
    storing.outcome(membership_event((ended, other, user_id), "deleted"))
    storing.outcome(membership_event((clerk_id("orgmem"), acme, clerk_id("user"))))
    with on_statement(storing, "SELECT organization_memberships", lambda: selects.append(None)):
        assert storing.call(user_id, path="/mine").get_json() == {"once": True}
    shown = [(each.id, each.organization_id, each.user_id, each.role) for each in found]
    assert shown == [(one, acme, user_id, "org:admin"), (two, other, user_id, "org:member")]
    assert found[0].created_at.utcoffset().total_seconds() == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].role = "org:owner"


def test_has_no_memberships_by_default(application: Application) -> None:
    """Without the tables, the attribute does not exist. The error says what to do."""
    errors: list[str] = []

    def view() -> str:
        assert not hasattr(current_user, "memberships")
        with pytest.raises(AttributeError) as raised:
            _ = current_user.memberships
        errors.append(str(raised.value))
        return ""

    application.app.add_url_rule("/mine", "mine", require_auth(view))
    assert application.call(clerk_id("user"), path="/mine").status_code == 200
    assert errors == ["current_user.memberships needs CLERK_TABLES=organizations."]


def test_does_not_hide_the_models_own_attribute(
    make_application: MakeApplication, empty_database: str
) -> None:
    """If the application's model has ``memberships``, it stays what it is."""
    own = {"memberships": property(lambda user: f"memberships of {user.id}")}
    application = make_application(empty_database, own, CLERK_TABLES="organizations")
    view = require_auth(lambda: jsonify(str(current_user.memberships)))
    application.app.add_url_rule("/mine", "mine", view)
    user_id = clerk_id("user")
    assert application.call(user_id, path="/mine").get_json() == f"memberships of {user_id}"
    assert issubclass(application.model, ClerkUser)


def test_admits_members(storing: Application) -> None:
    """The token's active organization does not matter. Others are refused, also after leaving."""
    add_view(storing.app)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    path = f"/organizations/{ids[1]}/notes"
    assert answer(storing, ids[2], path) == "not_a_member"
    storing.outcome(membership_event(ids, at=MINUTES_AGO))
    assert answer(storing, ids[2], path) == 200
    assert answer(storing, ids[2], path, **token_for(clerk_id("org"))) == 200
    assert answer(storing, ids[2], f"/organizations/{clerk_id('org')}/notes") == "not_a_member"
    assert answer(storing, clerk_id("user"), path) == "not_a_member"
    storing.outcome(membership_event(ids, "deleted"))
    assert answer(storing, ids[2], path) == "not_a_member"
    assert answer(storing, ids[2], path, **token_for(ids[1])) == "not_a_member"


@pytest.mark.parametrize(
    "organization_id", ["%00", "org_a%00b", "%FF", "org_é", "org_" + "a" * 999]
)
def test_refuses_malformed_ids(storing: Application, organization_id: str) -> None:
    """Ids that a database would refuse are no error."""
    add_view(storing.app)
    path = f"/organizations/{organization_id}/notes"
    assert answer(storing, clerk_id("user"), path) == "not_a_member"


@pytest.mark.parametrize("organization_id", ["\x00", "org_a\x00b", "\ud800"])
def test_ignores_a_malformed_id_in_a_token(storing: Application, organization_id: str) -> None:
    """The tables are not asked about it."""
    view = require_auth(role="org:admin")(lambda: jsonify(ok=True))
    storing.app.add_url_rule("/notes", "notes", view)
    claims = token_for(organization_id, "admin")
    assert answer(storing, clerk_id("user"), "/notes", **claims) in (200, "forbidden")


def test_does_not_use_permissions_of_an_older_role(storing: Application) -> None:
    """After a demotion, a token that was issued before it has no permissions."""
    add_view(storing.app, permission="org:notes:edit")
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    path, granted = f"/organizations/{ids[1]}/notes", {"per": "edit", "fpm": "1"}
    claims = token_for(ids[1], "admin", NOW - 30) | {"v": 2, "fea": "o:notes"}
    claims["o"] |= granted
    storing.outcome(membership_event(ids, at=MINUTES_AGO, role="org:admin"))
    assert answer(storing, ids[2], path, **claims) == 200
    storing.outcome(membership_event(ids, at=NOW * 1000, role="org:member"))
    assert answer(storing, ids[2], path, **claims) == "forbidden"


def test_refuses_members_of_deleted_organizations(storing: Application) -> None:
    """Nobody is a member, although tokens for the organization are still valid."""
    add_view(storing.app)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    path = f"/organizations/{ids[1]}/notes"
    storing.outcome(membership_event(ids))
    storing.outcome(organization_event(ids[1], "deleted"))
    claims = token_for(ids[1])
    assert answer(storing, ids[2], path, **claims) == "not_a_member"
    assert answer(storing, clerk_id("user"), path, **claims) == "not_a_member"
    storing.outcome(deletion(ids[2]))
    assert answer(storing, ids[2], path, **claims) == "user_deleted"


@pytest.mark.parametrize("empty_database", SLOW_ON_POSTGRESQL, indirect=True)
@pytest.mark.parametrize("path", [PATH, "/notes"])
@pytest.mark.parametrize(
    ("here", "token", "expected"),
    [
        (None, None, "refused"),
        (None, ("admin", 0), 200),
        (None, ("member", 0), "forbidden"),
        (("org:admin", -60), ("member", 0), "forbidden"),
        (("org:admin", -60), ("admin", 0), 200),
        (("org:member", 0), ("admin", -30), "forbidden"),
        (("org:admin", 0), ("member", -30), 200),
        (("org:member", 0), ("admin", 0), "forbidden"),
        (("org:member", -1), ("admin", 0), 200),
        (("deleted", 0), ("admin", -30), "refused"),
        (("deleted", 0), ("admin", 0), "refused"),
    ],
)
def test_asks_whichever_is_newer_for_the_role(
    storing: Application, path: str, here: Any, token: Any, expected: Any
) -> None:
    """The table's role counts unless the token was issued after the membership changed."""
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    if path == PATH:
        add_view(storing.app, role="org:admin")
        path, refused = f"/organizations/{ids[1]}/notes", "not_a_member"
    else:
        view = require_auth(role="org:admin")(lambda: jsonify(ok=True))
        storing.app.add_url_rule(path, path, view)
        refused = "forbidden"
    storing.outcome(user_event(ids[2]))
    if here is not None:
        role, seconds = here
        storing.outcome(membership_event(ids, at=(NOW + seconds) * 1000, role=role))
        if role == "deleted":
            storing.outcome(membership_event(ids, "deleted"))
    claims = {} if token is None else token_for(ids[1], token[0], NOW + token[1])
    found = answer(storing, ids[2], path, **claims)
    assert found == (refused if expected == "refused" else expected)


@pytest.mark.parametrize("was_lost", [False, True], ids=["late", "lost"])
def test_decides_by_the_newest_of_several_memberships(storing: Application, was_lost: bool) -> None:
    """
    A user has one membership at a time in an organization.

    The late deletion of the first does not end the second. The deletion of the second shows that
    the first, whose deletion was lost, has ended too.
    """
    add_view(storing.app)
    view = require_auth(lambda: jsonify(len(current_user.memberships)))
    storing.app.add_url_rule("/mine", "mine", view)
    acme, user_id = clerk_id("org"), clerk_id("user")
    first, second = ((clerk_id("orgmem"), acme, user_id) for _ in range(2))
    storing.outcome(membership_event(first, at=MINUTES_AGO))
    storing.outcome(membership_event(second, at=MINUTES_AGO + 2000))
    if was_lost:
        storing.outcome(membership_event(second, "deleted", at=MINUTES_AGO + 3000))
    else:
        storing.outcome(membership_event(first, "deleted", at=MINUTES_AGO + 1000))
    path = f"/organizations/{acme}/notes"
    assert answer(storing, user_id, path) == ("not_a_member" if was_lost else 200)
    claims = token_for(acme, at=NOW - 30)
    assert answer(storing, user_id, path, **claims) == ("not_a_member" if was_lost else 200)
    assert storing.call(user_id, path="/mine").get_json() == (0 if was_lost else 1)


def test_ends_with_the_organization_whatever_the_row_says(storing: Application) -> None:
    """A membership that missed its organization's deletion is not read as a live one."""
    add_view(storing.app)
    view = require_auth(lambda: jsonify(len(current_user.memberships)))
    storing.app.add_url_rule("/mine", "mine", view)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    storing.outcome(organization_event(ids[1], "deleted"))
    storing.outcome(membership_event(ids, at=NOW * 1000))
    storing.rows(
        f"UPDATE organization_memberships SET deleted_at = NULL, version_updated_at = {NOW}000, "
        f"version_timestamp = {NOW}000, version_message_id = ''"
    )
    path = f"/organizations/{ids[1]}/notes"
    assert answer(storing, ids[2], path) == "not_a_member"
    assert answer(storing, ids[2], path, **token_for(ids[1])) == "not_a_member"
    assert storing.call(ids[2], path="/mine").get_json() == 0


@pytest.mark.parametrize("deletion_first", [True, False])
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_ends_with_the_organization_at_any_isolation_level(
    make_application: MakeApplication,
    emptied_database: MakeDatabase,
    level: str,
    deletion_first: bool,
) -> None:
    """A handler's transaction may wait for a concurrent deletion and still not see it."""
    options = {"isolation_level": level}
    tables = {"CLERK_TABLES": "organizations", "SQLALCHEMY_ENGINE_OPTIONS": options}
    application = make_application(emptied_database("postgresql"), **tables)
    add_view(application.app)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    bodies = [organization_event(ids[1], "deleted"), membership_event(ids)]
    bodies = bodies if deletion_first else bodies[::-1]
    answers = run_contending(application, *(delivery(application, body) for body in bodies))
    for body, response in zip(bodies, answers, strict=True):
        if response.status_code == 500:  # a serialization failure, after which Svix retries
            application.outcome(body)
    path = f"/organizations/{ids[1]}/notes"
    assert answer(application, ids[2], path, **token_for(ids[1])) == "not_a_member"


def test_knows_the_role_as_of_the_events_time(storing: Application) -> None:
    """An event may repeat an old ``updated_at``. Its timestamp is newer than the token."""
    add_view(storing.app, role="org:admin")
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    data = membership_data(*ids, updated_at=MINUTES_AGO) | {"role": "org:member"}
    storing.outcome(event_body("organizationMembership.updated", data, NOW * 1000))
    claims = token_for(ids[1], "admin", NOW - 30)
    assert answer(storing, ids[2], f"/organizations/{ids[1]}/notes", **claims) == "forbidden"


def test_admits_who_returned_before_the_webhook(storing: Application) -> None:
    """A token that was issued well after the deletion shows that the user is a member again."""
    add_view(storing.app)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    storing.outcome(membership_event(ids, "deleted"))
    storing.rows("UPDATE organization_memberships SET updated_at = '2020-01-01 00:00:00.000000'")
    path = f"/organizations/{ids[1]}/notes"
    assert answer(storing, ids[2], path, **token_for(ids[1])) == 200
    assert answer(storing, ids[2], path) == "not_a_member"


@pytest.mark.parametrize("condition", [{"permission": "org:notes:edit"}, {"plan": "org:pro"}])
def test_needs_a_token_of_the_organization(storing: Application, condition: dict[str, str]) -> None:
    """Permissions and plans are only in tokens, and only those of the active organization."""
    add_view(storing.app, **condition)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    path = f"/organizations/{ids[1]}/notes"
    storing.outcome(membership_event(ids, at=MINUTES_AGO))
    granted = {"fea": "o:notes", "pla": "o:pro"}
    organization = token_for(ids[1])["o"] | {"per": "edit", "fpm": "1"}
    own = {"o": organization, **granted}
    assert answer(storing, ids[2], path, **own) == 200
    other = {"o": organization | {"id": clerk_id("org")}, **granted}
    assert answer(storing, ids[2], path, **other) == "organization_required"
    assert answer(storing, ids[2], path) == "organization_required"
    assert answer(storing, ids[2], path, o=organization | {"per": "", "fpm": ""}) == "forbidden"


def test_takes_the_users_own_plan_anywhere(storing: Application) -> None:
    """A condition on the user does not depend on the active organization."""
    add_view(storing.app, plan="user:pro")
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    storing.outcome(membership_event(ids))
    path = f"/organizations/{ids[1]}/notes"
    assert answer(storing, ids[2], path, pla="u:pro") == 200
    assert answer(storing, ids[2], path) == "forbidden"


def test_refuses_a_permission_of_a_removed_member(storing: Application) -> None:
    """The token still contains the permission, but the membership has ended."""
    view = require_auth(permission="org:notes:edit")(lambda: jsonify(ok=True))
    storing.app.add_url_rule("/notes", "notes", view)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    organization = token_for(ids[1])["o"] | {"per": "edit", "fpm": "1"}
    assert answer(storing, ids[2], "/notes", o=organization, fea="o:notes") == 200
    storing.outcome(membership_event(ids, "deleted"))
    assert answer(storing, ids[2], "/notes", o=organization, fea="o:notes") == "forbidden"


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"feature": "notes"}, "forbidden"),
        ({"feature": "org:notes"}, "forbidden"),
        ({"plan": "pro"}, "forbidden"),
        ({"plan": "user:pro"}, 200),
        ({"plan": "user:pro", "feature": "org:notes"}, "forbidden"),
    ],
)
def test_refuses_features_and_plans_to_a_removed_member(
    storing: Application, condition: Any, expected: Any
) -> None:
    """Those of the organization end with the membership. The user's own do not."""
    view = require_auth(**condition)(lambda: jsonify(ok=True))
    storing.app.add_url_rule("/notes", "notes", view)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    claims = token_for(ids[1]) | {"fea": "o:notes", "pla": "ou:pro"}
    assert answer(storing, ids[2], "/notes", **claims) == 200
    storing.outcome(membership_event(ids, at=MINUTES_AGO))
    assert answer(storing, ids[2], "/notes", **claims) == 200
    storing.outcome(membership_event(ids, "deleted"))
    assert answer(storing, ids[2], "/notes", **claims) == expected


def test_protects_a_blueprint(storing: Application) -> None:
    """A route without the parameter is refused."""
    blueprint = Blueprint("notes", __name__)
    blueprint.before_request(require_auth(organization="organization_id"))
    blueprint.add_url_rule(PATH, "one", lambda **_: jsonify(ok=True))
    blueprint.add_url_rule("/all", "all", lambda: jsonify(ok=True))
    storing.app.register_blueprint(blueprint)
    ids = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    storing.outcome(membership_event(ids))
    assert answer(storing, ids[2], f"/organizations/{ids[1]}/notes") == 200
    assert answer(storing, ids[2], "/all") == "organization_required"


def test_refuses_a_route_without_the_parameter(storing: Application) -> None:
    """The view is not served, because its members cannot be determined."""
    add_view(storing.app, "/notes/<int:number>")
    with pytest.raises(RuntimeError, match="has no parameter 'organization_id'"):
        refuse_unprotected(storing.app)
    assert storing.call(clerk_id("user"), path="/notes/1").status_code == 500


@pytest.mark.parametrize("on_method", [True, False])
def test_refuses_a_method_view_without_the_parameter(storing: Application, on_method: bool) -> None:
    """It does not matter whether the class or one of its methods is protected."""
    protect = require_auth(organization="organization_id")

    class Notes(MethodView):
        decorators: ClassVar[list[Any]] = [] if on_method else [protect]

        def get(self, **_: str) -> str:
            return ""

        if on_method:
            get = protect(get)

    storing.app.add_url_rule(PATH, "good", Notes.as_view("good"))
    refuse_unprotected(storing.app)
    storing.app.add_url_rule("/notes", "bad", Notes.as_view("bad"))
    with pytest.raises(RuntimeError, match="'/notes' has no parameter 'organization_id'"):
        refuse_unprotected(storing.app)


def test_refuses_an_application_without_the_tables(application: Application) -> None:
    """The response is 500: nobody is admitted."""
    path = f"/organizations/{clerk_id('org')}/notes"
    application.app.before_request(require_auth(organization="organization_id"))
    application.app.add_url_rule(PATH, "view", lambda **_: jsonify(ok=True))
    assert application.call(clerk_id("user"), path=path).status_code == 500


def test_refuses_a_view_without_the_tables(application: Application) -> None:
    """The error is found before the first request."""
    add_view(application.app)
    with pytest.raises(RuntimeError, match="needs CLERK_TABLES=organizations"):
        refuse_unprotected(application.app)


def test_cannot_be_optional() -> None:
    """An anonymous caller is nobody's member."""
    with pytest.raises(ValueError, match="cannot be combined"):
        require_auth(optional=True, organization="organization_id")
    assert isinstance(require_auth(organization="organization_id"), Protection)
