"""
Messages by hour and outcome as bars.

The template draws the shapes as SVG, which is stretched, and the words as HTML, which is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from clerkhooks.store.activity import STORED, Activity

WIDTH, HEIGHT = 10.0, 100.0  # of a bar's slot and of the chart, in the template's units
GAP = 2.0
MIN_HEIGHT = 1.5  # a single message among thousands stays visible


@dataclass(frozen=True)
class Piece:
    """One outcome within a bar. Pieces are stacked in the order of STORED, from the bottom up."""

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
    def label(self) -> str:
        """The hour in words."""
        counts = self.counts
        parts = [f"{counts[outcome]:,} {outcome}" for outcome in STORED if counts[outcome]]
        return f"{self.hour:%H:%M} UTC: {', '.join(parts) or 'no messages'}"


@dataclass(frozen=True)
class Chart:
    """Bars from left to right. *top* is the number of messages at the chart's upper edge."""

    bars: Sequence[Bar]
    top: int
    totals: dict[str, int]
    width: float
    height: float = HEIGHT
    bar_width: float = WIDTH - GAP


def draw(activity: Activity) -> Chart:
    """Return the chart of *activity*."""
    top = round_up(max(sum(counts.values()) for _, counts in activity.hours))
    bars = [
        Bar(hour, counts, number * WIDTH + GAP / 2, _stack(counts, HEIGHT / max(top, 1)))
        for number, (hour, counts) in enumerate(activity.hours)
    ]
    totals = {
        str(outcome): sum(counts[outcome] for _, counts in activity.hours) for outcome in STORED
    }
    return Chart(bars, top, totals, WIDTH * len(bars))


def round_up(number: int) -> int:
    """Round up to a number of one digit followed by zeros, or 0."""
    step = 1
    while step * 10 < number:
        step *= 10
    return -(-number // step) * step


def _stack(counts: dict[str, int], scale: float) -> list[Piece]:
    pieces, y = [], HEIGHT
    for outcome in STORED:
        if counts[outcome]:
            height = max(counts[outcome] * scale, MIN_HEIGHT)
            y = max(y - height, 0.0)
            pieces.append(Piece(outcome, round(y, 2), round(height, 2)))
    return pieces
