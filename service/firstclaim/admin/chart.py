"""The shapes of a chart: the events received in each bar's time, by their current status.

Guarantees: the chart has numbers only, so that the template can draw it without a script and without a style. Heights
are true: a segment is as high as its share of the scale, and the segments of a bar add up to the bar. What would be too
small to see is not enlarged; a failed or dead event is marked below its bar instead, however many others there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from firstclaim.operations.traffic import Counts
from firstclaim.status import Status

WIDTH: Final = 960.0
HEIGHT: Final = 160.0
MARK_HEIGHT: Final = 7.0  # of the mark below a bar
_GAP_SHARE: Final = 0.2  # of a bar's width
_LABELS_MOST: Final = 8
_LABEL_SECONDS: Final = (600, 3600, 4 * 3600, 86_400, 7 * 86_400, 28 * 86_400)  # between two labels
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
    """The events of one step. `mark` is the worst status that needs an operator, if any event has it."""

    began_at: datetime
    ended_at: datetime
    x: float
    width: float
    segments: list[Segment]
    events: int
    mark: Status | None
    label: str

    @property
    def count(self) -> Mapping[Status, int]:
        """The number of events in each status that has any."""
        return {each.status: each.events for each in self.segments}


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars in an area of WIDTH by HEIGHT. The upper edge stands for `top` events."""

    bars: list[Bar]
    top: int
    events: int
    shown: list[Status]  # statuses that have any event, in the order of the segments
    slot: float  # the width of a bar with its gap
    step_seconds: float
    width: float = WIDTH
    height: float = HEIGHT
    mark_height: float = MARK_HEIGHT


def draw(counts: Counts) -> Chart:
    """The chart of the counts."""
    top = _round_up(max((sum(each.values()) for _, each in counts.bars), default=0))
    slot = WIDTH / max(1, len(counts.bars))
    length = counts.step.total_seconds() * len(counts.bars)
    every = next((each for each in _LABEL_SECONDS if length / each <= _LABELS_MOST), _LABEL_SECONDS[-1])
    bars = []
    for number, (began_at, each) in enumerate(counts.bars):
        bars.append(
            Bar(
                began_at,
                began_at + counts.step,
                round(number * slot + slot * _GAP_SHARE / 2, 2),
                round(slot * (1 - _GAP_SHARE), 2),
                _stack(each, top),
                sum(each.values()),
                next((status for status in (Status.DEAD, Status.FAILED) if each.get(status)), None),
                _label(began_at, counts.step.total_seconds(), every),
            )
        )
    shown = [status for status in ORDER if any(each.get(status) for _, each in counts.bars)]
    return Chart(bars, top, sum(bar.events for bar in bars), shown, slot, counts.step.total_seconds())


def _label(began_at: datetime, step_seconds: float, every_seconds: int) -> str:
    """What stands below the bar: its time or its day, if it is one of the round ones."""
    if began_at.timestamp() % every_seconds >= step_seconds:
        return ""
    return began_at.strftime("%H:%M" if every_seconds < 86_400 else "%m-%d")


def _stack(counts: Mapping[Status, int], top: int) -> list[Segment]:
    segments, below = [], 0
    for status in ORDER:
        if events := counts.get(status):
            low, high = below / top * HEIGHT, (below + events) / top * HEIGHT
            segments.append(Segment(status, events, round(HEIGHT - high, 3), round(high - low, 3)))
            below += events
    return segments


def _round_up(events: int) -> int:
    """The next round number, for the scale: 1, 2 or 5 with zeros; 1 for no events."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= events:
                return step * power
        power *= 10
