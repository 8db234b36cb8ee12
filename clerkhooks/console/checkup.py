"""
The doctor's findings for the overview.

Some checks ask Clerk, so they are made beside the request, and kept for a minute. What is in the database is asked anew each time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from clerkhooks.diagnosis import OUTSIDE_CHECKS, Finding, Level, diagnose

KEPT = 60.0  # seconds
PATIENCE = 1.5  # seconds that a look waits for findings where the last ones are older
_RANKS = (Level.WRONG, Level.WARNING, Level.OK, Level.SKIPPED)


@dataclass(frozen=True)
class Report:
    """What was found, the worst first, and how long ago in seconds; None while not all was looked into."""

    findings: tuple[Finding, ...] = ()
    age: float | None = None

    def plus(self, findings: Iterable[Finding]) -> Report:
        """These and *findings*, which were made now."""
        everything = sorted((*self.findings, *findings), key=lambda finding: _RANKS.index(finding.level))
        return Report(tuple(everything), self.age)

    @property
    def wrong(self) -> list[Finding]:
        """What must be mended."""
        return self._of(Level.WRONG)

    @property
    def warnings(self) -> list[Finding]:
        """What should be looked at."""
        return self._of(Level.WARNING)

    def _of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level is level]


class Checkup:
    """Examines in a thread of its own, one at a time, when somebody looks."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._findings: tuple[Finding, ...] = ()
        self._done_at: float | None = None

    def read(self) -> Report:
        """What was found within the last minute; else it is looked into, which is not waited for long."""
        report, thread = self._look()
        if thread is not None:
            thread.join(PATIENCE)
            report, _ = self._look()
        return report

    def _look(self) -> tuple[Report, threading.Thread | None]:
        """The last report, if it is new enough, or else who makes the next."""
        with self._guard:
            age = None if self._done_at is None else time.monotonic() - self._done_at
            if age is not None and age <= KEPT:
                return Report(self._findings, age), None
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._examine, name="checkup", daemon=True)
                self._thread.start()
            return Report(), self._thread

    def _examine(self) -> None:
        found = tuple(diagnose(os.environ, checks=OUTSIDE_CHECKS))
        with self._guard:
            self._findings, self._done_at = found, time.monotonic()
