"""What is wrong, in sentences, worst first: the top of the overview.

Guarantees: a sentence says what is wrong, for how much of the traffic, and what to look at; and whose numbers it
rests on, where they are not those of the ledger. If nothing is found, nothing is claimed beyond what was read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from urllib.parse import urlencode

from firstclaim.formatting import age, duration, number_of, thousands
from firstclaim.observability.recent import Requests
from firstclaim.operations.queries import GAPS_OF_EVENTS, Backlog, Gaps
from firstclaim.operations.traffic import HandlerTraffic
from firstclaim.status import Status
from firstclaim.web.health import Health

_OVERDUE_SECONDS: Final = 60.0  # a process that runs takes up a due event within seconds
# As the alert FirstclaimNoDeliveries has it. (It knows the gaps of a week; the ledger is asked for the newest only.)
_SILENT_LEAST_SECONDS: Final = 900.0
_SILENT_FACTOR: Final = 5
_REFUSED_IN_A_ROW: Final = 3  # fewer refused requests can be somebody's attempt
_UNRECORDED_LEAST: Final = 3  # fewer are a restart
# Stripe's own deliveries are refused in these two ways; the other kinds are what anybody sends.
_OF_STRIPE: Final = ("signature_mismatch", "signature_stale")
# A refusal has ended if none has followed for so long, and so many requests were verified since. A 503 has if so many
# were accepted.
_ENDED_SECONDS: Final = 60.0
_AGAIN: Final = 3

# What each kind of refusal is called, and what to ask first.
_REFUSALS: Final[Mapping[str, tuple[str, str]]] = {
    "signature_mismatch": (
        "signature mismatch",
        "Was a secret rolled at Stripe, or an endpoint added? Its signing secret belongs in STRIPE_WEBHOOK_SECRETS.",
    ),
    "signature_stale": ("signature too old", "Is the clock of this machine right?"),
    "signature_missing": (
        "no signature",
        "Does a proxy remove the header Stripe-Signature? Or does somebody else call this address?",
    ),
    "signature_malformed": ("malformed signature", "Does a proxy change the header Stripe-Signature?"),
    "signature_repeated": ("repeated signature", "Does a proxy repeat the header Stripe-Signature?"),
    "content": ("signed, but no event", "Is this the address of an endpoint for Stripe's events?"),
    "body_not_utf8": ("signed, but not UTF-8", "Is this the address of an endpoint for Stripe's events?"),
    "body_too_large": ("body too large", "FIRSTCLAIM_BODY_MOST_BYTES is the limit."),
    "body_too_slow": ("body too slow", "Is the network to this machine, or the machine, overloaded?"),
}


class Level(IntEnum):
    """How bad it is. The name in lower case is the class in the stylesheet."""

    WARNING = 1  # somebody should look at it
    FAULT = 2  # events fail or wait
    OUTAGE = 3  # deliveries are refused, or cannot be recorded

    @property
    def css(self) -> str:
        """The class in the stylesheet."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `query` is that of the list of its events, if there is one."""

    level: Level
    text: str
    advice: str = ""
    query: str | None = None


@dataclass(frozen=True, slots=True)
class Component:
    """A component and its health."""

    name: str
    health: Health
    detail: str | None


@dataclass(frozen=True, slots=True)
class Known:
    """What the overview has read. None: it could not be read in time. `host` is the replica of `requests`."""

    components: Sequence[Component]
    requests: Requests | None
    host: str
    gaps: Gaps | None = None
    backlog: Backlog | None = None
    traffic: Sequence[HandlerTraffic] | None = ()
    when: str = ""  # the range of `traffic`, in words
    within: Mapping[str, str] | None = None  # the same, as parameters of the list
    dead: int = 0
    paused: Sequence[str] = ()  # the patterns of the types that are paused
    unread: Sequence[str] = ()  # what the ledger was asked for, and did not answer in time


def find(known: Known, *, ledger_read: bool) -> list[Finding]:
    """All findings, worst first; of one level, in the order of their rules."""
    found = [*_components(known.components)]
    if not ledger_read:
        text = "The ledger cannot be read: Postgres is unreachable, or all connections of this page are busy."
        found.append(Finding(Level.OUTAGE, text, "What follows does not need the ledger."))
    for rule in (
        _refused,
        _unrecorded,
        _silent,
        _failing,
        _overdue,
        _paused,
        _without_handler,
        _lost_claims,
        _dead,
        _unread,
    ):
        found += rule(known)
    return sorted(found, key=lambda each: -each.level)


def _components(components: Sequence[Component]) -> Iterator[Finding]:
    for each in components:
        if each.health is not Health.OK:
            level = Level.OUTAGE if each.health is Health.DOWN else Level.FAULT
            advice = {
                "postgres": "Deliveries are answered with 503, and Stripe sends them again.",
                "redis": "Events are recorded and answered with 202, and dispatch waits.",
                "recovery": "Other replicas take over its events; restart this one.",
            }.get(each.name, "")
            yield Finding(
                level, f"{each.name} is {each.health}" + (f": {each.detail}." if each.detail else "."), advice
            )


