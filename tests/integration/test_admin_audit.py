"""The audit page, the progress of a replay, ignored events, the event's page, and pages that refresh themselves."""

import re
from collections.abc import AsyncIterator

import pytest

from firstclaim.admin import audit as audit_module
from firstclaim.admin import session as sessions
from firstclaim.operations import pauses
from firstclaim.operations.commands import Commands
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery
from tests.pages import ON, Visitor, logged_in


async def _handled(_event: object, _context: object) -> str:
    return "handled"


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """With the page switched on, and a handler for invoices."""
    return await make_world({"invoice.*": _handled}, **ON)


@pytest.fixture
async def admin(world: World) -> AsyncIterator[Visitor]:
    """Logged in."""
    async with logged_in(world) as admin:
        yield admin


async def test_a_replay_shows_its_progress(world: World, admin: Visitor) -> None:
    """After a replay, its page counts the events that are handled, and stops to refresh once all are."""
    ids = [(await world.state_of(delivery(), Status.DEAD)).event.id for _ in range(3)]
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    _, page = await admin.follow(response)
    assert "0 of 3 are handled" in page.text
    assert 'data-refresh="2"' in page.html
    assert "status dead" in page.text
    await world.settle(ids[0], Status.COMPLETED)
    await world.settle(ids[1], Status.FAILED)
    _, page = await admin.follow(response)
    assert "2 of 3 are handled" in page.text
    assert ("progress", {"value": "2", "max": "3", "aria-labelledby": "progress"}) in page.tags
    await world.settle(ids[2], Status.COMPLETED)
    _, page = await admin.follow(response)
    assert "All are handled" in page.text
    assert "completed 2" in page.text
    assert 'data-refresh="0"' in page.html
    assert {link for link in page.links if "/events/evt" in link} == {f"/admin/events/{each}" for each in ids}


async def test_what_is_paused_is_said(world: World, admin: Visitor) -> None:
    """An event's page, a replay's confirmation and its progress say that a pause is why nothing happens, and whose."""
    ids = [
        (await world.state_of(delivery(type=kind), Status.DEAD)).event.id
        for kind in ("invoice.paid", "charge.refunded")
    ]
    waiting = (await world.state_of(delivery(type="invoice.payment_failed"), Status.PENDING)).event.id
    other = (await world.state_of(delivery(type="charge.refunded"), Status.PENDING)).event.id
    assert "paused" not in (await admin.get(f"/admin/events/{waiting}"))[1].text
    async with Commands.connect(world.url, 5) as operations:
        assert await pauses.pause(operations, "ada@<ops>", "invoice.*")
        try:
            await world.database.execute(
                "UPDATE firstclaim.operator_pauses SET paused_at = timestamptz '2026-01-02 03:04:05Z'"
            )
            pause = r"paused: invoice\.\* since 2026-01-02 03:04:05 \d+ \w+ ago , by ada@<ops>\."
            _, page = await admin.get(f"/admin/events/{waiting}")
            assert re.search(f"It waits, because its type is {pause}", page.text)
            assert "; its type is paused" in page.text
            for event_id in (other, ids[0]):  # of another type, and one that waits for nothing
                assert "paused" not in (await admin.get(f"/admin/events/{event_id}"))[1].text
            _, page = await admin.get("/admin/events?status=dead")
            _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
            assert re.search(f"1 event will wait, because its type is {pause}", page.text)
            response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "2"))
            _, page = await admin.follow(response)
            assert "0 of 2 are handled" in page.text
            assert re.search(f"1 event waits, because its type is {pause}", page.text)
        finally:
            assert await pauses.resume(operations, "ada@<ops>", "invoice.*", give_up_seconds=60.0) is not None
    assert "paused" not in (await admin.follow(response))[1].text


