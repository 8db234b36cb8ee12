"""Measure the memory and the CPU time of running processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Memory:
    """The memory of a process in MB. PSS counts 1/n of each page that n processes share."""

    rss: float
    pss: float
    private: float


def read_memory(processes: Sequence[psutil.Process]) -> Memory:
    """Return the mean memory of *processes*."""
    found = [_read_rollup(process.pid) for process in processes]
    return Memory(
        mean(each["Rss"] for each in found),
        mean(each["Pss"] for each in found),
        mean(each["Private_Clean"] + each["Private_Dirty"] for each in found),
    )


def _read_rollup(pid: int) -> Mapping[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(size.split()[0]) / 1024 for name, size in (at.split(":") for at in lines)}


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def workers(pid: int) -> list[psutil.Process]:
    """Return the worker processes of gunicorn's master process *pid*."""
    found: list[psutil.Process] = psutil.Process(pid).children()
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its descendants, including those that have ended."""
    total = 0.0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