def _refused(known: Known) -> Iterator[Finding]:
    """Requests that were refused: all of the last ones, or, of those in the window, what may be Stripe's."""
    requests = known.requests
    if requests is None:
        return
    number = sum(requests.refused.values())
    if not requests.verified and number >= _REFUSED_IN_A_ROW:
        share = f"{thousands(number)} of the last {thousands(number)} requests were refused"
        yield Finding(Level.OUTAGE, *_refusals(share, requests, requests.refused, known.host))
        return
    refused = {kind: requests.refused[kind] for kind in _OF_STRIPE if requests.refused.get(kind)}
    if not refused:
        return
    for endpoint, number in requests.unverified.items():
        if number >= _REFUSED_IN_A_ROW:
            name = "without a name" if endpoint == "-" else endpoint
            text = f"The last {thousands(number)} requests to the endpoint {name} were refused for their signature"
            secret = "whsec_..." if endpoint == "-" else f"{endpoint}=whsec_..."
            advice = f"Was its secret rolled at Stripe? It belongs in STRIPE_WEBHOOK_SECRETS, as {secret}."
            yield Finding(Level.FAULT, f"{text} (replica {known.host}).", advice)
    number = sum(refused.values())
    share = (
        f"{thousands(number)} of the {_requests(requests.all)} of the last "
        f"{age(requests.seconds)} {'was' if number == 1 else 'were'} refused"
    )
    text, advice = _refusals(share, requests, refused, known.host)
    has_ended = all(
        last.seconds_ago >= _ENDED_SECONDS and last.verified_since >= _AGAIN
        for kind, last in requests.last.items()
        if kind in refused
    )
    if requests.last and has_ended:
        since = min((requests.last[kind] for kind in refused), key=lambda last: last.verified_since)
        if since.unrecorded_since:
            ended = (
                f" {_requests(since.verified_since, has=True)} been verified since, of which "
                f"{thousands(since.unrecorded_since)} could not be recorded."
            )
        else:
            ended = f" {_requests(since.accepted_since, has=True)} been accepted since."
        yield Finding(Level.WARNING, text + ended, "Stripe sends again what was refused.")
    else:
        yield Finding(Level.FAULT if number >= _REFUSED_IN_A_ROW else Level.WARNING, text, advice)


def _refusals(share: str, requests: Requests, refused: Mapping[str, int], host: str) -> tuple[str, str]:
    """The sentence about these refusals, and the advice on the most frequent kind."""
    kinds = sorted(refused, key=lambda kind: -refused[kind])
    names = {kind: _REFUSALS.get(kind, (kind.replace("_", " "), "")) for kind in kinds}
    counted = ", ".join(names[kind][0] + (f" ({thousands(refused[kind])})" if len(kinds) > 1 else "") for kind in kinds)
    ago = min((requests.last[kind].seconds_ago for kind in kinds if kind in requests.last), default=0.0)
    last = f", the last {age(ago)} ago" if ago >= _ENDED_SECONDS else ""
    return f"{share}: {counted}{last} (replica {host}).", names[kinds[0]][1]


def _unrecorded(known: Known) -> Iterator[Finding]:
    """Requests that were verified and answered 503."""
    requests = known.requests
    if requests is None or not requests.unrecorded:
        return
    text = (
        f"{thousands(requests.unrecorded)} of the {_requests(requests.all)} of the last "
        f"{age(requests.seconds)} could not be recorded (replica {known.host})."
    )
    advice = "They were answered with 503, and Stripe sends them again."
    last = requests.last_unrecorded
    if last is not None and last.seconds_ago >= _ENDED_SECONDS and last.accepted_since >= _AGAIN:
        accepted = f" {_requests(last.accepted_since, has=True)} been accepted since."
        yield Finding(Level.WARNING, text + accepted, advice)
        return
    level = Level.FAULT if requests.accepted else Level.OUTAGE
    level = Level.WARNING if requests.unrecorded < _UNRECORDED_LEAST else level
    yield Finding(level, text, f"{advice} Is Postgres reachable, and are its connections free?")


def _silent(known: Known) -> Iterator[Finding]:
    gaps = known.gaps
    if gaps is None or gaps.open_seconds is None or gaps.usual_seconds is None:
        return
    if gaps.open_seconds > max(_SILENT_LEAST_SECONDS, _SILENT_FACTOR * gaps.usual_seconds):
        yield Finding(
            Level.FAULT,
            f"No event has come for {age(gaps.open_seconds)}; of the gaps between the newest "
            f"{thousands(GAPS_OF_EVENTS)}, one in a hundred is longer than {_short(gaps.usual_seconds)}.",
            "Has the endpoint been disabled at Stripe, or its address or network changed?",
        )


