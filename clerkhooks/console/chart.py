"""Messages by hour and outcome as bars. The template draws them: shapes in SVG, which are stretched, and words in HTML, which are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from clerkhooks.activity import STORED, Activity

WIDTH, HEIGHT = 10.0, 100.0  # of a bar's place, and of the chart; the template's units
GAP = 2.0
LEAST = 1.5  # height of what is there, however little


@dataclass(frozen=True)
class Piece:
    """One outcome within a bar; they are stacked in the order of STORED, from the ground up."""

    outcome: str
    y: float
    height: float


@dataclass(frozen=True)
class Bar:
    """One hour."""

    hour: datetime
    counts: dict[str, int]
    x: float
    pieces: Sequence[Piece]

    @property
    def says(self) -> str:
        """The hour in words."""
        told = ", ".join(f"{self.counts[outcome]:,} {outcome}" for outcome in STORED if self.counts[outcome])
        return f"{self.hour:%H:%M} UTC: {told or 'nothing'}"


@dataclass(frozen=True)
class Chart:
    """Bars from left to right, and what the top of the chart stands for."""

    bars: Sequence[Bar]
    top: int
    totals: dict[str, int]
    width: float
    height: float = HEIGHT
    bar_width: float = WIDTH - GAP


def draw(activity: Activity) -> Chart:
    """The chart of *activity*."""
    top = round_up(max(sum(counts.values()) for _, counts in activity.hours))
    bars = [
        Bar(hour, counts, number * WIDTH + GAP / 2, _stack(counts, HEIGHT / max(top, 1)))
        for number, (hour, counts) in enumerate(activity.hours)
    ]
    totals = {str(outcome): sum(counts[outcome] for _, counts in activity.hours) for outcome in STORED}
    return Chart(bars, top, totals, WIDTH * len(bars))


def round_up(number: int) -> int:
    """The next number of one digit with zeros behind it, or 0."""
    step = 1
    while step * 10 < number:
        step *= 10
    return -(-number // step) * step


def _stack(counts: dict[str, int], scale: float) -> list[Piece]:
    pieces, y = [], HEIGHT
    for outcome in STORED:
        if counts[outcome]:
            height = max(counts[outcome] * scale, LEAST)
            y = max(y - height, 0.0)
            pieces.append(Piece(outcome, round(y, 2), round(height, 2)))
    return pieces
