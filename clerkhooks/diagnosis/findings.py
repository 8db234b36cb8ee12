"""What a check finds, and what it looks at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from clerkhooks.errors import Fault
from clerkhooks.settings import Settings

T = TypeVar("T")
SECONDS = 5.0  # for one question to somebody else


class Level(StrEnum):
    """How much a finding matters; only what is wrong makes the whole diagnosis bad."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: a stable *code*, what it is about, what is the case, and what to do about it. No secret is in it."""

    code: str
    level: Level
    subject: str
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Case:
    """What is examined: *settings* without the *faults*, so that one wrong variable hides nothing else."""

    environ: Mapping[str, str]
    settings: Settings
    faults: tuple[Fault, ...]
    project: Path

    @cached_property
    def wrong(self) -> frozenset[str]:
        """The variables that cannot work."""
        return frozenset(fault.variable for fault in self.faults)

    @cached_property
    def offset(self) -> float | None:
        """Seconds that this machine's clock is ahead of Clerk's; None where Clerk's is not to be had."""
        try:
            return within(SECONDS, lambda: measure_clock(self.settings.api_url))
        except Exception:  # noqa: BLE001  # offline, in whichever of the many ways
            return None

    def text(self, variable: str) -> str:
        """The value of a variable; one that is empty counts as unset."""
        return self.environ.get(variable, "").strip()


def measure_clock(url: str) -> float:
    """Seconds that this machine's clock is ahead of the one at *url*."""
    before = time.time()
    with httpx.stream("GET", url, timeout=SECONDS / 2, follow_redirects=False, verify=urlsplit(url).scheme != "http") as response:
        after = time.time()
        said = parsedate_to_datetime(response.headers["Date"])
    # The header leaves out the part of the second.
    return (before + after) / 2 - (said.replace(tzinfo=said.tzinfo or UTC).timestamp() + 0.5)


def within(seconds: float, work: Callable[[], T]) -> T:
    """
    What *work* gives. It goes on in a thread of its own when it is given up, as where the resolver hangs.

    Raises:
        TimeoutError: if it takes longer.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # it is raised again where somebody waits
            future.set_exception(error)

    threading.Thread(target=run, name="diagnosis", daemon=True).start()
    return future.result(seconds)