def _failing(known: Known) -> Iterator[Finding]:
    """Handlers of which events failed; those that fail always before those that fail at times."""
    failing = [each for each in known.traffic or () if each.handler is not None and each.unsuccessful]
    for each in sorted(failing, key=lambda each: (each.completed > 0, -each.unsuccessful)):
        ended = each.completed + each.unsuccessful
        always = each.unsuccessful == ended
        events = f"{thousands(ended)} event{'' if ended == 1 else 's'}"
        share = f"All {events}" if ended > 1 else "The only event"
        share = share if always else f"{thousands(each.unsuccessful)} of {events}"
        cause = f": {each.last_error}" if each.last_error else ""
        text = f"{share} of {each.handler} {known.when} {'has' if ended == 1 else 'have'} failed{cause}"
        level = Level.FAULT if always else Level.WARNING
        yield Finding(level, text.rstrip(".") + ".", "", _list(each, known, (Status.FAILED, Status.DEAD)))


def _overdue(known: Known) -> Iterator[Finding]:
    """Events that nothing takes over. What is paused waits on purpose, and must not hide what does not."""
    backlog = known.backlog
    if backlog is None:
        return
    slowest = max(known.traffic or (), key=lambda each: each.oldest_due_seconds or 0, default=None)
    handler = slowest.handler if slowest is not None and slowest.oldest_due_seconds else None
    of = f", of {handler}," if handler else ""
    due = number_of(backlog.due, "event is", "events are")
    seconds, text = backlog.oldest_due_seconds, f"{due} due; the oldest{of} has waited for"
    advice = "Are the slots full of slow handlers, or a handler's own limits used up? Is Redis unreachable?"
    if known.paused and known.traffic is not None:  # its instants leave paused types out, unlike the backlog
        seconds = None if slowest is None else slowest.oldest_due_seconds
        text = f"{due} due, with those that are paused; the oldest that is not{of} has waited for"
    elif known.paused:
        advice = "Those of paused types are among them."
    if seconds is not None and seconds >= _OVERDUE_SECONDS:
        query = urlencode([("status", Status.PENDING), ("status", Status.FAILED)])
        yield Finding(Level.FAULT, f"{text} {age(seconds)}.", advice, query)


def _paused(known: Known) -> Iterator[Finding]:
    """A pause is meant, and it may be forgotten."""
    for pattern in known.paused:
        yield Finding(
            Level.WARNING,
            f"{'Everything' if pattern == '*' else pattern} is paused: its events are recorded, and wait.",
            f"To resume: firstclaim resume '{pattern}'. To see who paused it: firstclaim pauses.",
            urlencode([] if pattern == "*" else [("type", pattern)]) or "status=pending",
        )


def _without_handler(known: Known) -> Iterator[Finding]:
    for each in known.traffic or ():
        if each.handler is None and each.oldest_due_seconds is not None:
            yield Finding(
                Level.WARNING,
                f"This build has no handler for an event that has been due for {age(each.oldest_due_seconds)}.",
                "Does another running build have one? If not, deploy it, or the event becomes dead.",
                urlencode([("status", Status.PENDING), ("status", Status.FAILED)]),
            )


def _lost_claims(known: Known) -> Iterator[Finding]:
    if known.backlog is not None and known.backlog.past_their_lease:
        yield Finding(
            Level.WARNING,
            f"{number_of(known.backlog.past_their_lease, 'claim is', 'claims are')} past their lease.",
            "A process vanished or froze while it handled events, or a handler runs for long. They are taken over.",
            urlencode([("status", Status.PROCESSING)]),
        )


def _dead(known: Known) -> Iterator[Finding]:
    if known.dead:
        yield Finding(
            Level.WARNING,
            f"{number_of(known.dead, 'event is', 'events are')} dead: they are not retried.",
            "After a fix, replay them.",
            urlencode([("status", Status.DEAD)]),
        )


def _unread(known: Known) -> Iterator[Finding]:
    """Without it, a page that could not look would say that nothing is wrong."""
    if known.unread:
        yield Finding(
            Level.WARNING,
            f"The {' and the '.join(known.unread)} could not be read in time: what is wrong there is not said here.",
            "Choose a shorter range. /metrics and `firstclaim stats` do not need this page.",
        )


def _requests(number: int, *, has: bool = False) -> str:
    """So many requests, in words; with `has`, as the subject of what has happened to them."""
    words = ("request has", "requests have") if has else ("request", "requests")
    return f"{thousands(number)} {words[number != 1]}"


def _short(seconds: float) -> str:
    """A duration that may be below a second: a busy endpoint has gaps of milliseconds."""
    return age(seconds) if seconds >= 1 else duration(max(seconds, 0.001))


def _list(handler: HandlerTraffic, known: Known, statuses: Sequence[Status]) -> str:
    """The query of the list of a handler's events in these statuses."""
    pattern = {} if handler.handler in (None, "*") else {"type": handler.handler}
    return urlencode([*pattern.items(), *(known.within or {}).items(), *(("status", each) for each in statuses)])
