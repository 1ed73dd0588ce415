"""The admin page on a real ledger: sessions, rate limits, cross-site requests, and escaping."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from firstclaim import components as components_module
from firstclaim.admin import session as sessions
from firstclaim.admin.page import AdminPage
from firstclaim.operations import search
from firstclaim.status import Status
from firstclaim.web.application import Application
from firstclaim.web.health import Finding, Health, HealthCheck
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, build, delivery, until
from tests.pages import ADDRESS, HASHED, ON, PASSWORD, Visitor, checked, logging_as_served, site_of, visitor
from tests.proxy import Mode, before_postgres
from tests.stores import Stores

XSS = "<img src=x onerror=alert(1)>'\"&<script>alert(2)</script>"


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """With the page switched on."""
    return await make_world(**ON)


@pytest.fixture
def site(world: World) -> Starlette:
    return site_of(world)


@pytest.fixture
async def stranger(site: Starlette) -> AsyncIterator[Visitor]:
    """Not logged in."""
    visitor_ = visitor(site)
    async with visitor_.client:
        yield visitor_


@pytest.fixture
async def admin(stranger: Visitor) -> Visitor:
    """Logged in."""
    assert (await stranger.log_in()).status_code == 303
    return stranger


def paths(site: Starlette) -> list[tuple[str, set[str]]]:
    """All paths of the page with their methods, with an event's id in place of the parameter."""
    inner = site.routes[0].app  # type: ignore[attr-defined]
    assert isinstance(inner, AdminPage)
    found = [route for route in inner._router.routes if isinstance(route, Route)]
    assert len(found) >= 10
    return [
        (
            route.path.replace("{event_id}", "evt_1").replace("{name}", "admin.css").replace("{action_id:int}", "1"),
            route.methods or set(),
        )
        for route in found
    ]


async def everything(world: World) -> str:
    """A digest of all rows of the ledger."""
    tables = (
        "firstclaim.stripe_events",
        "firstclaim.stripe_event_payloads",
        "firstclaim.stripe_event_attempts",
        "firstclaim.stripe_event_duplicates",
        "firstclaim.operator_actions",
        "firstclaim.ledger_epoch",
    )
    rows = [await world.database.fetch(f"SELECT t::text FROM {table} t ORDER BY 1") for table in tables]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


# -- sessions ---------------------------------------------------------------------------------------


