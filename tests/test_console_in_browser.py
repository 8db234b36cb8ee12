"""The console in a real browser: mouse, keyboard, widths, colours and hostile content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from clerkhooks.clerk.fake import FakeClerk, clerk_id
from clerkhooks.clerk.kinds import NAME_LENGTH
from tests.conftest import MakeDatabase, migrate
from tests.server import Server, serving
from tests.support import broken_users, deletion, user_event

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

CHROMIUM = shutil.which("chromium")
PASSWORD = "correct-horse-battery-staple"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 740}
HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "\u202egnp.exe",
    "x" * 10_000,
    "\U0001f469\u200d\U0001f680 \U0001f389",
)

if not os.environ.get("REQUIRE_BROWSER"):
    pytest.importorskip("playwright")
    pytest.importorskip("axe_playwright_python")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed", allow_module_level=True)


@dataclass(frozen=True)
class Story:
    """The server, the id of a failed message, and the ids of users in several states."""

    server: Server
    failed_message: str
    failed_user: str
    changed: str
    hostile: tuple[str, ...]

    @property
    def root(self) -> str:
        """The URL of the console."""
        return f"http://127.0.0.1:{self.server.port}/console"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def story(
    request: pytest.FixtureRequest,
    make_database: MakeDatabase,
    clerk: FakeClerk,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    """Run the real server with a console and with some delivered events."""
    url = make_database(request.param)
    migrate(url, clerk)
    log = tmp_path_factory.mktemp("console") / "server.log"
    with serving(url, clerk, log, CONSOLE_PASSWORD=PASSWORD) as server:
        for _ in range(105):
            assert server.deliver(user_event(clerk_id("user"))).status == 200
        gone, changed, failed = clerk_id("user"), clerk_id("user"), clerk_id("user")
        server.deliver(user_event(gone))
        server.deliver(deletion(gone))
        server.deliver(
            user_event(changed, at=1_700_000_000_000, first_name="Grace", last_name="Hopper"),
            "msg_early",
        )
        server.deliver(
            user_event(
                changed, at=1_700_000_100_000, first_name="Grace", last_name="Murray Hopper"
            ),
            "msg_winner",
        )
        server.request(
            "GET",
            "/api/me",
            headers={"Authorization": f"Bearer {clerk.session_token(clerk_id('user'))}"},
        )
        hostile = tuple(clerk_id("user") for _ in HOSTILE)
        for user_id, name in zip(hostile, HOSTILE, strict=True):
            server.deliver(user_event(user_id, first_name=name, last_name=None))
        server.deliver(user_event(failed))
        with broken_users(server):
            server.deliver(user_event(failed, at=1_900_000_000_000), "msg_failed")
        yield Story(server, "msg_failed", failed, changed, hostile)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run Chromium."""
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS)) as browser,
    ):
        yield browser


Open = Callable[..., "Page"]


