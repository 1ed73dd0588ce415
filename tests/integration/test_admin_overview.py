"""The overview on a real ledger: its sentences, the handlers' table, the chart's links, and the list they lead to."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest

from firstclaim.admin import overview as overview_module
from firstclaim.observability import metrics
from firstclaim.operations import traffic as traffic_module
from firstclaim.operations.search import LedgerSearch
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery
from tests.pages import ON, Page, Visitor, logged_in


async def _handled(_event: object, _context: object) -> str:
    return "handled"


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """With the page switched on, and two handlers."""
    return await make_world({"invoice.*": _handled, "charge.refunded": _handled}, **ON)


@pytest.fixture
async def admin(world: World) -> AsyncIterator[Visitor]:
    """Logged in."""
    async with logged_in(world) as admin:
        yield admin


@pytest.fixture
async def ledger(world: World) -> AsyncIterator[LedgerSearch]:
    """On a connection of the admin page."""
    async with world.components.admin.acquire(60) as connection:
        yield LedgerSearch(connection)


async def event(world: World, status: Status, kind: str = "invoice.paid", *, age: float = 10, took: float = 0.1) -> str:
    """The id of an event that was received so many seconds ago, and whose last attempt took that long."""
    given = await world.state_of(delivery(type=kind), status)
    await world.change(given.event.id, received_at=-age)
    if status is Status.COMPLETED:
        await world.database.execute(
            "UPDATE firstclaim.stripe_events SET claimed_at = settled_at - make_interval(secs => $2)"
            " WHERE event_id = $1",
            given.event.id,
            took,
        )
    if status in (Status.FAILED, Status.DEAD):
        await world.change(given.event.id, last_error=f"ValueError: {kind}", due_at=3600.0)
    return given.event.id


def verdict(page: Page) -> str:
    """The text of the first section, without the markup."""
    found = re.search(r'<section class="card verdict (\w+)".*?</section>', page.html, re.DOTALL)
    assert found is not None
    return " ".join(re.sub(r"<[^>]+>", " ", found.group()).split())


async def test_a_handler_that_fails_always_is_named_first(world: World, admin: Visitor) -> None:
    """A rare type of which all events fail is named before one that fails at times, with its error and its events."""
    for _ in range(20):
        await event(world, Status.COMPLETED)
    await event(world, Status.FAILED)
    refunds = [await event(world, Status.FAILED, "charge.refunded") for _ in range(3)]
    _, page = await admin.get("/admin?range=1h")
    assert verdict(page).startswith(
        "All 3 events of charge.refunded in the last hour have failed: ValueError: charge.refunded. "
        "1 of 21 events of invoice.* in the last hour have failed: ValueError: invoice.paid."
    )
    assert "The last event came 10 s ago" in page.text or "The last event came 11 s ago" in page.text
    [link] = {link for link in page.links if "charge.refunded" in link and "status=dead" in link}
    _, listed = await admin.get(link)
    assert {each for each in listed.links if "/events/evt" in each} == {f"/admin/events/{each}" for each in refunds}


async def test_refused_requests_are_said(world: World, admin: Visitor) -> None:
    """After a secret was rolled, the first sentence says that every request is refused, why, and on which replica."""
    assert world.components.recent is not None
    await event(world, Status.COMPLETED)
    _, page = await admin.get("/admin")
    assert verdict(page).startswith("Nothing is wrong that this page can see. The last event came")
    world.components.recent.sample()
    metrics.rejected["signature_mismatch"].inc(300)
    _, page = await admin.get("/admin")
    host = world.ledger._process.rpartition(":")[0]
    assert verdict(page).startswith(
        f"300 of the last 300 requests were refused: signature mismatch (replica {host}). Was a secret rolled at Stripe"
    )
    assert 'class="card verdict outage"' in page.html


async def test_the_handlers_of_the_ledger(world: World, ledger: LedgerSearch) -> None:
    """Events are counted by handler and not by type; each handler has its durations, and what is due of it."""
    for took in (0.1, 0.2, 0.3):
        await event(world, Status.COMPLETED, "invoice.paid", took=took)
    await event(world, Status.DEAD, "invoice.payment_failed")
    await event(world, Status.IGNORED, "customer.created")
    await event(world, Status.COMPLETED, age=7200)
    late = await event(world, Status.PENDING, "charge.refunded", age=9000)
    await world.change(late, due_at=-600.0)

    def handler_of(kind: str, _livemode: bool) -> str | None:
        return {"invoice": "invoice.*", "charge": "charge.refunded"}.get(kind.partition(".")[0])

    traffic = await ledger.traffic(await ledger.last(3600), handler_of)
    found = {each.handler: each for each in traffic.handlers}
    assert set(found) == {"invoice.*", "charge.refunded", None}
    invoices, refunds, others = found["invoice.*"], found["charge.refunded"], found[None]
    assert (invoices.events, invoices.completed, invoices.failed, invoices.dead) == (4, 3, 0, 1)
    assert invoices.success == 0.75
    assert invoices.last_error == "ValueError: invoice.payment_failed"
    assert invoices.seconds == pytest.approx((0.2, 0.29, 0.298))
    assert (refunds.events, refunds.seconds) == (0, None)
    assert refunds.oldest_due_seconds == pytest.approx(600, abs=30)
    assert (others.events, others.success) == (1, None)
    assert traffic.all_read
    assert traffic.seconds == pytest.approx(3600)
    paused = await ledger.traffic(await ledger.last(3600), handler_of, "charge.refunded".__eq__)
    assert "charge.refunded" not in {each.handler for each in paused.handlers}  # no event of it, and nothing due


async def test_many_events_are_read_in_part(
    world: World, ledger: LedgerSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more events than are read, the newest ones are, and the result says how far back."""
    monkeypatch.setattr(traffic_module, "EVENTS_MOST", 3)
    for age in (10, 20, 30, 40, 50):
        await event(world, Status.COMPLETED, age=age)
    traffic = await ledger.traffic(await ledger.last(3600), lambda *_: "*")
    assert [each.events for each in traffic.handlers] == [3]
    assert not traffic.all_read
    assert traffic.seconds == pytest.approx(30, abs=20)


