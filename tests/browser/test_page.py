"""The admin page in a real browser: an operator finds a failed event, replays it and sees it completed.

Guarantees: in a wide window, a smaller one and a phone's, light and dark, the console has no message, no other host
gets a request, no page is wider than its window, and axe finds nothing, where npm has installed it (`.ci/run` does).
Set `ADMIN_SCREENSHOTS` to a folder to get screenshots.
"""

import json
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import pytest
from playwright.async_api import ConsoleMessage, Page, Request, ViewportSize, async_playwright, expect

from tests.acceptance.harness import Sample, Sandbox, Service, sample
from tests.pages import HASHED, PASSWORD

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
WIDE: Final[ViewportSize] = {"width": 1440, "height": 900}
PHONE: Final[ViewportSize] = {"width": 390, "height": 844}
SIZES: Final[dict[str, ViewportSize]] = {"wide": WIDE, "middle": {"width": 1024, "height": 768}, "phone": PHONE}
AXE: Final = Path(".venv/axe/node_modules/axe-core/axe.min.js")
XSS: Final = "<img src=x onerror=document.title='taken'>"
PATIENCE_MS: Final = 30_000  # a busy machine with two cores
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(autouse=True)
def chromium() -> str:
    """Chromium's path. Without it the tests fail in CI, and are skipped elsewhere."""
    if CHROMIUM is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("not installed: chromium; run: apt-get install chromium")
    return str(CHROMIUM)