async def test_every_path_needs_a_session(site: Starlette, stranger: Visitor, world: World) -> None:
    """Without a session, pages redirect to the login and forms are refused; login and static files are open."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    before = await everything(world)
    for path, methods in paths(site):
        if "GET" in methods:
            response, page = await stranger.get(path)
            is_open = path.startswith(("/admin/login", "/admin/static"))
            assert response.status_code == (200 if is_open else 303), path
            assert is_open or response.headers["location"].startswith("/admin/login?next=%2Fadmin"), path
            assert "evt_1" not in page.html
        if "POST" in methods and path != "/admin/login":
            response, page = await stranger.post(path, {"event": "evt_1", "token": "x"})
            assert response.status_code == 403, path
            assert "not logged in" in page.text
    assert await everything(world) == before


async def test_the_login_leads_to_the_requested_page(stranger: Visitor) -> None:
    """After the login, `next` is followed only to an address of the page, however another address is written."""
    response, _ = await stranger.get("/admin/events?status=dead&q=in_1")
    response = await stranger.log_in(path=response.headers["location"])
    assert response.headers["location"] == "/admin/events?status=dead&q=in_1"
    for evil in (
        "https://evil.test/",
        "//evil.test",
        "/\\evil.test",
        "/admin\\@evil",
        "/other",
        "/administer",
        "javascript:1",
    ):
        stranger.client.cookies.clear()
        response = await stranger.log_in(path=f"/admin/login?next={evil}")
        assert response.headers["location"] == "/admin", evil


async def test_a_wrong_password_is_refused(stranger: Visitor) -> None:
    """A wrong password is answered with 401 and no session, and what was typed is not on the page."""
    response = await stranger.log_in("not the passw0rd")
    assert response.status_code == 401
    assert "not the passw0rd" not in response.text
    assert "__Host-firstclaim-session" not in stranger.client.cookies
    assert (await stranger.get("/admin"))[0].status_code == 303


@pytest.mark.parametrize("value", [PASSWORD, HASHED], ids=["plain", "hash"])
async def test_the_setting_is_a_plain_value_or_a_hash(make_world: MakeWorld, value: str) -> None:
    """The password is accepted with either form of the setting; the hash itself is not accepted as a password."""
    app = site_of(await make_world(admin_password=SecretStr(value)))
    async with visitor(app).client as client:
        assert value == PASSWORD or (await Visitor(client).log_in(value)).status_code == 401
        assert (await Visitor(client).log_in()).status_code == 303


async def test_every_login_starts_a_new_session(stranger: Visitor) -> None:
    """A session value that was in the browser before the login is not used, so it cannot be planted."""
    stranger.client.cookies.set("__Host-firstclaim-session", "planted", domain="admin.test", path="/")
    seen = set()
    for _ in range(3):
        await stranger.log_in()
        seen.add(stranger.client.cookies["__Host-firstclaim-session"])
        _, page = await stranger.get("/admin")
        await stranger.submit(page.form("/admin/logout"))
    assert len(seen) == 3
    assert "planted" not in seen


async def test_the_logout_deletes_the_session(admin: Visitor) -> None:
    """After the logout form the browser has no session cookie, and the page needs a login."""
    _, page = await admin.get("/admin")
    response, _ = await admin.submit(page.form("/admin/logout"))
    assert response.headers["location"] == "/admin/login"
    assert not [name for name in admin.client.cookies if "session" in name]
    assert (await admin.get("/admin"))[0].status_code == 303


async def test_a_new_password_ends_every_session(world: World, admin: Visitor, make_world: MakeWorld) -> None:
    """A new password invalidates all sessions; another worker with the same password accepts them."""
    async with visitor(site_of(await make_world(**ON))).client as same_one:
        same_one.cookies.update(admin.client.cookies)
        assert (await Visitor(same_one).get("/admin"))[0].status_code == 200
    async with visitor(site_of(await make_world(admin_password=SecretStr("another good password")))).client as other:
        other.cookies.update(admin.client.cookies)
        assert (await Visitor(other).get("/admin"))[0].status_code == 303


@pytest.mark.parametrize("what", ["idle", "old", "meddled"])
async def test_a_session_that_is_not_valid(admin: Visitor, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A session that is idle, old or tampered with leads to the login, and its forms change nothing."""
    _, page = await admin.get("/admin")
    if what == "meddled":
        name = "__Host-firstclaim-session"
        value = admin.client.cookies[name]
        admin.client.cookies.set(name, value[:9] + ("A" if value[9] != "A" else "B") + value[10:], "admin.test", "/")
    else:
        monkeypatch.setattr(sessions, "IDLE_SECONDS" if what == "idle" else "LASTS_SECONDS", -1)
    assert (await admin.get("/admin"))[0].status_code == 303
    assert (await admin.submit(page.form("/admin/logout")))[0].status_code == 403


