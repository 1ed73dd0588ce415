"""Replays on the admin page: confirmed, counted, audited, and limited to the confirmed events."""

from collections.abc import AsyncIterator

import pytest

from firstclaim.admin import events as events_module
from firstclaim.admin import replay as replay_module
from firstclaim.errors import LedgerUnavailable
from firstclaim.operations import commands as commands_module
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.test_ledger import unchanged
from tests.integration.world import World, delivery
from tests.pages import ADDRESS, ON, Page, Visitor, logged_in, site_of, visitor

OPERATOR = f"admin page from {ADDRESS}"


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """With the page switched on."""
    return await make_world(**ON)


@pytest.fixture
async def admin(world: World) -> AsyncIterator[Visitor]:
    """Logged in."""
    async with logged_in(world) as admin:
        yield admin


async def event(world: World, status: Status, event_id: str | None = None) -> str:
    given = await world.state_of(delivery(event_id), status)
    await world.change(given.event.id, attempt=3, failures=2)
    return given.event.id


async def audit(world: World) -> list[tuple[str, str, str, int | None]]:
    rows = await world.database.fetch(
        "SELECT operator, action, selection, changed FROM firstclaim.operator_actions ORDER BY at"
    )
    return [tuple(row) for row in rows]


def notice(page: Page) -> str:
    """The text of a page that has a notice."""
    assert any("notice" in (given.get("class") or "") for tag, given in page.tags if tag == "p"), page.text
    return page.text


@pytest.mark.parametrize("status", [Status.FAILED, Status.DEAD])
async def test_one_event(world: World, admin: Visitor, status: Status) -> None:
    """A replay from the event's page makes it due, resets its counts, keeps its attempt, and is audited."""
    event_id = await event(world, status)
    other = await world.row(await event(world, status))
    _, page = await admin.get(f"/admin/events/{event_id}")
    response, page = await admin.submit(page.form("/admin/replay"))
    assert response.status_code == 200
    assert "Replay 1 event?" in page.text
    assert await world.status(event_id) is status  # the confirmation page changes nothing
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
    assert response.headers["location"] == f"/admin/events/{event_id}"
    _, page = await admin.follow(response)
    assert "1 event is due now." in notice(page)
    assert "due now" not in (await admin.get("/admin"))[1].text  # a notice is shown once
    row = await world.row(event_id)
    assert (row["status"], row["attempt"], row["failures"]) == ("pending", 3, 0)
    assert row["due_in"] == pytest.approx(0, abs=20)
    assert unchanged(other, await world.row(other["event_id"]))
    assert await audit(world) == [(OPERATOR, "replay", event_id, 1)]
    assert f"replay by {OPERATOR}" in (await admin.get(f"/admin/events/{event_id}"))[1].text


async def test_only_failed_and_dead_events_are_offered(world: World, admin: Visitor) -> None:
    """Other events have no checkbox and no button, and a forged form does not change them."""
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
    assert "3 events will not be replayed" in page.text
    assert "1 event will not be replayed: this build has no handler for its type" in page.text
    await admin.submit(page.form("/admin/replay/confirmed"))
    for row in before:
        assert unchanged(row, await world.row(row["event_id"]))
    assert await world.status(dead) is Status.PENDING


async def test_selected_events_are_replayed(world: World, admin: Visitor) -> None:
    """Only the selected events are replayed; a link selects all events of the page without a script."""
    ids = [await event(world, Status.DEAD) for _ in range(4)]
    _, page = await admin.get("/admin/events?status=dead")
    [tick_all] = [link for link in page.links if "select=all" in link]
    assert (
        len([pair for pair in (await admin.get(tick_all))[1].form("/admin/replay").fields if pair[0] == "event"]) == 4
    )
    _, page = await admin.submit(page.form("/admin/replay"), ("event", ids[0]), ("event", ids[2]))
    assert "Replay 2 events?" in page.text
    assert "Chosen: by hand, in the list of status dead" in page.text
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
    assert response.headers["location"].startswith("/admin/audit/")
    assert "2 events are due now." in notice((await admin.follow(response))[1])
    assert [await world.status(each) for each in ids] == [Status.PENDING, Status.DEAD] * 2
    [(_, _, selection, changed)] = await audit(world)
    assert (set(selection.split()), changed) == ({ids[0], ids[2]}, 2)


async def test_an_empty_selection_replays_nothing(world: World, admin: Visitor) -> None:
    """Without a selected event the page says so, and replays nothing."""
    await event(world, Status.DEAD)
    _, page = await admin.get("/admin/events")
    response, page = await admin.submit(page.form("/admin/replay"))
    assert response.status_code == 400
    assert "No event is selected" in page.text


async def test_all_that_match(world: World, admin: Visitor) -> None:
    """All events that match the filters are replayed, also of other pages, and only if the right number is typed."""
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
    assert "Chosen: all failed and dead events that match status dead; type invoice.*" in page.text
    confirm = page.form("/admin/replay/confirmed")
    for wrong in ("", "2", "33", "x"):
        response, page = await admin.submit(confirm, ("count", wrong))
        assert response.status_code == 400, wrong
        assert "Nothing was changed" in page.text
    assert await audit(world) == []
    response, _ = await admin.submit(confirm, ("count", "3"))
    assert "3 events are due now." in notice((await admin.follow(response))[1])
    assert {await world.status(each) for each in ids} == {Status.PENDING}
    assert await world.status(other) is Status.DEAD
    for row in left:
        assert unchanged(row, await world.row(row["event_id"]))
    [(_, _, selection, changed)] = await audit(world)
    chosen, _, words = selection.partition(" filter: ")
    assert (set(chosen.split()), words, changed) == (set(ids), "status dead; type invoice.*", 3)