@pytest.fixture
def visit(browser: Browser, story: Story) -> Iterator[Open]:
    """Return a function that opens pages; fail on errors and on requests to other hosts."""
    contexts: list[BrowserContext] = []
    problems: list[str] = []

    def open_page(
        path: str = "/",
        viewport: dict[str, int] = WIDE,
        scheme: str = "light",
        password: str = PASSWORD,
    ) -> Page:
        credentials: Any = {"username": "operator", "password": password}
        options: Any = {"viewport": viewport, "color_scheme": scheme}
        context = browser.new_context(http_credentials=credentials, **options)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console",
            lambda message: (
                problems.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        # The browser aborts requests if the user leaves a page while it is loading.
        page.on(
            "requestfailed",
            lambda request: (
                problems.append(request.url) if request.failure != "net::ERR_ABORTED" else None
            ),
        )
        page.on(
            "request",
            lambda request: (
                problems.append(request.url)
                if urlsplit(request.url).hostname != "127.0.0.1"
                else None
            ),
        )
        page.goto(story.root + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def follow(page: Page, link: Locator) -> None:
    """Click *link* and wait for the next page, because ``click`` alone does not wait."""
    with page.expect_navigation():
        link.click()


def test_links_a_failure_to_its_user(visit: Open, story: Story) -> None:
    """Three clicks lead from the overview to the user's page, and the Back button leads back."""
    page = visit()
    assert "error" in page.get_by_role("heading", level=1).inner_text()
    follow(page, page.get_by_role("link", name="Unresolved failures"))
    follow(page, page.get_by_role("link", name=story.failed_message))
    assert "It failed, and no retry has succeeded yet." in page.inner_text("main")
    assert "IntegrityError" in page.inner_text("main")
    follow(page, page.get_by_role("link", name=story.failed_user))
    assert page.get_by_role("heading", level=1).inner_text() == "Ada Lovelace"
    for _ in range(3):
        page.go_back()
    assert page.get_by_role("link", name="Overview").get_attribute("aria-current") == "page"


def test_explains_the_source_of_a_row(visit: Open, story: Story) -> None:
    """A search by last name leads to the user's page, which links to the winning message."""
    page = visit("/users")
    page.get_by_role("searchbox").fill("murray")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/users/{story.changed}")
    source = page.get_by_role("region", name="Where the data comes from")
    follow(page, source.get_by_role("link", name="msg_winner"))
    assert page.get_by_role("heading", level=1).inner_text() == "Message msg_winner"


def test_pages_through_a_search(visit: Open, story: Story) -> None:
    """All pages of a search can be reached, and no URL contains the search term."""
    page, seen = visit("/users"), set[str]()
    page.get_by_role("searchbox").fill("lovelace")
    follow(page, page.get_by_role("button", name="Search"))
    for size in (50, 50, 6):
        links = page.locator("tbody a").all()
        assert len(links) == size
        seen |= {str(link.get_attribute("href")) for link in links}
        assert page.url == f"{story.root}/users"
        assert page.get_by_role("searchbox").input_value() == "lovelace"
        if size == 50:
            follow(page, page.get_by_role("button", name="Older"))
    assert len(seen) == 106
    assert not page.get_by_role("button", name="Older").count()


def test_runs_all_checks(visit: Open) -> None:
    """The overview links to the findings of all checks."""
    page = visit()
    follow(page, page.get_by_role("link", name="Run all checks"))
    assert "Every variable is valid." in page.inner_text("main")
    assert page.get_by_role("link", name="Checks").get_attribute("aria-current") == "page"


@pytest.mark.parametrize("path", ["/users", "/messages"])
def test_pages(visit: Open, path: str) -> None:
    """Paging shows each row once. The oldest page links to the newest."""
    page, seen = visit(path), set[str]()
    for _ in range(20):
        links = page.locator("tbody a").all()
        found = {
            str(link.get_attribute("href"))
            for link in links
            if f"{path}/" in str(link.get_attribute("href"))
        }
        assert len(found) <= 50
        assert not found & seen
        seen |= found
        if not page.get_by_role("link", name="Older").count():
            break
        follow(page, page.get_by_role("link", name="Older"))
    else:
        raise AssertionError("the pages do not end")
    assert len(seen) >= 110
    follow(page, page.get_by_role("link", name="Newest"))
    assert page.locator("tbody tr").count() == 50


def test_filters_messages(visit: Open) -> None:
    """The form filters by outcome, time and type, and still shows its values afterwards."""
    page = visit("/messages")
    page.get_by_label("Outcome").select_option("applied")
    page.get_by_label("Received").select_option("in the last 24 hours")
    page.get_by_label("Type").fill("user.deleted")
    follow(page, page.get_by_role("button", name="Show"))
    assert page.locator("tbody tr").count() == 1
    assert page.get_by_label("Type").input_value() == "user.deleted"
    assert page.get_by_label("Outcome").input_value() == "applied"


def test_works_without_a_mouse(visit: Open, story: Story) -> None:
    """Links can be followed with the Tab and Enter keys. The focus is always visible."""
    page = visit()

    def press_until(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent").strip().startswith(name):
                assert (
                    page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                    == "solid"
                )
                page.keyboard.press("Enter")
                return
        raise AssertionError(f"Tab does not reach {name!r}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    press_until("Users")
    page.wait_for_url("**/users")
    page.locator("#search").focus()
    page.keyboard.type(story.changed)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/users/{story.changed}")
    press_until("msg_winner")
    page.wait_for_url("**/messages/msg_winner")


PATHS = (
    "/",
    "/checks",
    "/messages",
    "/messages?outcome=failed",
    "/messages/msg_failed",
    "/messages/none",
    "/users",
    "/users?show=deleted",
)
LOOKS = pytest.mark.parametrize(
    ("viewport", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light"), (NARROW, "dark")]
)


@pytest.mark.parametrize("story", ["postgresql"], indirect=True)  # same layout on SQLite
@LOOKS
def test_is_accessible_and_fits(
    visit: Open, story: Story, viewport: dict[str, int], scheme: str
) -> None:
    """The axe checker finds no violations, and no page is wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit("/", viewport, scheme)
    for path in (
        *PATHS,
        *(f"/users/{user_id}" for user_id in (story.failed_user, story.changed, *story.hostile)),
    ):
        page.goto(story.root + path)
        assert (
            page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            == 0
        ), path
        found = Axe().run(page)
        assert found.violations_count == 0, (path, found.generate_report())
        take_picture(page, f"{'narrow' if viewport is NARROW else 'wide'}-{scheme}-{path}")


def take_picture(page: Page, name: str) -> None:
    """Save a screenshot if the environment variable PICTURES names a folder."""
    if folder := os.environ.get("PICTURES"):
        safe = "".join(
            character if character.isalnum() or character == "-" else "_" for character in name
        )
        page.screenshot(path=Path(folder) / f"{safe}.png", full_page=True)


def test_escapes_hostile_content(visit: Open, story: Story) -> None:
    """Names are shown as stored: scripts do not run, and right-to-left text stays in its field."""
    page = visit("/users")
    assert page.title() == "Users · clerkhooks"
    for user_id, name in zip(story.hostile, HOSTILE, strict=True):
        page.goto(f"{story.root}/users/{user_id}")
        heading = page.get_by_role("heading", level=1)
        assert heading.text_content() == name[:NAME_LENGTH]
        assert (
            page.evaluate("getComputedStyle(document.querySelector('h1 bdi')).unicodeBidi")
            == "isolate"
        )
        assert page.title() == "User · clerkhooks"
