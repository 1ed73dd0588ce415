"""How durations, instants, numbers and values are written, for operators and in messages: one form for all."""

import math
from datetime import UTC, datetime
from typing import Final

_UNITS: Final = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def shown(value: object) -> str:
    """A value as Python writes it, 80 characters at most. For messages about values that are refused: never raises."""
    try:
        return f"{value!r:.80}"
    except Exception:  # noqa: BLE001  (of an int of more than 4,300 digits, or in a `__repr__` of the user's)
        return f"a value of type {type(value).__name__}"


def age(seconds: float) -> str:
    """A duration in its largest unit: `90 s` is `2 min`."""
    amount, unit = next(((size, name) for size, name in _UNITS if abs(seconds) >= size), (1, "s"))
    return f"{abs(seconds) / amount:.0f} {unit}"


def duration(seconds: float) -> str:
    """A short duration with two or three digits: `12 ms`, `1.2 s`, then as `age` writes it."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else age(seconds)


def rate(events: int, seconds: float) -> str:
    """Events per time, in the unit that has a whole number or more: `12 /s`, `3.4 /min`, `5 /h`, `2 /d`."""
    per_second = events / max(seconds, 1e-9)
    factor, unit = next(((f, u) for f, u in ((1, "s"), (60, "min"), (3600, "h")) if per_second * f >= 1), (86_400, "d"))
    per_unit = per_second * factor
    return f"{per_unit:.{0 if per_unit >= 10 else 1}f} /{unit}" if events else "0"


def percent(share: float) -> str:
    """A share in percent, rounded down, so that 100% means all: `99.9%`, `100%`."""
    return f"{math.floor(share * 1000) / 10:g}%"


def ago(at: datetime) -> str:
    """The distance between an instant and now: `5 min ago`, `now`, or `in 5 min`."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    if abs(seconds) < 0.5:
        return "now"
    return f"{age(seconds)} ago" if seconds >= 0 else f"in {age(seconds)}"


def instant(at: datetime) -> str:
    """An instant to the second, in UTC. The text does not name the zone."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def thousands(number: int) -> str:
    """A number with a thin space between thousands, which most programs drop when the number is copied."""
    return f"{number:,}".replace(",", "\u2009")


def number_of_events(number: int) -> str:
    """A number of events: `1 event`, `12 events`."""
    return number_of(number, "event", "events")


def number_of(number: int, singular: str, plural: str) -> str:
    """A number with its noun, or with its noun and verb: `1 event is`, `12 events are`."""
    return f"{number} {singular if number == 1 else plural}"