async def test_an_event_that_changed_is_not_replayed(world: World, admin: Visitor) -> None:
    """Events that ended, were tried again or were received after the confirmation page are not replayed."""
    ended, tried, same = [await event(world, Status.FAILED) for _ in range(3)]
    _, page = await admin.get("/admin/events?status=failed")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    await world.settle(ended, Status.COMPLETED)
    await world.change(tried, attempt=4)
    late = await event(world, Status.FAILED)
    before = [await world.row(each) for each in (ended, tried, late)]
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    _, after = await admin.follow(response)
    assert "1 event is due now. 2 events were skipped" in notice(after)
    assert await world.status(same) is Status.PENDING
    for row in before:
        assert unchanged(row, await world.row(row["event_id"]))
    # The same form once more, from another tab or after the browser's back button, replays nothing.
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    assert "No event was replayed. 3 events were skipped" in notice((await admin.follow(response))[1])


async def test_a_locked_event_is_skipped(world: World, admin: Visitor) -> None:
    """An event that another transaction has locked is skipped, and the page says so."""
    locked = await event(world, Status.DEAD)
    _, page = await admin.get(f"/admin/events/{locked}")
    _, page = await admin.submit(page.form("/admin/replay"))
    async with world.locked(locked):
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
    assert "No event was replayed. 1 event was skipped" in notice((await admin.follow(response))[1])
    assert await world.status(locked) is Status.DEAD


async def test_a_confirmation_is_for_one_session_and_expires(
    world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A confirmation of another session, tampered with or expired is refused, and nothing changes."""
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
    monkeypatch.setattr(replay_module, "_CONFIRMATION_SECONDS", -1)
    response, page = await admin.submit(confirm)
    assert response.status_code == 400
    assert "no longer valid" in page.text
    assert await world.status(dead) is Status.DEAD


async def test_an_event_without_payload_is_not_replayed(world: World, admin: Visitor) -> None:
    """An event without payload could not be handled: it is not replayed, and the page counts it."""
    dead, pruned = await event(world, Status.DEAD), await event(world, Status.DEAD)
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads WHERE event_id = $1", pruned)
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    assert "Replay 1 event?" in page.text
    assert "1 event cannot be replayed, because its payload has been pruned" in page.text
    await admin.submit(page.form("/admin/replay/confirmed"), ("count", "1"))
    assert [await world.status(each) for each in (dead, pruned)] == [Status.PENDING, Status.DEAD]


async def test_more_events_than_one_replay_takes(world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest events are replayed first, the page says that there are more, and each is replayed once."""
    for module in (events_module, replay_module):
        monkeypatch.setattr(module, "REPLAYED_MOST", 2)
    monkeypatch.setattr(commands_module, "BATCH", 1)
    ids = [await event(world, Status.DEAD) for _ in range(5)]
    for number, left in ((2, 3), (2, 1), (1, 0)):
        _, page = await admin.get("/admin/events?status=dead")
        assert ("Replay the newest 2 matching failed and dead events" in page.text) == (left > 0)
        _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
        assert ("More events match" in page.text) == (left > 0)
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", str(number)))
        assert "due now." in notice((await admin.follow(response))[1])
    assert {await world.status(each) for each in ids} == {Status.PENDING}
    assert [row[3] for row in await audit(world)] == [2, 2, 1]


async def test_a_thousand_with_the_longest_ids_fit_into_a_form(world: World, admin: Visitor) -> None:
    """The confirmation of the largest replay is smaller than the limit of a form."""
    given = await event(world, Status.DEAD)
    long, numbers = "'evt_' || repeat(md5(n::text), 7) || n", "generate_series(1, 999) AS n"
    await world.database.execute(
        f"""
        INSERT INTO firstclaim.stripe_events
               (event_id, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at)
        SELECT {long}, type, livemode, created_at, status, attempt, received_at, due_at, give_up_at, settled_at
          FROM firstclaim.stripe_events, {numbers} WHERE event_id = $1
        """,
        given,
    )
    await world.database.execute(
        f"INSERT INTO firstclaim.stripe_event_payloads"
        f" SELECT {long}, body FROM firstclaim.stripe_event_payloads, {numbers}"
    )
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "1000"))
    assert "1000 events are due now." in notice((await admin.follow(response))[1])


async def test_a_replay_is_interrupted(world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says how many events became due, and a second replay replays none of them twice."""
    monkeypatch.setattr(commands_module, "BATCH", 1)
    ids = [await event(world, Status.DEAD) for _ in range(3)]
    _, page = await admin.get("/admin/events?status=dead")
    _, page = await admin.submit(page.form("/admin/replay"), ("all", "yes"))
    inner = commands_module.Commands.fetch
    calls = 0

    async def interrupted(self: commands_module.Commands, query: object, **values: object) -> list[object]:
        nonlocal calls
        calls += (is_replay := query is commands_module._REPLAY)
        if is_replay and calls == 2:
            raise LedgerUnavailable("unreachable")
        return await inner(self, query, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(commands_module.Commands, "fetch", interrupted)
    response, broken = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    assert response.status_code == 503
    assert "after 1 event had become due" in broken.text
    response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("count", "3"))
    assert "2 events are due now. 1 event was skipped" in notice((await admin.follow(response))[1])
    assert {await world.status(each) for each in ids} == {Status.PENDING}


async def test_the_return_address_is_on_the_page(world: World, admin: Visitor) -> None:
    """After a replay, only an address of the page is followed, whatever the form has."""
    for back in ("https://evil.test", "//evil.test", "/admin/events\\@evil", "/admin/logout", ""):
        dead = await event(world, Status.DEAD)
        _, page = await admin.get(f"/admin/events/{dead}")
        _, page = await admin.submit(page.form("/admin/replay"))
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"), ("back", back))
        assert response.headers["location"] == "/admin/events"
