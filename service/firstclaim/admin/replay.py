"""Replay: a confirmation page, and then the replay of exactly the events that were confirmed.

Guarantees: only the confirmed events are replayed. The confirmation page says by which filter they were chosen. It
carries, signed, every event with its status and its attempt, and an event that has changed since is not replayed,
however often and from however many tabs the form is sent. Failed and dead events are offered, and ignored ones that
this build has a handler for: after a deploy that adds one. Without a handler, a replayed event would wait until it is
dead. Events that are completed or being handled are never replayed here.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import structlog
from starlette.responses import Response

from firstclaim.admin.events import FILTERS, REPLAYED_MOST, Filters, is_replayable
from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.request import AdminRequest, PageError, own_address
from firstclaim.errors import LedgerUnavailable
from firstclaim.formatting import number_of_events
from firstclaim.inbox.routes import Routes
from firstclaim.operations.commands import ReplayCandidate
from firstclaim.operations.limits import is_storable
from firstclaim.operations.pauses import paused_among
from firstclaim.operations.search import UNSUCCESSFUL
from firstclaim.operations.selection import Selection
from firstclaim.status import Status

log = structlog.get_logger(__name__)

_CONFIRMATION: Final = "replay"
_CONFIRMATION_SECONDS: Final = 15 * 60
# What "all that match" can mean: ignored events are never among those of a button that does not say so.
_ALL: Final[Mapping[str, tuple[Status, ...]]] = {"yes": UNSUCCESSFUL, "ignored": (Status.IGNORED,)}


class Replay:
    """The confirmation and the replay. `give_up_seconds` is for how long a replayed event is retried."""

    def __init__(self, ledger: AdminLedger, routes: Routes, give_up_seconds: float) -> None:
        self._ledger = ledger
        self._routes = routes
        self._give_up_seconds = give_up_seconds

    async def confirm(self, request: AdminRequest) -> Response:
        """The confirmation page for the selected events, or, with `all`, for all that match the list's filters."""
        among = _ALL.get(request.form_value("all"))
        filters = Filters.of({name: _form_values(request.form, name) for name in FILTERS})
        if among is not None and filters.unread:
            unread = ", ".join(filters.unread)
            text = f"There is no valid value for {unread}: more events would be replayed than you chose."
            raise PageError(400, "The filters are not valid", text)
        async with self._ledger.connect() as ledger:
            if among is not None:
                found = await ledger.replayable(filters.search, REPLAYED_MOST + 1, among)
                event_ids, more = found[:REPLAYED_MOST], len(found) > REPLAYED_MOST
            else:
                event_ids, more = _form_values(request.form, "event")[:REPLAYED_MOST], False
            chosen = await ledger.select_candidates(Selection(event_ids)) if event_ids else []
            offered = [each for each in chosen if is_replayable(each.status, each.type, each.livemode, self._routes)]
            candidates = [each for each in offered if each.has_payload]
            paused = await paused_among(ledger, Counter(each.type for each in candidates))
        unhandled = sum(each.status is Status.IGNORED for each in chosen if each not in offered)
        if not event_ids:
            raise PageError(400, "No event is selected", "Go back, and select the events to replay.")
        return request.render(
            "replay.html",
            confirmation=self._sign(request, candidates, filters.words if among is not None else ""),
            candidates=candidates,
            counts=Counter(each.status for each in candidates),
            pruned=len(offered) - len(candidates),
            unhandled=unhandled,
            paused=paused,
            others=len(event_ids) - len(offered) - unhandled,
            is_all=among is not None,
            among=among or (),
            filter=filters.words,
            more=more,
            back=_return_address(request, filters),
        )

    async def replay(self, request: AdminRequest) -> Response:
        """Replay the confirmed events. Leads to their progress, or back to the one event."""
        signed = request.form_value("confirmation")
        confirmed = request.signer.verify_value(request.required_session, _CONFIRMATION, signed, _CONFIRMATION_SECONDS)
        if confirmed is None:
            text = "Go back to the list, and start the replay again."
            raise PageError(400, "This confirmation is no longer valid", text)
        events, words = confirmed
        chosen = [ReplayCandidate(event_id, Status(status), attempt, True) for event_id, status, attempt in events]
        if request.form_value("count").strip() not in ("", str(len(chosen))) or (
            request.form_value("count_required") == "yes" and not request.form_value("count").strip()
        ):
            text = f"The replay has {number_of_events(len(chosen))}, and you typed another number. Nothing was changed."
            raise PageError(400, "The number is wrong", text)
        done, action_id = await self._replay(request, chosen, words)
        kept = len(chosen) - done
        log.info(
            "admin_replay",
            address=request.address,
            user=request.required_session.user,
            selected=len(chosen),
            replayed=done,
        )
        request.notice(_result(done, kept), success=not kept)
        back = own_address(request.form_value("back"), f"{request.home}/events")
        return request.redirect(back if len(chosen) == 1 else f"{request.home}/audit/{action_id}")

    async def _replay(self, request: AdminRequest, chosen: list[ReplayCandidate], words: str) -> tuple[int, int]:
        """The number of events that became due, and the id of the audit's row."""
        done, action_ids = 0, list[int]()
        try:
            async with self._ledger.connect() as ledger:
                async for batch in ledger.replay(
                    chosen,
                    words,
                    request.operator,
                    give_up_seconds=self._give_up_seconds,
                    began=action_ids.append,
                ):
                    done += len(batch)
        except LedgerUnavailable as error:
            log.warning("admin_replay_interrupted", address=request.address, replayed=done, error=str(error))
            text = (
                f"The ledger became unavailable after {number_of_events(done)} had become due. "
                "Start the replay again: no event is replayed twice."
            )
            raise PageError(503, "The replay was interrupted", text) from None
        return done, action_ids[0]

    @staticmethod
    def _sign(request: AdminRequest, candidates: list[ReplayCandidate], words: str) -> str:
        content: list[Any] = [[[each.event_id, each.status.value, each.attempt] for each in candidates], words]
        return request.signer.sign_value(request.required_session, _CONFIRMATION, content)


def _result(done: int, kept: int) -> str:
    """The notice after a replay."""
    replayed = f"{number_of_events(done)} {'is' if done == 1 else 'are'} due now." if done else "No event was replayed."
    if not kept:
        return replayed
    skipped = f"{number_of_events(kept)} {'was' if kept == 1 else 'were'} skipped, because of a change or a lock."
    return f"{replayed} {skipped}"


def _form_values(form: Mapping[str, list[str]], name: str) -> list[str]:
    """The distinct values of a field that the ledger can have."""
    values = (value.strip() for value in form.get(name, []))
    return list(dict.fromkeys(filter(is_storable, values)))


def _return_address(request: AdminRequest, filters: Filters) -> str:
    event_id = next(iter(_form_values(request.form, "from_event")), None)
    return filters.address(request.home) if event_id is None else f"{request.home}/events/{event_id}"
