"""Organizations and memberships in the console, the ``user`` command and the metrics."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest
import sqlalchemy as sa

from clerkhooks.clerk.fake import clerk_id
from clerkhooks.console import organizations as pages
from clerkhooks.store.activity import count_memberships, count_organizations
from clerkhooks.store.organization_queries import find_memberships
from tests.conftest import MakeService
from tests.support import Service, membership_event, organization_event, user_event
from tests.syncing import store_of
from tests.test_console import Console
from tests.test_metrics import TOKEN, scrape
from tests.test_users_commands import run

PASSWORD = secrets.token_hex(16)
ORGANIZATIONS, USERS = "/console/organizations", "/console/users"
Ids = tuple[str, str, str]


@pytest.fixture
def shown(make_service: MakeService) -> Service:
    """Create a service with tables of organizations, a console and metrics."""
    return make_service(
        CLERK_TABLES="organizations", CONSOLE_PASSWORD=PASSWORD, METRICS_TOKEN=TOKEN
    )


@pytest.fixture
def console(shown: Service) -> Console:
    """Create a client that sends the password."""
    return Console(shown, PASSWORD)


@pytest.fixture
def ids(shown: Service) -> Ids:
    """Store a member of an organization, and the member's earlier membership."""
    found = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    shown.outcome(user_event(found[2]))
    shown.outcome(organization_event(found[1], name="<b>Acme</b>"))
    shown.outcome(membership_event(found, role="org:admin"))
    shown.outcome(membership_event((clerk_id("orgmem"), *found[1:]), "deleted"))
    return found


def test_lists_organizations(shown: Service, console: Console, ids: Ids) -> None:
    """The newest is first, and pages continue."""
    shown.outcome(organization_event(clerk_id("org"), "deleted"))
    text = console.read(ORGANIZATIONS)
    assert text.index("Deleted Organization deleted") < text.index("&lt;b&gt;Acme&lt;/b&gt; acme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PAGE", 1)
        first = console.get(ORGANIZATIONS).text
        assert "Older" in first
        assert ids[1] not in first
    assert "Organizations 1 Memberships 1" in console.read("/console")


def test_shows_an_organization(console: Console, ids: Ids) -> None:
    """The page shows the row and the members. Memberships that ended are last."""
    text = console.read(f"{ORGANIZATIONS}/{ids[1]}")
    assert "&lt;b&gt;Acme&lt;/b&gt;" in text
    assert text.index("Ada Lovelace org:admin") < text.index("Ada Lovelace ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "MAX_MEMBERS", 1)
        assert "Only the first 1 are shown." in console.read(f"{ORGANIZATIONS}/{ids[1]}")


def test_shows_members_before_their_organization(
    shown: Service, console: Console, ids: Ids
) -> None:
    """The event of the organization, or of the user, may not have arrived yet."""
    early = (clerk_id("orgmem"), clerk_id("org"), clerk_id("user"))
    shown.outcome(membership_event(early))
    text = console.read(f"{ORGANIZATIONS}/{early[1]}")
    assert f"No row for {early[1]}" in text
    assert early[2] in text
    assert "has no memberships" in console.read(f"{ORGANIZATIONS}/{clerk_id('org')}")
    assert console.get(f"{ORGANIZATIONS}/{ids[2]}").status_code == 404


def test_shows_a_users_memberships(console: Console, ids: Ids) -> None:
    """The page of a user links to the organizations."""
    text = console.read(f"{USERS}/{ids[2]}")
    assert "&lt;b&gt;Acme&lt;/b&gt; org:admin" in text
    assert f"/organizations/{ids[1]}" in console.get(f"{USERS}/{ids[2]}").text
    assert "has no memberships of this user" in console.read(f"{USERS}/{clerk_id('user')}")


def test_shows_a_deleted_membership_without_ids(shown: Service, console: Console, ids: Ids) -> None:
    """An event may contain only the id of a deleted membership."""
    shown.outcome(membership_event(ids, "deleted", organization=None))
    shown.rows("UPDATE organization_memberships SET organization_id = NULL")
    assert "unknown ended" in console.read(f"{USERS}/{ids[2]}")


def test_has_no_pages_by_default(make_service: MakeService) -> None:
    """Without the tables, there is no page, and no link to one."""
    console = Console(make_service(CONSOLE_PASSWORD=PASSWORD), PASSWORD)
    assert console.get(ORGANIZATIONS).status_code == 404
    assert "rganizations" not in console.read("/console")
    assert "Memberships" not in console.read(f"{USERS}/{clerk_id('user')}")


def test_prints_a_users_memberships(shown: Service, ids: Ids) -> None:
    """The command ``user`` shows them as a table and as JSON."""
    table = run(shown, "user", ids[2]).stdout
    assert "organization_name" in table
    assert f"{ids[1]}  <b>Acme</b>        org:admin" in table
    listed = json.loads(run(shown, "user", ids[2], "--json").stdout)["memberships"]
    assert [(each["id"] == ids[0], each["role"]) for each in listed] == [
        (True, "org:admin"),
        (False, None),
    ]
    assert listed[0]["organization_id"] == ids[1]


def test_prints_no_memberships_by_default(service: Service) -> None:
    """Without the tables, the output has no memberships."""
    shown = json.loads(run(service, "user", clerk_id("user"), "--json").stdout)
    assert set(shown) == {"user", "messages"}


@pytest.mark.parametrize("table", ["organizations", "organization_memberships"])
def test_counts_live_rows_with_an_index(shown: Service, table: str) -> None:
    """A count does not read the tombstones, of which there may be millions."""
    statements: list[tuple[str, Any]] = []
    store = store_of(shown)

    def listen(_connection: object, _cursor: object, text: str, values: Any, *_: object) -> None:
        statements.append((text, values))

    sa.event.listen(store.database.engine, "before_cursor_execute", listen)
    count = count_organizations if table == "organizations" else count_memberships
    assert count(store) == 0
    sa.event.remove(store.database.engine, "before_cursor_execute", listen)
    with store.database.connect() as connection:
        explain = "EXPLAIN QUERY PLAN" if store.database.dialect_name == "sqlite" else "EXPLAIN"
        if explain == "EXPLAIN":
            connection.exec_driver_sql("SET enable_seqscan = off")
        [(text, values)] = [each for each in statements if "count" in each[0]]
        plan = connection.exec_driver_sql(f"{explain} {text}", values).all()
        connection.invalidate()
    assert f"ix_{table}_live" in str(plan)


def test_looks_up_names_of_the_shown_members_only(shown: Service, ids: Ids) -> None:
    """In a large organization, other members' users are not joined."""
    statements: list[str] = []
    engine = store_of(shown).database.engine

    def listen(_connection: object, _cursor: object, text: str, *_: object) -> None:
        statements.append(text)

    sa.event.listen(engine, "before_cursor_execute", listen)
    [found] = find_memberships(store_of(shown), 1, organization_id=ids[1])
    sa.event.remove(engine, "before_cursor_execute", listen)
    assert (found.id, found.organization_name) == (ids[0], "<b>Acme</b>")
    [text] = [each for each in statements if "JOIN" in each]
    assert text.rindex("LIMIT") < text.index("JOIN")


def test_counts_organizations_and_memberships(
    shown: Service, ids: Ids, make_service: MakeService
) -> None:
    """The metrics count those that have not ended. They do not exist without the tables."""
    shown.outcome(membership_event((clerk_id("orgmem"), *ids[1:])))
    found = scrape(shown)
    assert (found[("organizations",)], found[("memberships",)]) == (1, 2)
    assert ("organizations",) not in scrape(make_service(METRICS_TOKEN=TOKEN))
