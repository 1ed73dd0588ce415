"""Replaying by the page: asked, counted, done to exactly those, and noted; whatever else is left alone."""

from collections.abc import AsyncIterator

import pytest

from firstclaim.admin import events as events_module
from firstclaim.admin import replay as replaying_module
from firstclaim.errors import LedgerUnavailable
from firstclaim.operations import commands as operations_module
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.test_ledger import unchanged
from tests.integration.world import World, delivery
from tests.pages import ADDRESS, ON, Page, Visitor, site_of, visitor

OPERATOR = f"admin page from {ADDRESS}"


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """With the page switched on, and nothing noted yet."""
    world = await make_world(**ON)
    await world.database.execute("DELETE FROM operator_actions")
    return world


@pytest.fixture
async def admin(world: World) -> AsyncIterator[Visitor]:
    """Logged in."""
    admin = visitor(site_of(world))
    async with admin.client:
        await admin.log_in()
        yield admin


async def event(world: World, status: Status, event_id: str | None = None) -> str:
    given = await world.state_of(delivery(event_id), status)
    await world.change(given.event.id, attempt=3, failures=2)
    return given.event.id


async def noted(world: World) -> list[tuple[str, str, str, int | None]]:
    rows = await world.database.fetch("SELECT operator, action, selection, changed FROM operator_actions ORDER BY at")
    return [tuple(row) for row in rows]


def told(page: Page) -> str:
    """The notice on top of a page."""
    assert any("notice" in (given.get("class") or "") for tag, given in page.tags if tag == "p"), page.text
    return page.text


@pytest.mark.parametrize("status", [Status.FAILED, Status.DEAD])
async def test_one_event(world: World, admin: Visitor, status: Status) -> None:
    """From its own page, and back to it: due now, counted anew, the attempt kept, and noted with who and from where."""
    event_id = await event(world, status)
    other = await world.row(await event(world, status))
    _, page = await admin.get(f"/admin/events/{event_id}")
    response, page = await admin.submit(page.form("/admin/replay"))
    assert response.status_code == 200
    assert "Replay 1 event?" in page.text
    assert await world.status(event_id) is status  # asking changes nothing
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
    assert response.headers["location"] == f"/admin/events/{event_id}"
    _, page = await admin.follow(response)
    assert "1 event is due now." in told(page)
    assert "due now" not in (await admin.get("/admin"))[1].text  # said once
    row = await world.row(event_id)
    assert (row["status"], row["attempt"], row["failures"]) == ("pending", 3, 0)
    assert row["due_in"] == pytest.approx(0, abs=20)
    assert unchanged(other, await world.row(other["event_id"]))
    assert await noted(world) == [(OPERATOR, "replay", event_id, 1)]
    assert f"replay by {OPERATOR}" in (await admin.get(f"/admin/events/{event_id}"))[1].text


async def test_only_what_is_failed_or_dead_is_offered(world: World, admin: Visitor) -> None:
    """No box and no button for the others, and a form that was made by hand does nothing to them."""
    others = {status: await event(world, status) for status in Status if status not in (Status.FAILED, Status.DEAD)}
    dead = await event(world, Status.DEAD)
    _, page = await admin.get("/admin/events")
    form = page.form("/admin/replay")
    assert form.boxes == [("event", dead)]
    for event_id in others.values():
        assert not (await admin.get(f"/admin/events/{event_id}"))[1].has_form("/admin/replay")
    before = [await world.row(event_id) for event_id in others.values()]
    _, page = await admin.submit(form, ("event", "evt_unknown"), *(("event", each) for each in others.values()))
    assert "Nothing to replay" in page.text
    assert not page.has_form("/admin/replay/confirmed")
    _, page = await admin.submit(form, ("event", dead), *(("event", each) for each in others.values()))
    assert "Replay 1 event?" in page.text
    assert "4 events will not be replayed" in page.text
    await admin.submit(page.form("/admin/replay/confirmed"))
    for row in before:
        assert unchanged(row, await world.row(row["event_id"]))
    assert await world.status(dead) is Status.PENDING


async def test_those_that_are_ticked(world: World, admin: Visitor) -> None:
    """And no others; all of a page are ticked by a link, for there is no script that could."""
    ids = [await event(world, Status.DEAD) for _ in range(4)]
    _, page = await admin.get("/admin/events?status=dead")
    [tick_all] = [link for link in page.links if "select=all" in link]
    assert (
        len([pair for pair in (await admin.get(tick_all))[1].form("/admin/replay").fields if pair[0] == "event"]) == 4
    )
    _, page = await admin.submit(page.form("/admin/replay"), ("event", ids[0]), ("event", ids[2]))
    assert "Replay 2 events?" in page.text
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
    assert response.headers["location"] == "/admin/events?status=dead"
    assert "2 events are due now." in told((await admin.follow(response))[1])
    assert [await world.status(each) for each in ids] == [Status.PENDING, Status.DEAD] * 2
    [(_, _, selection, changed)] = await noted(world)
    assert (set(selection.split()), changed) == ({ids[0], ids[2]}, 2)


async def test_nothing_ticked_is_nothing(world: World, admin: Visitor) -> None:
    """Not everything: the page says that nothing was ticked."""
    await event(world, Status.DEAD)
    _, page = await admin.get("/admin/events")
    response, page = await admin.submit(page.form("/admin/replay"))
    assert response.status_code == 400
    assert "No event is selected" in page.text


async def test_all_that_match(world: World, admin: Visitor) -> None:
    """By the filters that the list had, also those beyond its page; only with the right number typed."""
    ids = [await event(world, Status.DEAD) for _ in range(3)]
    left = [await world.row(await event(world, each)) for each in (Status.FAILED, Status.COMPLETED, Status.PROCESSING)]
    other = await event(world, Status.DEAD)
    await world.change(other, type="charge.refunded")
    _, page = await admin.get("/admin/events?status=dead&type=invoice.*")
    form = page.form("/admin/replay")
    assert form.buttons[-1] == ("all", "yes")
    assert "Replay all 3 matching failed and dead events" in page.text
    _, page = await admin.submit(form, ("all", "yes"))
    assert "Replay 3 events?" in page.text
    confirm = page.form("/admin/replay/confirmed")
    for wrong in ("", "2", "33", "x"):
        response, page = await admin.submit(confirm, ("count", wrong))
        assert response.status_code == 400, wrong
        assert "Nothing was changed" in page.text
    assert await noted(world) == []
    response, _ = await admin.submit(confirm, ("count", "3"))
    assert "3 events are due now." in told((await admin.follow(response))[1])
    assert {await world.status(each) for each in ids} == {Status.PENDING}
    assert await world.status(other) is Status.DEAD
    for row in left:
        assert unchanged(row, await world.row(row["event_id"]))
    assert {len(row[2].split()) for row in await noted(world)} == {3}


async def test_what_came_in_since_is_not_meant(world: World, admin: Visitor) -> None:
    """The number was confirmed for what was there: what ended, was tried again or came in meanwhile is not touched."""
    ended, tried, same = [await event(world, Status.FAILED) for _ in range(3)]
    _, page = await admin.get("/admin/events?status=failed")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    await world.settle(ended, Status.COMPLETED)
    await world.change(tried, attempt=4)
    late = await event(world, Status.FAILED)
    before = [await world.row(each) for each in (ended, tried, late)]
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    _, after = await admin.follow(response)
    assert "1 event is due now. 2 events skipped" in told(after)
    assert await world.status(same) is Status.PENDING
    for row in before:
        assert unchanged(row, await world.row(row["event_id"]))
    # The same answer once more, from another tab or by the browser's way back: nothing.
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    assert "No event was replayed. 3 events skipped" in told((await admin.follow(response))[1])


async def test_what_is_locked_is_waited_for_by_nobody(world: World, admin: Visitor) -> None:
    """Another transaction holds it: it is left, and told so."""
    held = await event(world, Status.DEAD)
    _, page = await admin.get(f"/admin/events/{held}")
    _, page = await admin.submit(page.form("/admin/replay"))
    async with world.locked(held):
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
    assert "No event was replayed. 1 event skipped" in told((await admin.follow(response))[1])
    assert await world.status(held) is Status.DEAD


