"""The shapes of a chart: the events received in each of the last hours, by their current status.

Guarantees: the chart has numbers only, so that the template can draw it without a script and without a style. A small
number stays visible: one dead event beside ten thousand completed ones has a segment.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from firstclaim.operations.search import HourlyCounts
from firstclaim.status import Status

WIDTH: Final = 960.0
HEIGHT: Final = 160.0
_GAP = 6.0
_SEGMENT_LEAST = 3.0  # the height of a segment that has any event
# From the bottom up: what needs an operator, what is unfinished, what is done.
ORDER: Final = (
    Status.DEAD,
    Status.FAILED,
    Status.PROCESSING,
    Status.PENDING,
    Status.IGNORED,
    Status.COMPLETED,
)


@dataclass(frozen=True, slots=True)
class Segment:
    """The events of one status in one bar."""

    status: Status
    events: int
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """The events of one hour."""

    began_at: datetime
    ended_at: datetime
    x: float
    width: float
    segments: list[Segment]
    events: int


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars in an area of WIDTH by HEIGHT. The upper edge stands for `top` events."""

    bars: list[Bar]
    top: int
    events: int
    shown: list[Status]  # statuses that have any event, in the order of the segments
    width: float = WIDTH
    height: float = HEIGHT


def draw(counts_by_hour: HourlyCounts) -> Chart:
    """The chart of the hours."""
    top = _round_up(max((sum(counts.values()) for _, counts in counts_by_hour.hours), default=0))
    step = WIDTH / max(1, len(counts_by_hour.hours))
    bars = []
    for number, (began_at, counts) in enumerate(counts_by_hour.hours):
        segments = _stack(counts, top)
        bars.append(
            Bar(
                began_at,
                began_at + timedelta(hours=1),
                round(number * step + _GAP / 2, 2),
                round(step - _GAP, 2),
                segments,
                sum(counts.values()),
            )
        )
    shown = [each for each in ORDER if any(counts.get(each) for _, counts in counts_by_hour.hours)]
    return Chart(bars, top, sum(bar.events for bar in bars), shown)


def _stack(counts: dict[Status, int], top: int) -> list[Segment]:
    heights = {each: max(_SEGMENT_LEAST, counts[each] / top * HEIGHT) for each in ORDER if counts.get(each)}
    if (high := sum(heights.values())) > HEIGHT:  # the smallest segments were enlarged: the largest is reduced
        largest = max(heights, key=lambda each: heights[each])
        heights[largest] -= high - HEIGHT
    segments, bottom = [], HEIGHT
    for status, height in heights.items():
        bottom -= height
        segments.append(Segment(status, counts[status], round(bottom, 2), round(height, 2)))
    return segments


def _round_up(events: int) -> int:
    """The next round number, for the scale: 1, 2 or 5 with zeros; 1 for no events."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= events:
                return step * power
        power *= 10
