"""The event types that the installed stripe-python lists, and the patterns of handlers that none of them matches.

A pattern that matches nothing is a misspelling, or a type that is newer than the library: its handler may never run.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import get_args, get_type_hints

import stripe


def known_event_types() -> frozenset[str]:
    """The types of snapshot events, and of thin events, which begin with `v1.` or `v2.`."""
    return snapshot_event_types() | _thin_event_types()


def snapshot_event_types() -> frozenset[str]:
    """The types of snapshot events alone."""
    return frozenset(get_args(get_type_hints(stripe.Event)["type"]))


def _thin_event_types() -> frozenset[str]:
    """Stripe-python has no public list of them. Without this one, no pattern of a thin type is known to match none."""
    from stripe.events import _event_classes

    return frozenset(getattr(_event_classes, "_V2_EVENT_NOTIFICATION_CLASS_LOOKUP", ()))


def no_event_type(patterns: Iterable[str]) -> str | None:
    """Say which of the patterns match no known type; None: each matches one."""
    if unknown := unmatched(patterns):
        return f"no event type of stripe-python {stripe.VERSION} matches {', '.join(unknown)}"
    return None


def unmatched(patterns: Iterable[str]) -> list[str]:
    """The patterns that match no known type, each with the pattern that may have been meant."""
    types = known_event_types()
    families = {f"{prefix}.*" for each in types for prefix in _prefixes(each)}
    known = types | families | {"*"}
    if not any(each.startswith("v2.") for each in types):
        patterns = (each for each in patterns if not each.startswith(("v1.", "v2.")))
    return [_with_suggestion(each, known) for each in sorted(set(patterns) - known)]


def _prefixes(event_type: str) -> Iterator[str]:
    words = event_type.split(".")
    return (".".join(words[:length]) for length in range(1, len(words)))


def _with_suggestion(pattern: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, known, n=1)
    return f"{pattern} (did you mean {near[0]}?)" if near else pattern
