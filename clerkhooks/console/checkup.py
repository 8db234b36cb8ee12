"""The doctor's findings for the overview. Some checks ask Clerk, so they are made beside the request, and kept for a minute."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from clerkhooks.diagnosis import Finding, Level, diagnose

KEPT = 60.0  # seconds
PATIENCE = 1.5  # seconds that a first look waits for the findings
_RANKS = (Level.WRONG, Level.WARNING, Level.OK, Level.SKIPPED)


@dataclass(frozen=True)
class Report:
    """What was found, the worst first, and how long ago in seconds; nothing and None while nothing is."""

    findings: tuple[Finding, ...] = ()
    age: float | None = None

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
        """What was found last. What is older than a minute is looked into again; only a first look waits for that, and not for long."""
        with self._guard:
            done_at = self._done_at
            is_due = done_at is None or time.monotonic() - done_at > KEPT
            if is_due and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._examine, name="checkup", daemon=True)
                self._thread.start()
            thread = self._thread
        if done_at is None and thread is not None:
            thread.join(PATIENCE)
        with self._guard:
            age = None if self._done_at is None else time.monotonic() - self._done_at
            return Report(self._findings, age)

    def _examine(self) -> None:
        found = tuple(sorted(diagnose(os.environ), key=lambda finding: _RANKS.index(finding.level)))
        with self._guard:
            self._findings, self._done_at = found, time.monotonic()
