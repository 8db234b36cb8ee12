"""
The doctor's findings for the overview.

Some checks ask Clerk. They run beside the request, and their findings are kept for a minute. The
database is asked anew each time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clerkhooks.doctor import OUTSIDE_CHECKS, Finding, Level, Program, diagnose

MAX_AGE = 60.0  # seconds that findings are kept
WAIT_TIMEOUT = 1.5  # seconds that a request waits for new findings
_SEVERITIES = (Level.ERROR, Level.WARNING, Level.OK, Level.SKIPPED)


@dataclass(frozen=True)
class Report:
    """Findings, the most severe first. *age* is in seconds, or None while checks are running."""

    findings: tuple[Finding, ...] = ()
    age: float | None = None

    def plus(self, findings: Iterable[Finding]) -> Report:
        """Return a report that also has *findings*, which are new."""
        combined = (*self.findings, *findings)
        ordered = sorted(combined, key=lambda finding: _SEVERITIES.index(finding.level))
        return Report(tuple(ordered), self.age)

    @property
    def errors(self) -> list[Finding]:
        """The findings that need action."""
        return self._of(Level.ERROR)

    @property
    def warnings(self) -> list[Finding]:
        """The findings that need a look."""
        return self._of(Level.WARNING)

    def _of(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level is level]


class Checkup:
    """Runs the doctor in a thread when a page needs its findings; never twice at the same time."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._findings: tuple[Finding, ...] = ()
        self._done_at: float | None = None

    def read(self, values: Mapping[str, Any], program: Program) -> Report:
        """
        Return the findings about *values* from the last minute, or run the checks.

        If they take longer than WAIT_TIMEOUT, the report is empty; they go on for the next request.
        """
        report, thread = self._look(values, program)
        if thread is not None:
            thread.join(WAIT_TIMEOUT)
            report, _ = self._look(values, program)
        return report

    def _look(
        self, values: Mapping[str, Any], program: Program
    ) -> tuple[Report, threading.Thread | None]:
        """Return the last report if it is recent, else an empty one and the thread that checks."""
        with self._guard:
            age = None if self._done_at is None else time.monotonic() - self._done_at
            if age is not None and age <= MAX_AGE:
                return Report(self._findings, age), None
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._run, args=(values, program), name="clerkhooks-checkup", daemon=True
                )
                self._thread.start()
            return Report(), self._thread

    def _run(self, values: Mapping[str, Any], program: Program) -> None:
        found = tuple(diagnose(values, checks=OUTSIDE_CHECKS, program=program))
        with self._guard:
            self._findings, self._done_at = found, time.monotonic()
