"""Making events due again: asked first, then done to exactly those.

Guarantees: what was asked about is what is done: the question carries, signed, every event with the status and the
attempt that it had, and one that has changed since is not touched, however often and from however many tabs the answer
comes. Only what is failed or dead is offered. What is ignored can be replayed as well, and is not offered here: its
handler has to be deployed first, and "all that match" would mean every event of every type that nobody wants; that is
`firstclaim events replay --status ignored`. What is completed or being handled never is.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import structlog
from starlette.responses import Response

from firstclaim.admin.events import REPLAYED_MOST, Filters
from firstclaim.admin.ledger import AdminLedger
from firstclaim.admin.request import PATH, AdminRequest, Refused
from firstclaim.errors import LedgerUnavailable
from firstclaim.operations.commands import ReplayCandidate
from firstclaim.operations.queries import Selection
from firstclaim.operations.search import UNSUCCESSFUL
from firstclaim.status import Status

log = structlog.get_logger(__name__)

_QUESTION: Final = "replay"
_QUESTION_SECONDS: Final = 15 * 60
_FILTERS: Final = ("q", "status", "type", "account", "age")


class Replay:
    """The question and its answer. `give_up_seconds` is how long a replayed event is tried again."""

    def __init__(self, asking: AdminLedger, give_up_seconds: float) -> None:
        self._asking = asking
        self._give_up_seconds = give_up_seconds

    async def ask(self, visit: AdminRequest) -> Response:
        """How many are meant: those that are ticked, or, where the form says so, all that match the list's filters."""
        everything = visit.field("all") == "yes"
        filters = Filters.of({name: _said(visit.form, name) for name in _FILTERS})
        async with self._asking.ledger() as ledger:
            if everything:
                found = await ledger.replayable(filters.search, REPLAYED_MOST + 1)
                event_ids, more = found[:REPLAYED_MOST], len(found) > REPLAYED_MOST
            else:
                event_ids, more = _said(visit.form, "event")[:REPLAYED_MOST], False
            chosen = await ledger.select_candidates(Selection(event_ids)) if event_ids else []
        meant = [each for each in chosen if each.status in UNSUCCESSFUL and each.has_payload]
        if not event_ids:
            raise Refused(400, "No event is ticked", "Go back, and tick the events that you mean.")
        return visit.page(
            "replay.html",
            question=self._pack(visit, meant),
            meant=meant,
            counts=Counter(each.status for each in meant),
            pruned=sum(each.status in UNSUCCESSFUL and not each.has_payload for each in chosen),
            others=len(event_ids) - sum(each.status in UNSUCCESSFUL for each in chosen),
            everything=everything,
            more=more,
            back=_back(visit, filters),
        )

    async def replay(self, visit: AdminRequest) -> Response:
        """Do it, and go back to where the question was asked."""
        packed = visit.signer.unpack(visit.known, _QUESTION, visit.field("question"), _QUESTION_SECONDS)
        if packed is None:
            raise Refused(400, "That question is no longer open", "Go back to the list, and ask again.")
        chosen = [ReplayCandidate(event_id, Status(status), attempt, True) for event_id, status, attempt in packed]
        if visit.field("count").strip() not in ("", str(len(chosen))) or (
            visit.field("counted") == "yes" and not visit.field("count").strip()
        ):
            text = f"{len(chosen)} events are meant, and you typed another number. Nothing was changed."
            raise Refused(400, "That is another number", text)
        done = await self._replay(visit, chosen)
        kept = len(chosen) - done
        log.info("admin_replay", address=visit.address, meant=len(chosen), made_due=done)
        left = f"; {kept} not touched: changed meanwhile, or being handled" if kept else ""
        visit.notice(f"{done} made due{left}.", good=not kept)
        return visit.go(_return_to(visit.field("back")))

    async def _replay(self, visit: AdminRequest, chosen: list[ReplayCandidate]) -> int:
        done = 0
        selection = Selection([each.event_id for each in chosen])
        operator = f"admin page from {visit.address}"
        try:
            async with self._asking.ledger() as ledger:
                async for batch in ledger.replay(chosen, selection, operator, give_up_seconds=self._give_up_seconds):
                    done += len(batch)
        except LedgerUnavailable as error:
            log.warning("admin_replay_interrupted", address=visit.address, made_due=done, error=str(error))
            text = f"Postgres could not go on after {done} were made due. Ask again: those are not touched twice."
            raise Refused(503, "The replay was interrupted", text) from None
        return done

    @staticmethod
    def _pack(visit: AdminRequest, meant: list[ReplayCandidate]) -> str:
        content: list[Any] = [[each.event_id, each.status.value, each.attempt] for each in meant]
        return visit.signer.pack(visit.known, _QUESTION, content)


def _said(form: Mapping[str, list[str]], name: str) -> list[str]:
    """What can be looked for, each once."""
    values = (value.strip() for value in form.get(name, []))
    return list(dict.fromkeys(value for value in values if 0 < len(value) <= 255 and value.isprintable()))


def _back(visit: AdminRequest, filters: Filters) -> str:
    event_id = next(iter(_said(visit.form, "from_event")), None)
    return filters.address() if event_id is None else f"{PATH}/events/{event_id}"


def _return_to(back: str) -> str:
    """Where the question was asked; anything but a page of ours is the list."""
    ours = back.startswith(f"{PATH}/events") and back.isprintable() and back.isascii() and "\\" not in back
    return back if ours else f"{PATH}/events"