@dataclass
class Window:
    """A browser window on a service, and the problems in it."""

    page: Page
    origin: str
    name: str
    problems: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Collect console messages, errors, dialogs, and requests to other hosts."""
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", self._on_request)
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))

    async def go(self, path: str) -> None:
        await self.page.goto(self.origin + path)

    async def look(self, name: str) -> None:
        """Check that the page fits into its window and has one h1 and one main; take a screenshot."""
        await self.page.wait_for_load_state()  # a click returns before the stylesheet is loaded
        width = await self.page.evaluate("document.documentElement.scrollWidth")
        window = self.page.viewport_size
        assert window is not None
        assert width <= window["width"], f"{name} is {width} wide in a window of {window['width']}"
        assert await self.page.locator("h1").count() == 1
        assert await self.page.locator("main").count() == 1
        if folder := os.environ.get("ADMIN_SCREENSHOTS"):
            await self.page.screenshot(path=f"{folder}/{name}-{self.name}.png", full_page=True)
        if AXE.exists():
            await self.page.evaluate(AXE.read_text())
            found = await self.page.evaluate("axe.run()")
            self.problems += [
                f"{name}: {each['id']}: {node['html']} {node['failureSummary']}"
                for each in found["violations"]
                for node in each["nodes"]
            ]

    async def log_in(self) -> None:
        await self.page.get_by_label("Password").fill(PASSWORD)
        await self.page.get_by_role("button", name="Log in").click()
        await expect(self.page.get_by_role("button", name="Log out")).to_be_visible()

    def _on_console(self, message: ConsoleMessage) -> None:
        # The browser also reports a page with status 401 or 404 as a failed resource.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.origin).netloc:
            self.problems.append(f"request to {request.url}")


@pytest.fixture
async def served(sandbox: Sandbox) -> Service:
    """A service with the page switched on."""
    return await sandbox.service({"admin_password": HASHED}).start()


@pytest.fixture(
    params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")],
    ids="-".join,
)
async def window(request: pytest.FixtureRequest, chromium: str, served: Service) -> AsyncIterator[Window]:
    """One of six windows."""
    scheme: Literal["light", "dark"]
    size, scheme = request.param
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = await browser.new_context(viewport=SIZES[size], color_scheme=scheme, locale="en-GB")
        await context.grant_permissions(["clipboard-read", "clipboard-write"])
        window = Window(
            await context.new_page(),
            f"http://127.0.0.1:{served.port}",
            f"{size}-{scheme}",
        )
        window.watch()
        yield window
        await browser.close()
    assert window.problems == []


async def failed_event(sandbox: Sandbox, service: Service, fixed: Path) -> Sample:
    """An event whose handler fails until the file exists, and whose metadata has markup."""
    event = sample("permanent", fixed=str(fixed), note=XSS)
    assert (await sandbox.deliver(service, event)).content["action"] == "dead"
    return event


async def test_an_operator_replays_a_dead_event(
    window: Window, sandbox: Sandbox, served: Service, tmp_path: Path
) -> None:
    """An operator logs in, finds a dead event, views its payload, replays it, and sees it completed."""
    fixed = tmp_path / "fixed"
    event = await failed_event(sandbox, served, fixed)
    others = [await failed_event(sandbox, served, fixed) for _ in range(2)]
    for _ in range(12):
        await sandbox.deliver(served, sample())
    page = window.page

    await window.go(f"/admin/events?q={event.id}")
    await window.look("login")
    await page.get_by_label("Password").fill("wrong password")
    await page.get_by_role("button", name="Log in").click()
    await expect(page.get_by_role("alert")).to_have_text("The password is wrong.")
    await window.look("login-wrong")
    await window.log_in()
    await expect(page).to_have_url(f"{window.origin}/admin/events?q={event.id}")

    await page.get_by_role("link", name="Overview").click()
    await window.look("overview")
    await page.get_by_text("Show as a table").click()
    await expect(page.get_by_role("columnheader", name="From (UTC)")).to_be_visible()
    worst = "3 of 15 events of invoice.payment_failed in the last 24 hours have failed: Permanent: never"
    await expect(page.get_by_role("heading", name=worst)).to_be_visible()
    await page.get_by_role("link", name="7 d").click()
    await page.get_by_text("Own", exact=True).click()
    await window.look("overview-week")
    await page.get_by_role("link", name="Show all").click()
    await expect(page.get_by_role("rowheader")).to_have_count(3)
    await page.get_by_label("Event, object or customer id").fill(event.id)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("rowheader")).to_have_count(1)
    await window.look("events")
    await page.get_by_role("link", name=event.id).click()
    await expect(page.get_by_text("Permanent: never").first).to_be_visible()
    await window.look("event")

    await page.get_by_role("button", name="Show payload").click()
    await expect(page.get_by_label("Payload as JSON")).to_contain_text(XSS)
    await window.look("payload")
    assert await page.title() == f"Payload of {event.id} · firstclaim"
    await page.get_by_role("button", name="Copy").click()
    await expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = await page.evaluate("navigator.clipboard.readText()")
    assert json.loads(copied)["id"] == event.id
    await page.get_by_label("Payload as JSON").get_by_text('"object": {').first.click()
    await expect(page.get_by_label("Payload as JSON").get_by_text('"metadata": {').first).to_be_hidden()
    await page.get_by_role("link", name=event.id).click()

    fixed.touch()
    await page.get_by_role("button", name="Replay…").click()
    await expect(page.get_by_role("heading", name="Replay 1 event?")).to_be_visible()
    await window.look("replay")
    await page.get_by_role("button", name="Replay 1 event").click()
    await expect(page.get_by_role("status")).to_have_text("1 event is due now.")
    await window.look("replayed")
    await sandbox.settled(event)
    await page.get_by_role("link", name="Refresh").click()
    await expect(page.get_by_role("heading").locator(".pill")).to_have_text("completed")
    await expect(page.get_by_text("replay by admin page from 127.0.0.1")).to_be_visible()
    await window.look("completed")

    await window.go("/admin/events?status=dead")
    await page.get_by_role("link", name="Select all on this page").click()
    await window.look("selected")
    await page.get_by_role("button", name="Replay all 2 matching failed and dead events…").click()
    await page.get_by_label("Type 2 to confirm").fill("2")
    await window.look("replay-all")
    await page.get_by_role("button", name="Replay 2 events").click()
    await expect(page.get_by_role("status")).to_have_text("2 events are due now.")
    for other in others:
        await sandbox.settled(other)
    await expect(page.get_by_role("heading", name="All are handled")).to_be_visible()  # without a reload
    await window.look("progress")
    await page.get_by_role("link", name="Audit").first.click()
    await expect(page.get_by_role("rowheader")).to_have_count(2)
    await window.look("audit")

    await window.go(f"/admin/events/evt_{secrets.token_hex(4)}")
    await expect(page.get_by_role("heading", name="No such event")).to_be_visible()
    await window.look("error")
    await page.get_by_role("button", name="Log out").click()
    await window.go("/admin")
    await expect(page.get_by_label("Password")).to_be_visible()


async def test_the_page_refreshes_itself(window: Window, sandbox: Sandbox, served: Service, tmp_path: Path) -> None:
    """New events appear without a reload; ticked boxes, scroll, focus and selection stay; a pause fetches nothing."""
    fixed = tmp_path / "fixed"
    first = await failed_event(sandbox, served, fixed)
    for _ in range(30):
        await sandbox.deliver(served, sample())
    page = window.page
    await page.clock.install()
    await window.go("/admin/events")
    await window.log_in()
    await page.get_by_label(first.id).check()
    await page.get_by_label(first.id).scroll_into_view_if_needed()
    await page.evaluate("window.kept = true")
    seen_at = await page.get_by_label(first.id).bounding_box()
    second = await failed_event(sandbox, served, fixed)
    await page.clock.run_for(6000)
    await expect(page.get_by_label(second.id)).not_to_be_checked()
    await expect(page.get_by_label(first.id)).to_be_checked()
    await expect(page.get_by_label(first.id)).to_be_focused()
    assert await page.evaluate("window.kept")
    assert await page.get_by_label(first.id).bounding_box() == pytest.approx(
        seen_at, abs=40
    )  # although a row came above

    for _ in range(30):  # push it off the page
        await sandbox.deliver(served, sample())
    await page.clock.run_for(6000)
    await expect(page.get_by_role("rowheader")).to_have_count(51)
    await expect(page.get_by_label(first.id)).to_be_checked()

    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    await page.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
    await page.clock.run_for(60_000)
    await page.evaluate("getSelection().removeAllRanges()")
    await page.get_by_role("button", name="Pause").click()
    await expect(page.get_by_text("Paused")).to_be_visible()
    await page.clock.run_for(60_000)
    assert fetched == []
    await page.reload()
    await expect(page.get_by_text("Paused")).to_be_visible()
    third = await failed_event(sandbox, served, fixed)
    await page.get_by_role("button", name="Resume").click()
    await expect(page.get_by_label(third.id)).to_be_visible()
    await page.get_by_role("link", name="Overview").click()
    await page.get_by_text("Show as a table").click()
    await page.clock.run_for(6000)
    await expect(page.get_by_role("columnheader", name="From (UTC)")).to_be_visible()  # stays open

    await page.context.clear_cookies()
    await page.clock.run_for(6000)
    await expect(page.get_by_label("Password")).to_be_visible()  # the session has ended


async def test_the_page_works_with_the_keyboard(
    window: Window, sandbox: Sandbox, served: Service, tmp_path: Path
) -> None:
    """Login, skip link, visible focus and selection work with the keyboard."""
    event = await failed_event(sandbox, served, tmp_path / "fixed")
    page = window.page
    await window.go("/admin/events")
    await expect(page.get_by_label("Password")).to_be_focused()
    await page.keyboard.type(PASSWORD)
    await page.keyboard.press("Enter")
    await expect(page.get_by_label(event.id)).to_be_visible()
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    for _ in range(80):  # each part of an instant is a stop
        await page.keyboard.press("Tab")
        outline = await page.evaluate(
            "(e => getComputedStyle(e.closest('.chip') || e).outlineStyle)(document.activeElement)"
        )
        assert outline != "none", await page.evaluate("document.activeElement.outerHTML")
        if await page.get_by_label(event.id).evaluate("e => e === document.activeElement"):
            break
    await page.keyboard.press("Space")
    await expect(page.get_by_label(event.id)).to_be_checked()


async def test_the_page_works_without_javascript(chromium: str, served: Service) -> None:
    """Without JavaScript, a link on another site leads to its page, although its request has no Strict cookie."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = await browser.new_context(java_script_enabled=False, viewport=WIDE)
        page = await context.new_page()
        window = Window(page, f"http://127.0.0.1:{served.port}", "wide-light")
        await window.go("/admin")
        await window.log_in()
        for cookie in await context.cookies():
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        await page.goto("about:blank")
        await page.set_content(f'<a href="{window.origin}/admin/events?status=dead">an alert</a>')
        await page.get_by_role("link", name="an alert").click()
        await expect(page).to_have_url(f"{window.origin}/admin/events?status=dead")
        await expect(page.get_by_role("heading", name="Events")).to_be_visible()
        await browser.close()