async def test_failures_are_grouped(world: World, admin: Visitor) -> None:
    """Each group of failures has a row, with how many failed when, and a link to its events."""
    ids = [await event(world, Status.FAILED) for _ in range(2)]
    other = await event(world, Status.DEAD, "charge.refunded")
    for event_id, error, handler in ((ids[0], "KeyError", "a"), (ids[1], "KeyError", "a"), (other, "OSError", "b")):
        await world.database.execute(
            """
            INSERT INTO firstclaim.stripe_event_attempts
                   (event_id, attempt, outcome, ended_at, error, handler, error_class, place, failure_group)
            VALUES ($1, 1, 'failed', now(), $2 || ': x', $3, $2, 'shop/handlers.py:3 in grant', $2 || $3)
            """,
            event_id,
            error,
            handler,
        )
    _, page = await admin.get("/admin")
    assert "Groups of failures in the last 24 hours" in page.text
    assert "in no group" not in page.text
    await event(world, Status.DEAD)
    assert "1 dead event is in no group: an older build" in (await admin.get("/admin?range=7d"))[1].text
    [link] = [link for link in page.links if "group=KeyError" in link]
    _, listed = await admin.get(link)
    assert {each for each in listed.links if "/events/evt" in each} == {f"/admin/events/{each}" for each in ids}
    assert "failure group KeyErrora" in (await admin.submit(listed.form("/admin/replay"), ("all", "yes")))[1].text


async def test_every_handler_has_a_row(world: World, admin: Visitor) -> None:
    """A handler without events is in the table too, and events without a handler are in a row of their own.

    Each pattern has the name of the function below it, which the log, notices and groups of failures have.
    """
    await event(world, Status.IGNORED, "customer.created")
    _, page = await admin.get("/admin")
    table = page.html[page.html.index('class="list handlers"') :]
    headers = re.findall(r'<th scope="row"[^>]*>(.*?)</th>', table[: table.index("</table>")], re.DOTALL)
    name = "tests.integration.test_admin_overview._handled"
    assert [re.sub(r"<[^>]+>", " ", each.replace("<wbr>", "")).split() for each in headers] == [
        ["invoice.*", name],
        ["charge.refunded", name],
        ["no", "handler", "in", "this", "build"],
    ]


