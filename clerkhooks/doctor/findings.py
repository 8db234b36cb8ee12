"""The input and the results of the doctor's checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from clerkhooks.errors import Fault
from clerkhooks.settings import ServiceSettings, Settings, as_text

T = TypeVar("T")
TIMEOUT = 5.0  # the timeout of one request to another machine, in seconds


class Level(StrEnum):
    """The severity levels of findings, in descending order. Only errors make a diagnosis fail."""

    ERROR = "error"
    WARNING = "warning"
    OK = "ok"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """
    The result of a check. It contains no secrets.

    *code* identifies the kind of finding and is stable. *what* describes the situation. *remedy*
    describes the solution. Warnings and errors have a remedy.
    """

    code: str
    level: Level
    subject: str
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Program:
    """A kind of program to check, with its class of settings and its commands."""

    settings: type[Settings]
    command: str
    upgrade: str
    """The command that migrates the database."""


SERVICE: Final = Program(ServiceSettings, "clerkhooks", "flask --app wsgi db upgrade")
APPLICATION: Final = Program(Settings, "flask clerk", "flask db migrate && flask db upgrade")
"""An application with the extension. It has its own database, logs and server."""


@dataclass(frozen=True)
class Case:
    """
    The configuration that the checks examine.

    *settings* omits the variables in *faults*, so that one invalid variable does not hide other
    mistakes.
    """

    values: Mapping[str, Any]
    settings: Settings
    faults: tuple[Fault, ...]
    project: Path
    program: Program = SERVICE
    key_sets: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False)
    """The key sets or errors from earlier fetches, by request."""

    @cached_property
    def invalid(self) -> frozenset[str]:
        """The names of invalid variables."""
        return frozenset(fault.variable for fault in self.faults)

    def text(self, variable: str) -> str:
        """Return the value of *variable* as text, or an empty string if it is unset."""
        return as_text(self.values.get(variable))


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 key`` or ``2 keys``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def run_with_timeout(seconds: float, work: Callable[[], T]) -> T:
    """
    Run *work* in a separate thread and return its result.

    After a timeout, the thread is abandoned, because a hanging DNS lookup cannot be interrupted.

    Raises:
        TimeoutError: *work* takes longer than *seconds*.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised again in the caller
            future.set_exception(error)

    threading.Thread(target=run, name="clerkhooks-doctor", daemon=True).start()
    return future.result(seconds)
