"""Events for tests of your handlers, from the shipped templates: `firstclaim.testing.make_event`.

Guarantees: the result is an event that the service would accept. Where there can be none, the error says why.
"""

from typing import Any

import orjson

from firstclaim.errors import Rejected
from firstclaim.event import Event, parse_event
from firstclaim.sending.events import build_event, check_field, shipped_types

# Of a type that has no template, the fields of the event around its object are those of this one.
_ENVELOPE = "invoice.paid"


def make_event(event_type: str, *, endpoint: str | None = None, **overrides: Any) -> Event:
    """A new event of `event_type`, as Stripe renders it. Each call makes new ids.

    `endpoint`: the name of the endpoint that received it (`Event.endpoint`), if it has one.

    `overrides` are fields of the event (`livemode=True`, `account="acct_1"`, `data={"previous_attributes": {...}}`).
    A dict is merged into the template's dict, any other value replaces the template's. `object` stands for
    `data.object`: `make_event("invoice.paid", object={"currency": "usd"})`. A type without a template needs all of
    its object this way. Raises `ValueError`, with the reason, if that gives no event that the service would accept, and
    for a field that the template does not have, unless `api_version` is overridden too.
    """
    if "object" in overrides:
        overrides = _merged(overrides, {"data": {"object": overrides["object"]}})
        del overrides["object"]
    if event_type in shipped_types():
        payload = orjson.loads(build_event(event_type))
    else:
        payload = _without_template(event_type, overrides)
    if "api_version" not in overrides:
        _check_fields(payload, overrides, (), f"make_event({event_type!r})")
    try:
        return parse_event(orjson.dumps(_merged(payload, overrides)), endpoint)
    except (Rejected, TypeError) as error:
        raise ValueError(f"make_event({event_type!r}): not an event that Stripe can send: {error}") from error


def _without_template(event_type: str, overrides: dict[str, Any]) -> dict[str, Any]:
    if "object" not in overrides.get("data", {}):
        raise ValueError(
            f"no template for {event_type!r}: pass its whole object, "
            f'make_event({event_type!r}, object={{"id": ..., "object": ...}}), '
            f"or use one of {', '.join(shipped_types())}"
        )
    payload: dict[str, Any] = orjson.loads(build_event(_ENVELOPE))
    return payload | {"type": event_type, "data": {"object": {}}}


def _check_fields(base: dict[str, Any], changes: dict[str, Any], parents: tuple[str, ...], where: str) -> None:
    for name, change in changes.items():
        check_field(base, name, parents, where)
        if isinstance(old := base.get(name), dict) and isinstance(change, dict):
            _check_fields(old, change, (*parents, name), where)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, change in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged
