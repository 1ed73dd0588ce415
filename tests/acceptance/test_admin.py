"""The admin page of real processes: off by default, one page for several workers, and no effect on deliveries."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import orjson

from firstclaim.status import Status
from firstclaim.web.webhook import WEBHOOK_PATH
from tests.acceptance.harness import PROCESSED, Overrides, Sandbox, Service, eventually, sample
from tests.acceptance.test_events_command import dead_event
from tests.canaries import EMAIL, TEXT, assert_silent, metadata
from tests.pages import HASHED, PASSWORD, Visitor

ON: Overrides = {"admin_password": HASHED, "log_level": "debug"}


@asynccontextmanager
async def at(service: Service) -> AsyncIterator[Visitor]:
    """A browser on the service's machine; each request has its own connection, so that any worker answers."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{service.port}", trust_env=False, limits=limits, timeout=60
    ) as client:
        yield Visitor(client)


async def test_it_is_off_by_default(sandbox: Sandbox) -> None:
    """Without a password the page's paths are answered like any unknown path."""
    service = await sandbox.service().start()
    for method, path in (
        ("GET", "/admin"),
        ("GET", "/admin/login"),
        ("POST", "/admin/login"),
        ("GET", "/admin/static/x"),
    ):
        response = await service.request(method, path)
        assert response.status_code == 404, path
        assert response.json() == {
            "event_id": None,
            "processed": False,
            "action": "rejected",
            "reason": f"No such path: webhooks go to POST {WEBHOOK_PATH}",
        }
        assert "set-cookie" not in response.headers


async def test_several_workers_are_one_page(sandbox: Sandbox, tmp_path: Path) -> None:
    """A session is valid at every worker and after a restart, and any worker completes a replayed event."""
    service = await sandbox.service(ON, workers=2).start()
    fixed = tmp_path / "fixed"
    event = await dead_event(sandbox, service, fixed)
    async with at(service) as admin:
        assert (await admin.log_in()).status_code == 303
        processes = set()
        for _ in range(30):
            response, page = await admin.get("/admin")
            assert response.status_code == 200
            [process] = re.findall(r"served by (\S+)", page.text)
            processes.add(process)
        assert len(processes) == 2
        fixed.touch()
        _, page = await admin.get(f"/admin/events/{event.id}")
        _, page = await admin.submit(page.form("/admin/replay"))
        response, _ = await admin.submit(page.form("/admin/replay/confirmed"))
        assert "1 event is due now." in (await admin.follow(response))[1].text
        await sandbox.settled(event)
        _, page = await admin.get(f"/admin/events/{event.id}")
        assert "completed" in page.text
        assert "replay by admin page from 127.0.0.1" in page.text
        cookies = dict(admin.client.cookies)
    await service.stop()
    await service.start()
    async with at(service) as admin:
        admin.client.cookies.update(cookies)
        assert (await admin.get("/admin"))[0].status_code == 200
    [(operator, changed)] = await sandbox.fetch("SELECT operator, changed FROM firstclaim.operator_actions")
    assert (operator, changed) == ("admin page from 127.0.0.1", 1)


async def test_nothing_of_a_payload_or_a_password_is_logged(sandbox: Sandbox) -> None:
    """At log level debug, nothing that is done on the page logs a payload or a password."""
    service = await sandbox.service(ON).start()
    event = sample("permanent", **metadata())
    await sandbox.deliver(service, event)
    async with at(service) as admin:
        await admin.log_in(f"{TEXT} is not it")
        await admin.log_in()
        for path in ("/admin", "/admin/events", f"/admin/events?q={event.id}", f"/admin/events/{event.id}"):
            response, page = await admin.get(path)
            assert_silent(response.text)
        _, payload = await admin.submit(page.form("/admin/payload"))
        assert EMAIL in payload.text
        _, page = await admin.submit(page.form("/admin/replay"))
        await admin.submit(page.form("/admin/replay/confirmed"))
        await admin.get(f"/admin/events?q={TEXT}&type={EMAIL}")
        await admin.submit(page.form("/admin/logout"))
    await service.stop()  # its last lines are written
    said = service.output
    for words in ("admin_login_failed", "admin_login", "admin_payload_shown", "admin_replay", "admin_logout"):
        assert f'"event":"{words}"' in said
    assert_silent(said)
    assert PASSWORD not in said
    assert HASHED not in said


async def test_the_page_does_not_disturb_deliveries(sandbox: Sandbox) -> None:
    """A form that is too large is refused, and deliveries go on beside requests to the page."""
    service = await sandbox.service(ON).start()
    async with at(service) as admin:
        await admin.log_in()
        _, page = await admin.get("/admin")
        token = page.form("/admin/logout").token
        response, page = await admin.post("/admin/replay", {"token": token, "x": "y" * 5_000_000})
        assert response.status_code == 413
        assert "The form is too large" in page.text
        events = [sample() for _ in range(20)]
        pages = asyncio.gather(*(admin.get("/admin") for _ in range(20)))
        for event in events:
            assert (await sandbox.deliver(service, event)).result == PROCESSED
        assert {response.status_code for response, _ in await pages} <= {200}
    response = await service.get("/readyz")
    assert {orjson.loads(line)["status"] for line in response.content.splitlines()} == {"ok"}


async def test_the_overview_counts_deliveries(sandbox: Sandbox) -> None:
    """The overview has the deliveries by outcome that `/metrics` has, and the ledger's events by status."""
    service = await sandbox.service(ON, workers=2).start()
    event = sample()
    for _ in range(3):
        await sandbox.deliver(service, event)
    await sandbox.deliver(service, sample("permanent"))
    async with at(service) as admin:
        await admin.log_in()

        async def said() -> str:
            return (await admin.get("/admin"))[1].text

        text = await eventually(said, lambda text: "processed 1 unhandled 0 duplicate 2" in text)
    assert "1 completed" in text
    assert f"1 {Status.DEAD}" in text
    assert "last good round" in text
