"""The events that `firstclaim send` and `firstclaim load` send: from a shipped template, or from a file.

Guarantees: `build_event` never returns the same event twice. Each id in a template is replaced by a new one, by the
same new one wherever it recurs, and the instants move to now. So a second run is not a duplicate of the first.

Snapshot templates are whole objects as API version 2026-10-28 renders them, and a test compares their fields with
those that stripe-python declares. The people and the ids in them are made up.
"""

import difflib
import functools
import re
import secrets
import string
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

# `in_1Sca5RKdVq2Wn7RtLxQt0Jx7`, `cs_test_a1...`, `pi_..._secret_...`: lower-case words, then at least 14
# letters and digits of which one is a digit, so that no enum value (`subscription_cycle`) is taken for an id.
_ID = re.compile(r"(?<![A-Za-z0-9])((?:[a-z]+_)+)(?=[A-Za-z]*\d)([A-Za-z0-9]{14,})(?![A-Za-z0-9])")

# An integer this close to the template's own `created` is an instant, and moves with it.
_NEAR_SECONDS = 400 * 86_400

# Where Stripe has names of the account's own, or only some of the names; and fields that only some events have.
_FREE = {"metadata", "previous_attributes"}
_OPTIONAL = {"account", "context", "reason", "data.previous_attributes"}


def shipped_types() -> list[str]:
    """The event types that have a template."""
    return sorted(_templates())


def build_event(event_type: str, event_id: str | None = None) -> bytes:
    """A new event of a shipped type, pretty-printed as Stripe's are. Raises `ValueError` for any other type."""
    templates = _templates()
    if event_type not in templates:
        types = shipped_types()
        near = difflib.get_close_matches(event_type, types, n=1)
        raise ValueError(
            f"no template for {event_type!r}{f'; did you mean {near[0]}?' if near else '.'}\n"
            f"Templates: {', '.join(types)}.\nTo send any other event: --file event.json"
        )
    template = orjson.loads(templates[event_type])
    now = datetime.now(UTC)
    thin = isinstance(template["created"], str)
    seconds = int(now.timestamp())
    event = _renewed(template, seconds if thin else template["created"], seconds, {})
    if thin:
        event["created"] = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return _dump(event, event_id)


def marked_event(event_type: str, id_head: str, mark: bytes) -> bytes:
    """A new event of a shipped type. Its id is `id_head` and `mark`, and each of its other ids ends in `mark`.

    Replacing the mark by as many letters or digits gives another event about other objects, without building one.
    """
    stand_in = id_head + string.ascii_letters[: len(mark)]
    body = re.sub(_ID.pattern.encode(), lambda found: found[0][: -len(mark)] + mark, build_event(event_type, stand_in))
    return body.replace(stand_in.encode(), id_head.encode() + mark)  # if it is too short to look like an id


def read_event(path: Path, event_id: str | None = None) -> bytes:
    """The event in a file, byte for byte unless `event_id` replaces its id. Raises `ValueError`."""
    try:
        body = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--file {path}: {error.strerror}") from None
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"--file {path}: not JSON: {error}") from None
    if not isinstance(event, dict):
        raise ValueError(f"--file {path}: expected an event, which is a JSON object")
    return body if event_id is None else _dump(event, event_id)


def changed(body: bytes, changes: Sequence[str]) -> bytes:
    """The event with fields set: each change is `path=value`, such as `data.object.currency=usd`.

    A value that is JSON is that value (`true`, `5`, `null`, `{"a": 1}`), any other is a text. The path leads through
    objects, and by number through lists; its last name may be new where `check_field` says so. Raises `ValueError`.
    """
    event = orjson.loads(body)
    other_version = any(change.startswith("api_version=") for change in changes)
    for change in changes:
        path, equals, text = change.partition("=")
        if not (path and equals):
            raise ValueError(f"--set {change}: expected path=value, e.g. data.object.currency=usd")
        *parents, last = path.split(".")
        place = event
        for name in parents:
            place = place[_key(place, name, path)]
        if not isinstance(place, dict):
            last = _key(place, last, path)
        elif not other_version:
            check_field(place, last, parents, f"--set {path}")
        place[last] = _value(text)
    return orjson.dumps(event, option=orjson.OPT_INDENT_2) if changes else body


def check_field(place: dict[str, Any], name: str, parents: Sequence[str], where: str) -> None:
    """Raise `ValueError`, beginning with `where`, if `name` is a new field of `place`, and none that Stripe adds there.

    `parents` are the names that lead to `place`. An event of another API version has other fields: callers that set
    `api_version` do not check.
    """
    free = not place or any(parent in _FREE for parent in parents)
    if name in place or free or ".".join([*parents, name]) in _OPTIONAL:
        return
    raise ValueError(f"{where}: {_missing(place, name)} (for a field of another API version, set api_version too)")


def event_id_of(body: bytes) -> str:
    """The event's id, as far as it has one."""
    event = orjson.loads(body)
    return str(event.get("id", "")) if isinstance(event, dict) else ""


def _key(place: Any, name: str, path: str) -> Any:
    """The key of a field, or the index of an item, that is there."""
    if isinstance(place, dict) and name in place:
        return name
    if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
        return int(name)
    raise ValueError(f"--set {path}: {_missing(place, name)}")


def _missing(place: Any, name: str) -> str:
    there = sorted(place) if isinstance(place, dict) else []
    near = difflib.get_close_matches(name, there, n=1)
    return f"there is no {name!r}" + (f"; did you mean {near[0]}?" if near else "")


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


@functools.cache
def _templates() -> dict[str, bytes]:
    """The templates by event type."""
    files = (resources.files("firstclaim") / "sending" / "templates").iterdir()
    return {file.name.removesuffix(".json"): file.read_bytes() for file in files if file.name.endswith(".json")}


def _dump(event: dict[str, Any], event_id: str | None) -> bytes:
    if event_id is not None and not (event_id.isascii() and event_id.isprintable() and event_id):
        raise ValueError("--id: expected printable ASCII, e.g. evt_123")
    return orjson.dumps(event if event_id is None else event | {"id": event_id}, option=orjson.OPT_INDENT_2)


def _renewed(value: Any, created: int, now: int, ids: dict[str, str]) -> Any:
    """`value` with each id replaced (`ids` maps old to new) and each instant moved from `created` to `now`."""
    if isinstance(value, dict):
        return {name: _renewed(each, created, now, ids) for name, each in value.items()}
    if isinstance(value, list):
        return [_renewed(each, created, now, ids) for each in value]
    if isinstance(value, str):
        return _ID.sub(lambda found: ids.setdefault(found[0], found[1] + _random_like(found[2])), value)
    if isinstance(value, int) and abs(value - created) < _NEAR_SECONDS:
        return value - created + now
    return value


def _random_like(old: str) -> str:
    """A letter for a letter, a digit for a digit: without a digit the result would not match `_ID` again."""
    # Bytes in one call: a call of `secrets.choice` for each character was half of the time of an event.
    drawn = zip(old[2:], secrets.token_bytes(len(old) - 2), strict=True)
    return old[:2] + "".join(string.digits[n % 10] if c.isdigit() else string.ascii_letters[n % 52] for c, n in drawn)