async def test_a_question_is_for_one_session_and_not_for_ever(
    world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another login's, one that was meddled with, one that is old: closed, and nothing is changed."""
    dead = await event(world, Status.DEAD)
    _, page = await admin.get(f"/admin/events/{dead}")
    _, page = await admin.submit(page.form("/admin/replay"))
    confirm = page.form("/admin/replay/confirmed")
    question = dict(confirm.fields)["confirmation"]
    async with visitor(site_of(world)).client as client:
        other = Visitor(client)
        await other.log_in()
        token = (await other.get("/admin"))[1].form("/admin/logout").token
        response, _ = await other.post("/admin/replay/confirmed", {"token": token, "confirmation": question})
        assert response.status_code == 400
    for wrong in ("", question[1:], question + "x", question.replace(".", "..")):
        assert (await admin.submit(confirm, ("confirmation", wrong)))[0].status_code == 400
    monkeypatch.setattr(replaying_module, "_CONFIRMATION_SECONDS", -1)
    response, page = await admin.submit(confirm)
    assert response.status_code == 400
    assert "no longer valid" in page.text
    assert await world.status(dead) is Status.DEAD


async def test_what_has_no_payload_is_not_offered(world: World, admin: Visitor) -> None:
    """It could not be handled; the page says how many there are of these."""
    dead, pruned = await event(world, Status.DEAD), await event(world, Status.DEAD)
    await world.database.execute("DELETE FROM stripe_event_payloads WHERE event_id = $1", pruned)
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    assert "Replay 1 event?" in page.text
    assert "1 event cannot be replayed: the payload has been pruned" in page.text
    await admin.submit(page.form("/admin/replay/confirmed"), ("count", "1"))
    assert [await world.status(each) for each in (dead, pruned)] == [Status.PENDING, Status.DEAD]


async def test_more_than_can_be_meant_at_once(world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest so many, and told so; then the next ones, none twice and none left."""
    for module in (events_module, replaying_module):
        monkeypatch.setattr(module, "REPLAYED_MOST", 2)
    monkeypatch.setattr(operations_module, "BATCH", 1)
    ids = [await event(world, Status.DEAD) for _ in range(5)]
    for number, left in ((2, 3), (2, 1), (1, 0)):
        _, page = await admin.get("/admin/events?status=dead")
        assert ("Replay the newest 2 matching failed and dead events" in page.text) == (left > 0)
        _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
        assert ("More events match" in page.text) == (left > 0)
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", str(number)))
        assert "due now." in told((await admin.follow(response))[1])
    assert {await world.status(each) for each in ids} == {Status.PENDING}
    assert [row[3] for row in await noted(world)] == [2, 2, 1]


async def test_a_thousand_with_the_longest_ids_fit_into_a_form(world: World, admin: Visitor) -> None:
    """What the page offers can be sent back to it."""
    given = await event(world, Status.DEAD)
    long, numbers = "'evt_' || repeat(md5(n::text), 7) || n", "generate_series(1, 999) AS n"
    await world.database.execute(
        f"""
        INSERT INTO stripe_events (event_id, type, livemode, created_at, status, attempt, received_at, due_at,
                                   give_up_at, settled_at)
        SELECT {long}, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at
          FROM stripe_events, {numbers} WHERE event_id = $1
        """,
        given,
    )
    await world.database.execute(
        f"INSERT INTO stripe_event_payloads SELECT {long}, body FROM stripe_event_payloads, {numbers}"
    )
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "1000"))
    assert "1000 events are due now." in told((await admin.follow(response))[1])


async def test_a_ledger_that_goes_away_meanwhile(world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says how many were made due before, and asking again touches none of them twice."""
    monkeypatch.setattr(operations_module, "BATCH", 1)
    ids = [await event(world, Status.DEAD) for _ in range(3)]
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    inner = operations_module.Commands._fetch
    calls = 0

    async def interrupted(self: operations_module.Commands, query: object, **values: object) -> list[object]:
        nonlocal calls
        calls += (is_replay := query is operations_module._REPLAY)
        if is_replay and calls == 2:
            raise LedgerUnavailable("away")
        return await inner(self, query, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(operations_module.Commands, "_fetch", interrupted)
    response, broken = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    assert response.status_code == 503
    assert "after 1 event had become due" in broken.text
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    assert "2 events are due now. 1 event skipped" in told((await admin.follow(response))[1])
    assert {await world.status(each) for each in ids} == {Status.PENDING}


async def test_where_it_leads_afterwards_is_a_page_of_ours(world: World, admin: Visitor) -> None:
    """However the form was changed."""
    for back in ("https://evil.test", "//evil.test", "/admin/events\\@evil", "/admin/logout", ""):
        dead = await event(world, Status.DEAD)
        _, page = await admin.get(f"/admin/events/{dead}")
        _, page = await admin.submit(page.form("/admin/replay"))
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("back", back))
        assert response.headers["location"] == "/admin/events"