async def test_a_session_is_renewed_while_it_is_used(admin: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The renewed cookie has all its flags, and the session keeps its CSRF token."""
    monkeypatch.setattr(sessions, "_RENEWED_SECONDS", -1)
    _, before = await admin.get("/admin")
    response, after = await admin.get("/admin")
    [cookie] = response.headers.get_list("set-cookie")
    assert cookie.startswith("__Host-firstclaim-session=")
    assert "Max-Age=28800" in cookie
    assert before.form("/admin/logout").token == after.form("/admin/logout").token


async def test_a_loopback_host_works_without_tls(site: Starlette) -> None:
    """With a loopback host, the cookie needs no TLS and has another name; with any other host it is for TLS only."""
    async with visitor(site, origin="http://127.0.0.1:8000").client as client:
        assert (await Visitor(client).log_in()).status_code == 303
        assert (await Visitor(client).get("/admin"))[0].status_code == 200
    async with visitor(site, origin="http://admin.internal:8000").client as client:
        response = await Visitor(client).log_in()  # as in a browser, the cookie is not sent
        assert response.status_code == 403
        assert "__Host-" in (await Visitor(client).get("/admin/login"))[0].headers["set-cookie"]


# -- rate limits -----------------------------------------------------------------------------------------


async def test_guessing_is_limited(site: Starlette, stranger: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """After five wrong attempts an address must wait, also with the right password, and none is compared."""
    looked = 0

    async def count(function: Any, *arguments: Any) -> Any:
        nonlocal looked
        looked += 1
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", count)
    for _ in range(5):
        assert (await stranger.log_in("wrong password")).status_code == 401
    for _ in range(3):
        response = await stranger.log_in()
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert looked == 5
    async with visitor(site, "198.51.100.7").client as client:
        assert (await Visitor(client).log_in()).status_code == 303


async def test_concurrent_attempts_are_limited(stranger: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts are counted before the password is compared, and passwords are compared one at a time."""
    running = most = 0

    async def slowly(_function: Any, *_arguments: Any) -> bool:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return False

    monkeypatch.setattr(asyncio, "to_thread", slowly)
    _, page = await stranger.get("/admin/login")
    form = page.form("/admin/login")
    answers = await asyncio.gather(*(stranger.submit(form, ("password", f"guess {n}")) for n in range(12)))
    assert sorted(response.status_code for response, _ in answers) == [401] * 5 + [429] * 7
    assert most == 1


async def test_behind_a_proxy_its_client_is_limited(make_world: MakeWorld) -> None:
    """The limit applies to the entry that the proxy wrote, whatever the client wrote before it."""
    app = site_of(await make_world(**ON, admin_proxies=1))
    async with visitor(app, "10.0.0.1").client as client:
        for n in range(5):
            client.headers["X-Forwarded-For"] = f"6.6.6.{n}, 192.0.2.1"
            assert (await Visitor(client).log_in("wrong password")).status_code == 401
        assert (await Visitor(client).log_in()).status_code == 429
        client.headers["X-Forwarded-For"] = "192.0.2.2"
        assert (await Visitor(client).log_in()).status_code == 303


# -- cross-site requests ------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", "x" * 64, "another's"])
async def test_every_change_needs_the_session_s_token(
    site: Starlette, admin: Visitor, world: World, token: str | None
) -> None:
    """Without the session's CSRF token, or with another one, every form is refused and nothing changes."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    before = await everything(world)
    fields = {"event": "evt_1", "password": PASSWORD, "confirmation": "x"}
    if token == "another's":
        async with visitor(site).client as client:
            await Visitor(client).log_in()
            _, page = await Visitor(client).get("/admin")
            fields["token"] = page.form("/admin/logout").token
    elif token is not None:
        fields["token"] = token
    for path, methods in paths(site):
        if "POST" in methods:
            response, page = await admin.post(path, fields)
            assert response.status_code == 403, path
    assert await everything(world) == before
    assert (await admin.get("/admin"))[0].status_code == 200  # the session still exists


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.test"},
        {"Origin": "null"},
        {"Origin": "http://admin.test"},
        {"Origin": "https://admin.test.evil.test"},
        {"Origin": "https://[", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_a_cross_site_form_is_refused(admin: Visitor, headers: dict[str, str]) -> None:
    """A form from another site, a sibling domain or the same host without TLS is refused, even with the right token."""
    _, page = await admin.get("/admin")
    form = page.form("/admin/logout")
    assert (await admin.post(form.action, form.fields, **headers))[0].status_code == 403
    assert (await admin.get("/admin"))[0].status_code == 200


async def test_the_login_form_needs_its_cookie_and_token(site: Starlette, stranger: Visitor) -> None:
    """Without the login page's cookie or with another token, the login is refused and no attempt is counted."""
    _, page = await stranger.get("/admin/login")
    form = page.form("/admin/login")
    fields = {**dict(form.fields), "password": PASSWORD}
    for _ in range(7):
        assert (await stranger.post("/admin/login", {**fields, "token": "x" * 32}))[0].status_code == 403
        async with visitor(site).client as client:
            assert (await Visitor(client).post("/admin/login", fields))[0].status_code == 403
    assert (await stranger.post("/admin/login", fields))[0].status_code == 303


async def test_a_link_from_another_site_works(admin: Visitor) -> None:
    """For a request without the Strict cookie, a page of ours repeats it, so that the browser sends the cookie."""
    cookies = dict(admin.client.cookies)
    admin.client.cookies.clear()
    response, page = await admin.get("/admin/events?q=<x>", Sec_Fetch_Site="cross-site")
    assert response.status_code == 200
    [refresh] = [given["content"] for tag, given in page.tags if tag == "meta" and "http-equiv" in given]
    assert refresh == "0; url=/admin/events?q=%3Cx%3E"
    for name, value in cookies.items():
        admin.client.cookies.set(name, value, "admin.test", "/")
    assert (await admin.get("/admin/events?q=x", Sec_Fetch_Site="same-origin"))[0].status_code == 200


async def test_get_changes_nothing(site: Starlette, admin: Visitor, world: World) -> None:
    """GET on every route, with all the parameters of its form, changes nothing; form routes refuse GET."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    before = await everything(world)
    _, page = await admin.get("/admin")
    token = page.form("/admin/logout").token
    methods: dict[str, set[str]] = {}
    for path, more in paths(site):
        methods.setdefault(path, set()).update(more)
    for path, allowed in methods.items():
        response, _ = await admin.get(
            f"{path}?event=evt_1&id=evt_1&all=yes&token={token}&payload=1&count=1&confirmed=1"
        )
        if "GET" not in allowed:
            assert response.status_code == 405, path
            assert response.headers["allow"] == "POST"
        head = await admin.client.head(path)
        assert head.status_code == response.status_code
    assert await everything(world) == before
    assert (await admin.get("/admin"))[0].status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods_are_refused(site: Starlette, admin: Visitor, method: str) -> None:
    """Any other method is answered with 405, with the headers of every response."""
    for path, _ in paths(site):
        response, _ = checked(await admin.client.request(method, path))
        assert response.status_code == 405, path


@pytest.mark.parametrize(
    "path", ["/admin/nothing", "/admin//", "/admin/static/../site.py", "/admin/static/x", "/admin/%00"]
)
async def test_unknown_paths(admin: Visitor, path: str) -> None:
    """An unknown path is answered with 404, with all headers; no folder and no module can be read."""
    response, page = await admin.get(path)
    assert response.status_code == 404
    assert "This address does not exist" in page.text


@pytest.mark.parametrize("path", ["/admin/events/%00", "/admin/event%73", "/admin/events/evt%5F1"])
async def test_a_path_in_another_spelling_is_the_pages_404(site: Starlette, world: World, path: str) -> None:
    """The page answers it, with its own headers, and shows nothing that the path as it is written would show."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    async with visitor(Application({}, site.routes, None)).client as client:
        admin = Visitor(client)
        await admin.log_in()
        response, page = await admin.get(path)
    assert (response.status_code, "Not Found" in page.text) == (404, True)
    assert "evt_1" not in page.html


async def test_a_filter_that_cannot_be_read_is_named(admin: Visitor, world: World) -> None:
    """The list is shown without it and says so; a replay of all that match is refused, as it would replay more."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    _, page = await admin.get("/admin/events?since=yesterday&status=dead&status=deed&until=2026-01-01")
    assert "no valid value for status, since: the list is shown without." in page.text
    _, page = await admin.get("/admin/events?since=2026-01-01T00:00:00&status=dead")
    assert "no valid value" not in page.text
    form = page.form("/admin/replay")
    form.fields = [(name, "yesterday" if name == "since" else value) for name, value in form.fields]
    response, page = await admin.submit(form, ("all", "yes"))
    assert response.status_code == 400
    assert "There is no valid value for since: more events would be replayed" in page.text


async def test_malformed_forms(admin: Visitor) -> None:
    """A form that is too large, has too many fields or cannot be parsed is refused without reading all of it."""
    _, page = await admin.get("/admin")
    token = page.form("/admin/logout").token
    for path, size in (("/admin/replay", 600_000), ("/admin/login", 9_000)):
        response, _ = await admin.post(path, {"token": token, "x": "y" * size})
        assert response.status_code == 413, path
    assert (await admin.post("/admin/replay", [("event", "x")] * 2000))[0].status_code == 400
    assert (await admin.post("/admin/replay", {"token": token}, Content_Type="application/json"))[0].status_code == 415
    broken = {"Content-Type": "application/x-www-form-urlencoded"}
    for content in (b"\xff=1", b"a=%ff", b"\x00"):
        response, _ = checked(await admin.client.post("/admin/replay", content=content, headers=broken))
        assert response.status_code in (400, 403)

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    response, _ = checked(await admin.client.post("/admin/payload", content=endless(), headers=broken))
    assert response.status_code == 413


@pytest.mark.parametrize("host", ["[", "a b", "x" * 5000, "%00", "é".encode(), ""])
async def test_a_malformed_host_breaks_nothing(site: Starlette, host: str | bytes) -> None:
    """Any value of the header Host is accepted, and makes the cookie for TLS only."""
    async with visitor(site).client as client:
        response, _ = checked(
            await client.get("/admin/login", headers=[(b"Host", host if isinstance(host, bytes) else host.encode())])
        )
        assert response.status_code == 200
        assert "; Secure" in response.headers["set-cookie"]


# -- escaping ------------------------------------------------------------------------


async def test_data_is_rendered_as_text(world: World, admin: Visitor) -> None:
    """Markup in any column, in the payload or in a search is text on every page (see `Page`)."""
    given = delivery("evt_1", account=XSS, data={"object": {"id": XSS, "customer": XSS, "metadata": {XSS: XSS}}})
    await world.state_of(given, Status.DEAD)
    await world.change("evt_1", last_error=XSS, type=XSS, api_version=XSS, action=XSS, claimed_by=XSS, claimed_at=-1.0)
    await world.database.execute(
        "INSERT INTO firstclaim.stripe_event_attempts VALUES ('evt_1', 1, 'failed', $1, now(), now(), $1)", XSS
    )
    await world.database.execute(
        "INSERT INTO firstclaim.operator_actions (at, operator, action, selection) VALUES (now(), $1, $1, 'evt_1')", XSS
    )
    pages = [(await admin.get(path))[1] for path in ("/admin", "/admin/events", "/admin/events/evt_1")]
    shown = pages[-1]
    pages.append((await admin.submit(shown.form("/admin/payload")))[1])
    pages.append((await admin.submit(shown.form("/admin/replay")))[1])
    for page in pages[:4]:
        assert "<img src=x onerror=alert(1)>" in page.text  # as text
    quoted = httpx.QueryParams(
        {"q": XSS, "type": XSS, "account": XSS, "age": XSS, "status": XSS, "from": XSS, "select": XSS}
    )
    response, page = await admin.get(f"/admin/events?{quoted}")
    assert response.status_code == 200
    assert ("value", XSS) in [pair for tag, given in page.tags if tag == "input" for pair in given.items()]
    assert (await admin.get(f"/admin/events?{httpx.QueryParams({'q': XSS, 'account': XSS, 'from': XSS})}"))[1].text
    for page in (*pages, (await admin.get(f"/admin/events/{XSS.replace('/', '')}"))[1]):
        assert [given["src"] for tag, given in page.tags if tag == "img"] == ["/admin/static/icon.svg"]


async def test_a_payload_is_shown_only_by_its_form(
    world: World, admin: Visitor, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other page shows any of the payload; a view is logged with the event's id, without the payload."""
    given = delivery("evt_1", data={"object": {"customer": "cus_c4n4ry", "amount": 1.10, "note": "<b>\u202e</b>"}})
    await world.state_of(given, Status.COMPLETED)
    for path in ("/admin", "/admin/events", "/admin/events/evt_1", "/admin/events?q=in_1"):
        assert "cus_c4n4ry" not in (await admin.get(path))[1].html
    _, page = await admin.get("/admin/events/evt_1")
    with logging_as_served():
        response, payload = await admin.submit(page.form("/admin/payload"))
    assert response.status_code == 200
    for words in ('"cus_c4n4ry"', "<b>\\u202e</b>", "personal data"):
        assert words in payload.text
    said = capsys.readouterr().err
    assert '"event_id":"evt_1"' in said
    assert "admin_payload_shown" in said
    assert ADDRESS in said
    assert "c4n4ry" not in said
    await world.database.execute("DELETE FROM firstclaim.stripe_event_payloads")
    assert "pruned" in (await admin.submit(page.form("/admin/payload")))[1].text
    assert (await admin.submit(page.form("/admin/payload"), ("event", "evt_unknown")))[0].status_code == 404


async def test_logins_are_logged_without_what_was_typed(
    world: World, stranger: Visitor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failed, limited and successful logins are logged with the address, without what was typed."""
    async with visitor(site_of(world)).client as client:
        with logging_as_served():
            for _ in range(5):
                await stranger.log_in("c4n4ry-guess-1")
            await stranger.log_in("c4n4ry-guess-2")
            await Visitor(client).log_in()
    said = capsys.readouterr().err
    assert said.count('"admin_login_failed"') == 5
    assert said.count('"admin_login_limited"') == 1
    assert said.count('"admin_login"') == 1
    assert ADDRESS in said
    assert "c4n4ry" not in said
    assert PASSWORD not in said


# -- the pages ----------------------------------------------------------------------------------------


async def test_the_overview(world: World) -> None:
    """It has counts, due events, the chart with its table, the components, and the process."""
    for status in Status:
        await world.state_of(delivery(), status)
    late = await world.state_of(delivery("evt_late"), Status.FAILED)
    await world.change(late.event.id, due_at=-7200.0)

    async def found() -> Finding:
        return Finding(Health.DEGRADED, "refused <b>")

    async with visitor(site_of(world, [HealthCheck("redis", found)])).client as client:
        await Visitor(client).log_in()
        _, page = await Visitor(client).get("/admin")
    for words in (
        "7 events, a bar for 30 min",
        "due for 2 h",
        "redis is degraded: refused <b>.",
        "since it started",
    ):
        assert words in page.html.replace("&lt;", "<").replace("&gt;", ">") or words in page.text, words
    assert f"served by {world.ledger._process}" in page.text
    tiles = [given["href"] for tag, given in page.tags if tag == "a" and "tile" in (given.get("class") or "")]
    assert tiles == [f"/admin/events?status={each}" for each in Status]
    assert len([tag for tag, given in page.tags if tag == "rect" and "segment" in (given.get("class") or "")]) == 6


async def test_the_list_is_filtered_and_paged(world: World, admin: Visitor) -> None:
    """Status, type, account, age and id filter the list together, and its pages have no gap."""
    for number in range(60):
        given = await world.state_of(delivery(f"evt_{number:02}"), Status.COMPLETED)
        await world.change(given.event.id, received_at=-float(number))
    await world.change("evt_08", endpoint="connect")
    await world.change("evt_07", account="acct_1", type="charge.refunded", object_id="ch_1", received_at=-7200.0)
    _, page = await admin.get("/admin/events")
    first = [link for link in page.links if link.startswith("/admin/events/")]
    assert len(first) == 50
    [older] = {link for link in page.links if "from=" in link and "select" not in link}
    _, page = await admin.get(older)
    assert sorted({*first, *(link for link in page.links if link.startswith("/admin/events/"))}) == [
        f"/admin/events/evt_{number:02}" for number in range(60)
    ]
    for filters, number in (
        ("q=evt_07", 1),
        ("q=ch_1", 1),
        ("type=charge.*", 1),
        ("account=acct_1&status=completed&status=dead", 1),
        ("account=acct_1&status=dead", 0),
        ("endpoint=connect", 1),
        ("endpoint=connect&q=evt_07", 0),
        ("endpoint=-&q=evt_07", 1),
        ("endpoint=other", 0),
        ("age=1h", 50),
        ("age=24h&type=charge.refunded", 1),
        ("age=over-1d", 0),
        ("q=%20evt_07%20", 1),
    ):
        _, page = await admin.get(f"/admin/events?{filters}")
        assert len([link for link in page.links if link.startswith("/admin/events/")]) == number, filters
        assert number or "No event matches" in page.text
    assert (await admin.get("/admin/events?q=" + "x" * 300))[0].status_code == 400
    assert (await admin.get("/admin/events?q=%00"))[0].status_code == 400


async def test_one_event_has_a_timeline(world: World, admin: Visitor) -> None:
    """The timeline is in order: received, attempts that failed and their process, and when it is due next."""
    given = await world.state_of(delivery("evt_1"), Status.FAILED)
    await world.change(given.event.id, received_at=-60.0, due_at=90.0)
    await world.database.execute(
        """
        INSERT INTO firstclaim.stripe_event_attempts VALUES
            ('evt_1', 1, 'failed', 'web-1:7', now() - interval '50 s', now() - interval '40 s',
                E'ValueError: no\\nshop/handlers.py:3 in grant'),
            ('evt_1', 2, 'abandoned', NULL, NULL, now() - interval '30 s', 'vanished')
        """
    )
    _, page = await admin.get("/admin/events/evt_1")
    entries = [
        "received",
        "attempt 1 on web-1:7: failed after 10.00 s: ValueError: no",
        "shop/handlers.py:3 in grant",
        "attempt 2: abandoned: vanished",
        "due in",
    ]
    places = [page.text.index(text) for text in entries]
    assert places == sorted(places)
    assert "Duplicates 0 A duplicate is" in page.text
    assert "No headers of the first delivery are kept" in page.text
    response, page = await admin.get("/admin/events/evt_unknown")
    assert response.status_code == 404
    assert "ledger does not have the event" in page.text


async def test_one_event_has_its_deliveries(world: World, admin: Visitor) -> None:
    """The duplicates with the time of the last one, and the first delivery's headers, as text."""
    given = delivery("evt_1")
    given.headers = [(b"user-agent", b"Stripe/1.0 <b>"), (b"stripe-signature", b"t=1700000000,v1=abcdef")]
    await world.state_of(given, Status.COMPLETED)
    await world.database.execute(
        "INSERT INTO firstclaim.stripe_event_duplicates VALUES ('evt_1', 1234, now() - interval '7 minutes')"
    )
    _, page = await admin.get("/admin/events/evt_1")
    assert re.search(r"Duplicates 1 234, last \d{4}-\d\d-\d\d \d\d:\d\d:\d\d 7 min ago", page.text)
    assert "First delivery user-agent: Stripe/1.0 <b> stripe-signature: t=1700000000 A duplicate" in page.text
    assert "abcdef" not in page.html


# -- a ledger that is slow or unreachable ------------------------------------------------------------------


async def test_a_slow_search_is_stopped(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow search gets an error page, deliveries go on meanwhile, and a third request is told that all are busy."""
    monkeypatch.setattr(components_module, "PINS", {**search.PINS, "statement_timeout": "1500ms"})
    monkeypatch.setattr(components_module, "QUEUE_SECONDS", 0.2)
    page_sql = search._PAGE.sql
    slow = f"SELECT x.* FROM (SELECT pg_sleep(60)::text AS slept) s, LATERAL ({page_sql}) x WHERE s.slept IS NOT NULL"
    world = await make_world({"*": _handled}, **ON)
    async with visitor(site_of(world)).client as client:
        admin = Visitor(client)
        await admin.log_in()
        await admin.get("/admin/events/evt_0")  # connects
        monkeypatch.setattr(search, "_PAGE", replace(search._PAGE, sql=slow))
        heavy = [asyncio.create_task(admin.get("/admin/events")) for _ in range(2)]
        await asyncio.sleep(0.3)
        third = asyncio.create_task(admin.get("/admin/events"))
        meanwhile = 0
        for _ in range(20):
            assert (await world.pipeline.deliver(delivery())).action == "handled"
            meanwhile += not any(task.done() for task in heavy)
        assert meanwhile  # on a busy machine, not all twenty
        response, page = await third
        assert response.status_code == 503
        assert "all connections of this page are busy" in page.text
        assert response.headers["retry-after"]
        for response, page in await asyncio.gather(*heavy):
            assert response.status_code == 503
            assert "The query took too long" in page.text
            assert "Narrow it" in page.text
        response, page = await admin.get("/admin")  # quick queries are shown, slow ones are reported
        assert response.status_code == 200
        assert "Due now" in page.text


async def _handled(_event: object, _context: object) -> str:
    return "handled"


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.FROZEN])
async def test_postgres_is_unreachable(module_database: str, stores: Stores, redis_prefix: str, mode: Mode) -> None:
    """The overview shows the rest, other pages are 503 with a reason, and the session is valid afterwards."""
    async with before_postgres(module_database) as (proxy, url):
        world = await build(url, stores.redis_url, redis_prefix, **ON, postgres_timeout_seconds=1.5)
        async with visitor(site_of(world)).client as client:
            admin = Visitor(client)
            await admin.log_in()
            assert (await admin.get("/admin/events"))[0].status_code == 200
            proxy.switch(mode)
            began = time.monotonic()
            response, page = await admin.get("/admin")
            assert response.status_code == 200
            assert "The ledger cannot be read" in page.text
            for path in ("/admin/events", "/admin/events/evt_1"):
                response, page = await admin.get(path)
                assert response.status_code == 503
                assert "still logged in" in page.text
                assert "Traceback" not in page.html
                assert "Error" not in page.text
            assert time.monotonic() - began < 20  # for three pages, on a busy machine
            proxy.switch(Mode.OPEN)

            async def back() -> bool:  # as soon as Postgres has told which of the lost connections it no longer has
                return (await admin.get("/admin/events"))[0].status_code == 200

            await until(back)
        await world.close()


async def test_an_internal_error_is_not_shown(
    world: World, admin: Visitor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the response nor the log has the text of an internal error; the log has its type and place."""

    async def broken(*_: object) -> None:
        raise RuntimeError("c4n4ry of a payload")

    monkeypatch.setattr(search.LedgerSearch, "page", broken)
    with logging_as_served():
        response, page = await admin.get("/admin/events")
    assert response.status_code == 500
    assert "This page failed" in page.text
    said = capsys.readouterr().err
    assert "RuntimeError at tests/integration/test_admin.py" in said
    assert "c4n4ry" not in said + response.text


# -- below a prefix -----------------------------------------------------------------------------------


def _with_root_path(site: Starlette) -> Starlette:
    return Application({}, site.routes, None, root_path="/pay")


def _mounted(site: Starlette) -> Starlette:
    application = Application({}, site.routes, None)
    return Starlette(routes=[Mount("/pay", application)])


@pytest.mark.parametrize(
    ("place", "sent"),
    [(_with_root_path, "/pay"), (_with_root_path, ""), (_mounted, "/pay")],
    ids=["passed on", "stripped", "mounted"],
)
async def test_the_page_works_below_a_prefix(
    site: Starlette, world: World, place: Callable[[Starlette], Starlette], sent: str
) -> None:
    """Every address of the page has the prefix: links, forms, redirects and static files; `sent` is what arrives."""
    await world.state_of(delivery("evt_prefixed"), Status.DEAD)
    browser = visitor(place(site))

    def arriving(address: str) -> str:
        """The address as the proxy passes it on."""
        assert address.startswith("/pay/admin")
        return sent + address.removeprefix("/pay")

    async with browser.client:
        response, _ = await browser.get(sent + "/admin/events/?status=dead")
        assert response.headers["location"] == "/pay/admin/login?next=%2Fpay%2Fadmin%2Fevents%3Fstatus%3Ddead"
        _, page = await browser.get(arriving(response.headers["location"]))
        form = page.form("/pay/admin/login")
        response, _ = await browser.post(arriving(form.action), [*form.fields[:-1], ("password", PASSWORD)])
        assert response.headers["location"] == "/pay/admin/events?status=dead"
        assert all("session-" in name or "login-" in name for name in browser.client.cookies)
        _, page = await browser.get(arriving(response.headers["location"]))
        assert "/pay/admin/events/evt_prefixed" in page.links
        assert 'href="/pay/admin/events" aria-current="page"' in page.html
        _, page = await browser.get(arriving("/pay/admin/events/evt_prefixed"))
        form = page.form("/pay/admin/replay")
        _, page = await browser.post(arriving(form.action), [*form.fields, *form.buttons])
        form = page.form("/pay/admin/replay/confirmed")
        response, _ = await browser.post(arriving(form.action), form.fields)
        assert response.headers["location"] == "/pay/admin/events/evt_prefixed"
        assert (await world.row("evt_prefixed"))["status"] == "pending"
        response, _ = await browser.get(arriving("/pay/admin/static/admin.css"))
        assert response.status_code == 200


def test_services_on_one_host_do_not_share_cookies() -> None:
    """The cookie's name differs with the prefix, because with `__Host-` its path must be the whole host."""
    names = {sessions.Cookie("session", True, prefix).full_name for prefix in ("", "/pay", "/shop")}
    assert len(names) == 3
    assert all(name.startswith("__Host-firstclaim-session") for name in names)
