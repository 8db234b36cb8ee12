"""The documentation in a real browser: accessibility, widths, colours and the search."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.documentation import DOCS, blocks, pages, read_page
from tests.support import serving_in_thread
from tests.test_console_in_browser import NARROW, WIDE, take_picture
from tests.test_console_in_browser import browser as browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

if not os.environ.get("REQUIRE_BROWSER"):
    pytest.importorskip("sphinx")
PAGES = [page.relative_to(DOCS).with_suffix("").as_posix() for page in pages()]
COLORFUL = (
    "index",
    "search",
    "explanation/architecture",
    "how-to/mobile",
    "how-to/monitor",
    "how-to/organizations",
    "how-to/server",
    "reference/commands",
    "reference/http",
    "reference/python",
)
"""Pages with every kind of element and every language of code blocks."""


class Handler(SimpleHTTPRequestHandler):
    """Serves files without logging requests."""

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the documentation, serve it, and return the URL of its root."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", str(DOCS), str(folder)]
    subprocess.run(build, check=True, timeout=200)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    with serving_in_thread(server, Event()):
        yield f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def page(request: pytest.FixtureRequest, browser: Browser) -> Iterator[Page]:
    """Open a page; fail on errors and on requests to other hosts."""
    viewport, scheme = getattr(request, "param", (WIDE, "light"))
    options: Any = {"viewport": viewport, "color_scheme": scheme}
    problems: list[str] = []
    context = browser.new_context(**options)
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    # The browser aborts requests if the user leaves a page while it is loading.
    page.on(
        "requestfailed",
        lambda failed: (
            problems.append(failed.url) if failed.failure != "net::ERR_ABORTED" else None
        ),
    )
    page.on("request", lambda sent: problems.extend(other_hosts(sent.url)))
    yield page
    context.close()
    assert problems == []


def other_hosts(url: str) -> list[str]:
    """Return *url* in a list if it is not part of the site."""
    parts = urlsplit(url)
    return [url] if parts.scheme != "data" and parts.hostname != "127.0.0.1" else []


@pytest.mark.parametrize("page", [(WIDE, "light"), (NARROW, "dark")], indirect=True)
def test_is_accessible_and_fits(page: Page, site: str) -> None:
    """
    The axe checker finds no violations, and no page is wider than the screen.

    Contrast, which takes the most time, is checked on colorful pages. Only these are checked on a
    phone.
    """
    size = page.viewport_size or WIDE
    for name in (*PAGES, "search"):
        page.goto(f"{site}/{name}.html")
        width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(width) == 0, name
        if size == WIDE or name in COLORFUL:
            check_accessibility(page, name)
        take_picture(page, f"docs-{size['width']}-{name}")


def check_accessibility(page: Page, name: str) -> None:
    """Run the axe checker."""
    from axe_playwright_python.sync_playwright import Axe

    contrast = {"color-contrast": {"enabled": name in COLORFUL}}
    found = Axe().run(page, options={"resultTypes": ["violations"], "rules": contrast})
    assert found.violations_count == 0, (name, found.generate_report())


def test_checks_the_colors_of_every_language() -> None:
    """A language of code blocks in the documentation also occurs on a colorful page."""
    texts = [page.read_text() for page in pages()]
    shown = [read_page(name) for name in COLORFUL if name in PAGES]
    assert languages(shown) == languages(texts)


def languages(texts: list[str]) -> set[str]:
    """Return the languages of the code blocks in *texts*."""
    return {block.language for text in texts for block in blocks(text)}


def test_searches_without_a_network(page: Page, site: str) -> None:
    """The search finds a setting, and its result leads to the page."""
    page.goto(f"{site}/index.html")
    page.get_by_role("textbox", name="Search").first.fill("CLERK_JWKS_KEEP_HOURS")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="Settings").last.click()
    page.wait_for_url("**/reference/settings.html*")
    assert page.get_by_role("heading", level=1).inner_text().startswith("Settings")
