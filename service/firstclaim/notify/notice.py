"""One notice: what is sent of it, as JSON.

Guarantees: it holds names, counts, times, ids of events, and a frame (file, line, function): no payload, no message of
an error, no value. `text` is a sentence for people. Slack shows the field of this name, and reads `&`, `<` and `>` as
markup, so they are escaped.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from firstclaim.formatting import instant, number_of

_FIELDS = (
    "kind", "events", "handler", "error_class", "place", "group", "type", "reason", "endpoints", "example_id",
    "first_at", "last_at",
)  # fmt: skip


_INSTANTS = frozenset(("first_at", "last_at"))
_COUNTED = ("event_dead", "signatures_refused")  # how many events fail of a handler, the ledger knows


@dataclass(frozen=True, slots=True)
class Notice:
    """A composed notice. Each try sends the same, under the same id."""

    topic: str
    notice_id: str
    content: Mapping[str, Any]
    tries: int

    @property
    def kind(self) -> str:
        """What it reports."""
        return str(self.content["kind"])

    def body(self) -> bytes:
        """The JSON that is sent: fields may be added, none is renamed. What is not known is left out."""
        known = {name: self.content[name] for name in _FIELDS if self.content.get(name) is not None}
        if self.kind not in _COUNTED:
            known.pop("events", None)
        known |= {name: _at(known[name]).isoformat() for name in known.keys() & _INSTANTS}
        return json.dumps({"id": self.notice_id, "text": self._text(), **known}).encode()

    def _text(self) -> str:
        times = {name: f"{instant(_at(self.content[name]))} UTC" for name in _INSTANTS if self.content.get(name)}
        sentence = f"firstclaim: {_SENTENCES[self.kind]({**self.content, **times})}"
        return sentence.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _at(text: str) -> datetime:
    """An instant as Postgres writes it in JSON, to the second."""
    return datetime.fromisoformat(text).replace(microsecond=0)


def _cause(content: Mapping[str, Any]) -> str:
    place = content.get("place")
    return f"{content['error_class']}" + (f" at {place}" if place else "")


def _event_dead(content: Mapping[str, Any]) -> str:
    dead = number_of(content["events"], "event is dead", "events are dead")
    example = f"e.g. {content['example_id']}"
    if content.get("group") is None:
        return f"{dead}, of {content['type']}, of no known failure, {example}. See `firstclaim events show`."
    return (
        f"{dead} in the handler {content['handler']}: {_cause(content)}, {example}. "
        f"After a fix: `firstclaim events replay --group {content['group']}`."
    )


def _handler_failing(content: Mapping[str, Any]) -> str:
    return (
        f"the handler {content['handler']} has been failing since {content['first_at']}: {_cause(content)}, "
        f"e.g. {content['example_id']}. The events are tried again. `firstclaim events groups` says how many."
    )


def _handler_recovered(content: Mapping[str, Any]) -> str:
    return (
        f"the handler {content['handler']}, which has been failing since {content['first_at']}, has recovered: "
        "none of its events waits for a retry."
    )


def _signatures_refused(content: Mapping[str, Any]) -> str:
    refused = number_of(content["events"], "request was refused", "requests were refused")
    named = [each for each in content.get("endpoints", ()) if each != "-"]
    where = f" at the {'endpoints' if len(named) > 1 else 'endpoint'} {', '.join(named)}" if named else ""
    return (
        f"{refused}{where}: {content['reason']}, last at {content['last_at']}. Was a signing secret rolled at Stripe, "
        "and is it in STRIPE_WEBHOOK_SECRETS? Anybody can send such requests: compare with Stripe's list of deliveries."
    )


_SENTENCES = {
    "event_dead": _event_dead,
    "handler_failing": _handler_failing,
    "handler_recovered": _handler_recovered,
    "signatures_refused": _signatures_refused,
}
