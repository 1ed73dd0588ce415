"""The first look at a verified body: the id and the type of its event, without parsing the rest.

Guarantees: a delivery whose id is found here is the delivery of the event that parsing finds, or parsing refuses it. It
is parsed in full only if its event is not recorded yet (`Delivery.event`), because most of the time of a duplicate was
spent on parsing what nobody would look at. A body without a usable id is parsed here, because parsing says what is
wrong with it.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from firstclaim.event import Delivery, EventHead, head_of, parse_event


class _Top(msgspec.Struct, gc=False):
    """The fields that are looked at. Only the id must have its type: the others may be anything."""

    id: str
    type: Any = None
    livemode: Any = None


_decoder = msgspec.json.Decoder(_Top)


def first_look(body: bytes, headers: Iterable[tuple[bytes, bytes]] = (), endpoint: str | None = None) -> Delivery:
    """The delivery of `body`, which is verified, with the headers of its request and the name of its endpoint.

    Raises `Rejected` (400), with the reason, if it has no usable id.
    """
    head = _look(body)
    return Delivery(parse_event(body, endpoint) if head is None else head, body, headers, endpoint)


def _look(body: bytes) -> EventHead | None:
    try:
        seen = _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        return None
    return head_of(seen.id, seen.type, livemode=seen.livemode is True, body=body)
