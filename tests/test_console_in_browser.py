"""The console in a real browser: by mouse and by keyboard, wide and narrow, light and dark, with content that means harm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from clerkhooks.clerk.events import NAME_LENGTH
from clerkhooks.cli.pretend import PretendedClerk, clerk_id
from tests.conftest import MakeDatabase, migrate
from tests.server import Server, serving
from tests.support import broken_users, deletion, user_event

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium")
PASSWORD = "correct horse battery staple"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 740}
HOSTILE = ("<script>document.title = 'owned'</script>", "\u202egnp.exe", "x" * 10_000, "\U0001f469\u200d\U0001f680 \U0001f389")

if not os.environ.get("REQUIRE_BROWSER"):
    pytest.importorskip("playwright")
    pytest.importorskip("axe_playwright_python")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed", allow_module_level=True)


@dataclass(frozen=True)
class Story:
    """Who is in the database: a failed message and its user, someone with events, someone deleted, someone unfilled."""

    server: Server
    failed_message: str
    failed_user: str
    changed: str
    hostile: tuple[str, ...]

    @property
    def root(self) -> str:
        """Where the console is."""
        return f"http://127.0.0.1:{self.server.port}/console"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def story(
    request: pytest.FixtureRequest, make_database: MakeDatabase, clerk: PretendedClerk, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    """The real server with its console, and what has happened on it."""
    url = make_database(request.param)
    migrate(url, clerk)
    log = tmp_path_factory.mktemp("console") / "server.log"
    with serving(url, clerk, log, CONSOLE_PASSWORD=PASSWORD) as server:
        for _ in range(105):
            assert server.deliver(user_event(clerk_id("user"))).status == 200
        gone, changed, failed = clerk_id("user"), clerk_id("user"), clerk_id("user")
        server.deliver(user_event(gone))
        server.deliver(deletion(gone))
        server.deliver(user_event(changed, at=1_700_000_000_000, first_name="Grace", last_name="Hopper"), "msg_early")
        server.deliver(user_event(changed, at=1_700_000_100_000, first_name="Grace", last_name="Murray Hopper"), "msg_winner")
        server.request("GET", "/api/me", headers={"Authorization": f"Bearer {clerk.session_token(clerk_id('user'))}"})
        hostile = tuple(clerk_id("user") for _ in HOSTILE)
        for user_id, name in zip(hostile, HOSTILE, strict=True):
            server.deliver(user_event(user_id, first_name=name, last_name=None))
        server.deliver(user_event(failed))
        with broken_users(server):
            server.deliver(user_event(failed, at=1_900_000_000_000), "msg_failed")
        yield Story(server, "msg_failed", failed, changed, hostile)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS)) as browser:
        yield browser


Open = Callable[..., "Page"]


@pytest.fixture
def visit(browser: Browser, story: Story) -> Iterator[Open]:
    """Open a page as one who knows the password; nothing may be asked of another host, and nothing may go wrong in the page."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_page(path: str = "/", viewport: dict[str, int] = WIDE, scheme: str = "light", password: str = PASSWORD) -> Page:
        credentials = {"username": "operator", "password": password}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, http_credentials=credentials)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # Aborted is what was still loading when the next page was opened.
        page.on("requestfailed", lambda request: wrong.append(request.url) if request.failure != "net::ERR_ABORTED" else None)
        page.on("request", lambda request: wrong.append(request.url) if urlsplit(request.url).hostname != "127.0.0.1" else None)
        page.goto(story.root + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def test_leads_from_a_failure_to_its_user_and_back(visit: Open, story: Story) -> None:
    """The overview says what is wrong; from there it is three clicks to the user, and as many back."""
    page = visit()
    assert page.get_by_role("heading", level=1).inner_text() != "All is well"
    page.get_by_role("link", name="Failed, never mended").click()
    page.get_by_role("link", name=story.failed_message).click()
    assert "It failed, and no retry has succeeded so far." in page.inner_text("main")
    assert "IntegrityError" in page.inner_text("main")
    page.get_by_role("link", name=story.failed_user).click()
    assert page.get_by_role("heading", level=1).inner_text() == "Ada Lovelace"
    for _ in range(3):
        page.go_back()
    assert page.get_by_role("link", name="Overview").get_attribute("aria-current") == "page"


def test_says_why_a_row_looks_as_it_does(visit: Open, story: Story) -> None:
    """A search by last name finds the user; the page names the event that won, which leads to its message."""
    page = visit("/users")
    page.get_by_role("searchbox").fill("murray")
    page.keyboard.press("Enter")
    page.wait_for_url("**/users?search=*")
    assert "murray" not in page.url
    page.get_by_role("link", name="Grace Murray Hopper").click()
    assert page.url.endswith(story.changed)
    page.get_by_role("region", name="Why the row looks like this").get_by_role("link", name="msg_winner").click()
    assert page.get_by_role("heading", level=1).inner_text() == "Message msg_winner"


@pytest.mark.parametrize("path", ["/users", "/messages"])
def test_pages(visit: Open, path: str) -> None:
    """Older and older until there is no more, each row once; and back to the newest at once."""
    page, seen = visit(path), set[str]()
    while True:
        links = page.locator("tbody a").all()
        found = {str(link.get_attribute("href")) for link in links if f"{path}/" in str(link.get_attribute("href"))}
        assert len(found) <= 50
        assert not found & seen
        seen |= found
        if not page.get_by_role("link", name="Older").count():
            break
        page.get_by_role("link", name="Older").click()
    assert len(seen) >= 110
    page.get_by_role("link", name="Newest").click()
    assert page.locator("tbody tr").count() == 50


def test_filters_messages(visit: Open) -> None:
    """Outcome, time, type and user, as a form that keeps what was chosen."""
    page = visit("/messages")
    page.get_by_label("Outcome").select_option("applied")
    page.get_by_label("Received in the last").select_option("24 hours")
    page.get_by_label("Type").fill("user.deleted")
    page.get_by_role("button", name="Show").click()
    assert page.locator("tbody tr").count() == 1
    assert page.get_by_label("Type").input_value() == "user.deleted"
    assert page.get_by_label("Outcome").input_value() == "applied"


def test_is_used_without_a_mouse(visit: Open, story: Story) -> None:
    """Tab and Enter alone lead from the overview to a user; where the focus is can be seen."""
    page = visit()

    def press_until(name: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent").strip().startswith(name):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                page.keyboard.press("Enter")
                return
        raise AssertionError(name)

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    press_until("Users")
    page.wait_for_url("**/users")
    page.locator("#search").focus()
    page.keyboard.type(story.changed)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/users/{story.changed}")
    press_until("msg_winner")
    page.wait_for_url("**/messages/msg_winner")


PATHS = ("/", "/messages", "/messages?outcome=failed", "/messages/msg_failed", "/messages/none", "/users", "/users?show=deleted")
LOOKS = pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light"), (NARROW, "dark")])


@pytest.mark.parametrize("story", ["postgresql"], indirect=True)  # what a page looks like is no question of the database
@LOOKS
def test_is_accessible_and_fits(visit: Open, story: Story, viewport: dict[str, int], scheme: str) -> None:
    """On each page axe finds nothing to mend, and nothing is wider than the screen, hostile content included."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit("/", viewport, scheme)
    for path in (*PATHS, *(f"/users/{user_id}" for user_id in (story.failed_user, story.changed, *story.hostile))):
        page.goto(story.root + path)
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0, path
        found = Axe().run(page)
        assert found.violations_count == 0, (path, found.generate_report())
        take_picture(page, f"{'narrow' if viewport is NARROW else 'wide'}-{scheme}-{path}")


def take_picture(page: Page, name: str) -> None:
    """Keep how a page looks in the folder that PICTURES names, if it does."""
    if folder := os.environ.get("PICTURES"):
        safe = "".join(character if character.isalnum() or character == "-" else "_" for character in name)
        page.screenshot(path=Path(folder) / f"{safe}.png", full_page=True)


def test_shows_hostile_content_as_text(visit: Open, story: Story) -> None:
    """A name is what it is: it runs nothing, turns no text around it, and is whole on its own page."""
    page = visit("/users")
    assert page.title() == "Users · clerkhooks"
    for user_id, name in zip(story.hostile, HOSTILE, strict=True):
        page.goto(f"{story.root}/users/{user_id}")
        heading = page.get_by_role("heading", level=1)
        assert heading.text_content() == name[:NAME_LENGTH]
        assert page.evaluate("getComputedStyle(document.querySelector('h1 bdi')).unicodeBidi") == "isolate"
        assert page.title() == "User · clerkhooks"