async def test_the_audit_has_a_page(world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every action is listed once, the newest first, on as many pages as it takes, with its own page."""
    monkeypatch.setattr(audit_module, "_PAGE_ACTIONS", 2)
    for number, (action, selection, changed) in enumerate(
        (
            ("prune", "payloads=90d rows=400d", 12),
            ("replay", "status=dead type=invoice.*", 3),
            ("rotate", "epoch x", None),
        )
    ):
        await world.database.execute(
            "INSERT INTO firstclaim.operator_actions (at, operator, action, selection, changed)"
            " VALUES (now() + $1 * interval '1 s', $2, $3, $4, $5)",
            number,
            f"ada@web-{number}",
            action,
            selection,
            changed,
        )
    _, first = await admin.get("/admin/audit")
    assert first.text.index("ada@web-2") < first.text.index("ada@web-1")
    assert "ada@web-0" not in first.text
    assert "not ended" in first.text
    [older] = [link for link in first.links if "before=" in link]
    _, second = await admin.get(older)
    assert "ada@web-0" in second.text
    assert "ada@web-1" not in second.text
    [link] = [link for link in second.links if "/audit/" in link]
    _, page = await admin.get(link)
    assert "payloads=90d rows=400d" in page.text
    [link] = [link for link in first.links if "/audit/" in link][1:]
    _, page = await admin.get(link)
    assert "status=dead type=invoice.*" in page.text  # the command line's replay names no ids: no progress is shown
    assert "handled" not in page.text
    for unknown in ("/admin/audit/999999999", f"/admin/audit/{2**70}", "/admin/audit/x"):
        assert (await admin.get(unknown))[0].status_code == 404
    for odd in ("x", "-1", "9" * 40, "%C2%B2"):
        assert (await admin.get(f"/admin/audit?before={odd}"))[0].status_code == 200


async def test_ignored_events_are_replayed_once_they_have_a_handler(world: World, admin: Visitor) -> None:
    """Ignored events with a handler are replayed by filter or by hand; those without one are counted and left alone."""
    mine = (await world.state_of(delivery(type="invoice.paid"), Status.IGNORED)).event.id
    other = (await world.state_of(delivery(type="customer.created"), Status.IGNORED)).event.id
    dead = (await world.state_of(delivery(type="invoice.paid"), Status.DEAD)).event.id
    _, page = await admin.get("/admin/events?status=ignored")
    form = page.form("/admin/replay")
    assert form.boxes == [("event", mine)]
    assert "Replay all 2 matching ignored events" in page.text
    _, page = await admin.submit(form, ("all", "ignored"))
    assert "Replay 1 event?" in page.text
    assert "all ignored events that match status ignored" in page.text
    assert "1 event will not be replayed: this build has no handler for its type" in page.text
    await admin.submit(page.form("/admin/replay/confirmed"), ("count", "1"))
    assert [await world.status(each) for each in (mine, other, dead)] == [Status.PENDING, Status.IGNORED, Status.DEAD]
    assert not (await admin.get(f"/admin/events/{other}"))[1].has_form("/admin/replay")


async def test_all_that_match_are_not_the_ignored_ones(world: World, admin: Visitor) -> None:
    """The button for failed and dead events never replays an ignored one, whatever the filters are."""
    mine = (await world.state_of(delivery(type="invoice.paid"), Status.IGNORED)).event.id
    dead = (await world.state_of(delivery(type="invoice.paid"), Status.DEAD)).event.id
    _, page = await admin.get("/admin/events")
    assert "Replay the 1 matching failed or dead event" in page.text
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    await admin.submit(page.form("/admin/replay/confirmed"), ("count", "1"))
    assert [await world.status(each) for each in (mine, dead)] == [Status.IGNORED, Status.PENDING]


@pytest.mark.parametrize(
    ("columns", "event_link", "object_link"),
    [
        ({}, "/test/events/evt_1", "/test/invoices/in_1"),
        ({"livemode": True, "object_id": "cus_1"}, "/events/evt_1", "/customers/cus_1"),
        ({"account": "acct_1", "object_id": "xx_1"}, "/acct_1/test/events/evt_1", "/acct_1/test/search?query=xx_1"),
        (
            {"account": "a/../b", "object_id": "ch_?x"},
            "/a%2F..%2Fb/test/events/evt_1",
            "/a%2F..%2Fb/test/payments/ch_%3Fx",
        ),
    ],
)
async def test_links_to_stripe(
    world: World, admin: Visitor, columns: dict[str, object], event_link: str, object_link: str
) -> None:
    """An event's page leads to the event and its object in Stripe's dashboard: right account, right mode."""
    await world.state_of(delivery("evt_1"), Status.COMPLETED)
    await world.change("evt_1", **{"livemode": False, "object_id": "in_1", **columns})
    _, page = await admin.get("/admin/events/evt_1")
    assert [link.removeprefix("https://dashboard.stripe.com") for link in page.links if "stripe.com" in link] == [
        event_link,
        object_link,
    ]


async def test_a_payload_has_its_changes(world: World, admin: Visitor) -> None:
    """What changed is shown before and after, and the payload in lines that can be folded without a script."""
    data = {"object": {"status": "active", "note": "<b>"}, "previous_attributes": {"status": "past_due"}}
    await world.state_of(delivery("evt_1", type="customer.subscription.updated", data=data), Status.COMPLETED)
    _, page = await admin.get("/admin/events/evt_1")
    assert "past_due" not in page.html
    _, page = await admin.submit(page.form("/admin/payload"))
    assert 'status "past_due" "active"' in page.text
    assert [tag for tag, _ in page.tags].count("details") >= 3
    assert ("span", {"class": "string"}) in page.tags


async def test_a_refresh_is_no_use(admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that refreshes itself does not renew its session: a forgotten tab is logged out like any other."""
    monkeypatch.setattr(sessions, "_RENEWED_SECONDS", -1)
    response, _ = await admin.get("/admin", X_Firstclaim_Refresh="1")
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    response, _ = await admin.get("/admin")
    assert "__Host-firstclaim-session=" in response.headers["set-cookie"]
