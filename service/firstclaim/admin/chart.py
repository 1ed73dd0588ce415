"""A chart of the last hours as shapes: what arrived in each, and what has become of it.

Guarantees: nothing but numbers, so that the template can draw it without a script and without a style; what there is
little of is still seen: the one dead event beside ten thousand that went well has its place.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from firstclaim.operations.search import HourlyCounts
from firstclaim.status import Status

WIDTH: Final = 960.0
HEIGHT: Final = 160.0
_GAP = 6.0
_LEAST = 3.0  # of a piece's height, where there is any event at all
# From the ground up: what needs somebody, what is on its way, what is done.
ORDER: Final = (
    Status.DEAD,
    Status.FAILED,
    Status.PROCESSING,
    Status.PENDING,
    Status.IGNORED,
    Status.COMPLETED,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an hour's bar."""

    status: Status
    events: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """An hour."""

    began_at: datetime
    ended_at: datetime
    x: float
    width: float
    pieces: list[Piece]
    events: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars on a ground of WIDTH by HEIGHT, the top of which is `top` events."""

    bars: list[Bar]
    top: int
    events: int
    shown: list[Status]  # those that there are any of, in the order of the pieces
    width: float = WIDTH
    height: float = HEIGHT


def draw(arrivals: HourlyCounts) -> Chart:
    """The chart of these hours."""
    top = _round_up(max((sum(counts.values()) for _, counts in arrivals.hours), default=0))
    step = WIDTH / max(1, len(arrivals.hours))
    bars = []
    for number, (began_at, counts) in enumerate(arrivals.hours):
        pieces = _pile(counts, top)
        bars.append(
            Bar(
                began_at,
                began_at + timedelta(hours=1),
                round(number * step + _GAP / 2, 2),
                round(step - _GAP, 2),
                pieces,
                sum(counts.values()),
            )
        )
    shown = [each for each in ORDER if any(counts.get(each) for _, counts in arrivals.hours)]
    return Chart(bars, top, sum(bar.events for bar in bars), shown)


def _pile(counts: dict[Status, int], top: int) -> list[Piece]:
    heights = {each: max(_LEAST, counts[each] / top * HEIGHT) for each in ORDER if counts.get(each)}
    if (high := sum(heights.values())) > HEIGHT:  # the smallest were made larger: the largest gives it back
        largest = max(heights, key=lambda each: heights[each])
        heights[largest] -= high - HEIGHT
    pieces, ground = [], HEIGHT
    for status, height in heights.items():
        ground -= height
        pieces.append(Piece(status, counts[status], round(ground, 2), round(height, 2)))
    return pieces


def _round_up(events: int) -> int:
    """The next number that reads well: 1, 2 or 5 and noughts; 1 for none."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= events:
                return step * power
        power *= 10
