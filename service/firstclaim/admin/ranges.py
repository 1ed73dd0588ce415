"""Ranges of time in an address: the last hour, day or week, or two instants of UTC.

Guarantees: an address with an instant that cannot be parsed, or with a range that is empty, is the default range, so
that a link that was cut off shows something. A range is at most `DAYS_MOST` long: rows are kept for about that long.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from firstclaim.operations.traffic import TimeRange

DAYS_MOST: Final = 400
# The named ranges: (label, words in a sentence, seconds). A name is also an age of the list.
NAMED: Final[Mapping[str, tuple[str, str, float]]] = {
    "1h": ("1 h", "in the last hour", 3600.0),
    "24h": ("24 h", "in the last 24 hours", 86_400.0),
    "7d": ("7 d", "in the last 7 days", 7 * 86_400.0),
}
DEFAULT: Final = "24h"
# Instants outside are moved to these. No event is, and a range can be widened by days without leaving the calendar.
_EARLIEST: Final = datetime(2001, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Range:
    """A named range, or one of two instants."""

    name: str | None
    own: TimeRange | None = None

    @classmethod
    def of(cls, name: str | None, since: str | None, until: str | None) -> "Range":
        """The range in an address."""
        if name in NAMED:
            return cls(name)
        began_at, ended_at = parse_instant(since), parse_instant(until)
        if began_at is None or (ended_at is not None and ended_at <= began_at):
            return cls(DEFAULT)
        ended_at = ended_at or _next_minute()  # not now: within a minute, the range stays the same
        return cls(None, TimeRange(max(began_at, ended_at - timedelta(days=DAYS_MOST)), ended_at))

    @property
    def seconds(self) -> float:
        """Its length."""
        return NAMED[self.name][2] if self.name is not None else self._own.seconds

    @property
    def seconds_until_now(self) -> float:
        """How long ago it begins."""
        return self.seconds if self.own is None else max(1.0, (datetime.now(UTC) - self.own.since).total_seconds())

    @property
    def words(self) -> str:
        """The range in a sentence: `in the last hour`."""
        if self.name is not None:
            return NAMED[self.name][1]
        return f"from {self._own.since:%Y-%m-%d %H:%M} to {self._own.until:%Y-%m-%d %H:%M}"

    @property
    def filters(self) -> Mapping[str, str]:
        """As filters of the list."""
        if self.name is not None:
            return {"age": self.name}
        return {"since": as_text(self._own.since), "until": as_text(self._own.until)}

    @property
    def parameters(self) -> Mapping[str, str]:
        """As parameters of the overview's address."""
        return {"range": self.name} if self.name is not None else self.filters

    @property
    def _own(self) -> TimeRange:
        if self.own is None:
            raise ValueError("a range has a name or two instants")
        return self.own


def _next_minute() -> datetime:
    return datetime.now(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)


def parse_instant(text: str | None) -> datetime | None:
    """The instant in an address or a field; without a zone it is UTC. None if there is none."""
    try:
        parsed = datetime.fromisoformat(text or "")
        instant = parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return min(max(instant, _EARLIEST), _LATEST)


def as_text(at: datetime) -> str:
    """An instant as the fields of a form have it: to the second, in UTC, without a zone."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}"