async def test_a_bar_leads_to_its_events(world: World, admin: Visitor) -> None:
    """Each bar of the chart is a link to the list of its time; the numbers of all bars add up to the events.

    Follow-ups are not among the numbers, and not in these lists either.
    """
    ids = {
        await event(world, status, age=age)
        for age, status in ((5, Status.COMPLETED), (4000, Status.DEAD), (30_000, Status.IGNORED))
    }
    follow_up = await event(world, Status.COMPLETED, age=5)
    await world.change(follow_up, type="task:send", parent_id=min(ids))
    for query in ("", "?range=7d", "?range=1h"):
        _, page = await admin.get("/admin" + query)
        bars = sorted({link for link in page.links if "since=" in link and "until=" in link and "status" not in link})
        listed = set()
        for bar in bars:
            given = parse_qs(urlsplit(bar).query)
            _, found = await admin.get(bar)
            listed |= {link.rpartition("/")[2] for link in found.links if "/events/evt" in link}
            assert given["kind"] == ["events"]
        assert listed == (ids if query != "?range=1h" else listed & ids)
        assert len(listed) == (3 if query != "?range=1h" else 1)


async def test_an_own_range_is_shown(world: World, admin: Visitor) -> None:
    """A range of two instants is in the form, in the headings, and in the numbers."""
    await event(world, Status.COMPLETED, age=5)
    await event(world, Status.COMPLETED, age=9000)
    since = datetime.now(UTC) - timedelta(seconds=9600)
    address = f"/admin?since={since:%Y-%m-%dT%H:%M}&until={since + timedelta(seconds=3600):%Y-%m-%dT%H:%M}"
    _, page = await admin.get(address)
    assert f"Events received from {since:%Y-%m-%d %H:%M} to" in page.text
    assert "1 event, a bar for 1 min" in page.text
    assert f'value="{since:%Y-%m-%dT%H:%M}:00"' in page.html


async def test_what_was_slow_is_kept(world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that took long to read is shown again for a while, for its range alone."""
    await event(world, Status.COMPLETED)
    monkeypatch.setattr(overview_module, "_QUICK_SECONDS", -1.0)
    monkeypatch.setattr(overview_module, "_CACHE_FACTOR", 10_000)
    assert "1 event," in (await admin.get("/admin?range=7d"))[1].text
    await event(world, Status.COMPLETED)
    assert "1 event," in (await admin.get("/admin?range=7d"))[1].text
    assert "2 events," in (await admin.get("/admin?range=1h"))[1].text


async def test_what_does_not_fit_into_the_time_is_left_out(
    world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no time left, the page says what was not counted, and shows the rest."""
    await event(world, Status.DEAD)
    monkeypatch.setattr(overview_module, "_BUDGET_SECONDS", -1.0)
    response, page = await admin.get("/admin")
    assert response.status_code == 200
    assert page.text.count("Counting took too long.") == 3
    assert verdict(page).startswith("The handlers and the backlog and the time of the last event could not be read")


async def test_several_types_and_a_range(world: World, admin: Visitor) -> None:
    """The list takes several types, with or without `.*`, and events received between two instants."""
    paid = await event(world, Status.COMPLETED, "invoice.paid", age=10)
    refund = await event(world, Status.COMPLETED, "charge.refunded", age=4000)
    await event(world, Status.COMPLETED, "customer.created", age=4000)
    now = datetime.now(UTC)

    async def listed(**filters: str) -> set[str]:
        _, page = await admin.get("/admin/events?" + "&".join(f"{name}={value}" for name, value in filters.items()))
        return {link.rpartition("/")[2] for link in page.links if "/events/evt" in link}

    assert await listed(type="invoice.*, charge.refunded") == {paid, refund}
    await world.change(paid, parent_id=refund)
    assert await listed(kind="follow-ups") == {paid}
    assert await listed(type="*", kind="events") == await listed() - {paid}
    assert await listed(type="*") == await listed()  # the pattern of a handler of all types, as its link has it
    assert await listed(type="charge.refunded,nothing") == {refund}
    since = f"{now - timedelta(seconds=4100):%Y-%m-%dT%H:%M:%S}"
    until = f"{now - timedelta(seconds=3900):%Y-%m-%dT%H:%M:%S}"
    assert await listed(type="charge.*,invoice.*", since=since, until=until) == {refund}
    assert await listed(since=until) == {paid}
