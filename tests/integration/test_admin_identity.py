"""Visitors whom a proxy names: which header counts, what each role may do, and what the audit says."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette

from firstclaim.admin.identity import ProxyLogin, Role
from firstclaim.errors import ConfigurationError
from firstclaim.settings import Settings
from firstclaim.status import Status
from tests.integration.conftest import MakeWorld
from tests.integration.world import World, delivery
from tests.pages import ON, Visitor, site_of, visitor

PROXY = "10.1.2.3"
NAMED = {
    "admin_user_header": "X-Forwarded-Email",
    "admin_user_proxies": ("10.1.2.0/24", "::1"),
    "admin_operators": ("ada@example.com",),
}


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    """With a proxy that names visitors."""
    return await make_world(**ON, **NAMED)


@pytest.fixture
def site(world: World) -> Starlette:
    return site_of(world)


@pytest.fixture
async def ada(site: Starlette) -> AsyncIterator[Visitor]:
    """An operator, through the proxy."""
    ada = visitor(site, PROXY)
    ada.client.headers["X-Forwarded-Email"] = "ada@example.com"
    async with ada.client:
        yield ada


@pytest.mark.parametrize(
    ("peer", "names", "user"),
    [
        ("10.1.2.3", ["ada"], "ada"),
        ("::1", [" ada "], "ada"),
        ("::ffff:10.1.2.3", ["ada"], "ada"),
        ("10.1.3.3", ["ada"], None),  # another host
        (None, ["ada"], None),  # no address: a socket of the file system
        ("testclient", ["ada"], None),
        ("10.1.2.3", [], None),
        ("10.1.2.3", ["ada", "bob"], None),
        ("10.1.2.3", [""], None),
        ("10.1.2.3", ["a\x00da"], None),
        ("10.1.2.3", ["a" * 256], None),
    ],
)
def test_whose_header_counts(peer: str | None, names: list[str], user: str | None) -> None:
    """Only one header, only from a proxy that is named, and only with what can be a name."""
    assert ProxyLogin("X-User", NAMED["admin_user_proxies"], ()).user(peer, names) == user
    assert ProxyLogin(None, NAMED["admin_user_proxies"], ()).user(peer, names) is None


def test_who_is_an_operator() -> None:
    """Those who are named, or everyone with `*`; nobody by default."""
    assert ProxyLogin("X-User", (), ("ada",)).role("ada") is Role.OPERATOR
    assert ProxyLogin("X-User", (), ("ada",)).role("adam") is Role.VIEWER
    assert ProxyLogin("X-User", (), ("*",)).role("bob") is Role.OPERATOR
    assert ProxyLogin("X-User", (), ()).role("ada") is Role.VIEWER


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"admin_user_header": "X-User"}, "needs FIRSTCLAIM_ADMIN_USER_PROXIES"),
        ({"admin_user_header": "X User", "admin_user_proxies": "::1"}, "FIRSTCLAIM_ADMIN_USER_HEADER: expected"),
        ({"admin_user_proxies": "10.0.0.5/8"}, "FIRSTCLAIM_ADMIN_USER_PROXIES: .* write 10.0.0.5 or 10.0.0.0/8"),
        ({"admin_user_proxies": "::1,0.0.0.0/0"}, "0.0.0.0/0 is not a network of proxies: whoever connects"),
        ({"admin_user_proxies": "::/0"}, "::/0 is not a network of proxies"),
        ({"admin_user_proxies": "::1"}, "FIRSTCLAIM_ADMIN_USER_PROXIES has no effect without"),
        ({"admin_operators": "*"}, "FIRSTCLAIM_ADMIN_OPERATORS has no effect without"),
        *(
            ({"admin_user_header": name, "admin_user_proxies": "::1"}, f"{name} has another meaning")
            for name in ("Host", "cookie", "X-Forwarded-For", "Stripe-Signature", "Content-Type", "Authorization")
        ),
        ({"admin_user_proxies": "proxy.internal"}, "FIRSTCLAIM_ADMIN_USER_PROXIES: expected addresses or networks"),
        (
            {"admin_user_header": "X-User", "admin_user_proxies": "::1", "admin_password": None},
            "needs FIRSTCLAIM_ADMIN_PASSWORD",
        ),
    ],
)
def test_a_header_needs_its_proxies(changes: dict[str, Any], fault: str) -> None:
    """A header that names nobody, or that anybody can send, and a setting without effect are refused, in words."""
    with pytest.raises(ConfigurationError, match=fault):
        Settings(**{"admin_password": SecretStr("correct horse battery"), **changes})


async def test_the_proxy_logs_in(ada: Visitor) -> None:
    """Whom the proxy names needs no login and no cookie; the page says who it is, and has no logout."""
    response, page = await ada.get("/admin")
    assert response.status_code == 200
    assert "ada@example.com" in page.text
    assert not page.has_form("/admin/logout")
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize("peer", ["203.0.113.9", "10.1.3.1"])
async def test_a_header_of_anyone_else_is_ignored(site: Starlette, peer: str) -> None:
    """A header that another peer sends names nobody, also with the proxy's address in X-Forwarded-For."""
    async with visitor(site, peer).client as client:
        client.headers.update({"X-Forwarded-Email": "ada@example.com", "X-Forwarded-For": PROXY})
        response, _ = await Visitor(client).get("/admin")
        assert response.status_code == 303
        assert response.headers["location"].startswith("/admin/login")
        response, _ = await Visitor(client).post("/admin/replay", {"event": "evt_1"})
        assert response.status_code == 403
        assert (await Visitor(client).log_in()).status_code == 303  # the password is still good
        assert (await Visitor(client).get("/admin"))[0].status_code == 200


async def test_the_audit_names_the_operator(world: World, ada: Visitor) -> None:
    """A replay by a named operator has the name in the audit, on the event's page and on the audit page."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    _, page = await ada.get("/admin/events/evt_1")
    _, page = await ada.submit(page.form("/admin/replay"))
    response, _ = await ada.submit(page.form("/admin/replay/confirmed"))
    assert response.status_code == 303
    operator = f"ada@example.com (admin page from {PROXY})"
    assert await world.database.fetchval("SELECT operator FROM firstclaim.operator_actions") == operator
    for path in ("/admin/events/evt_1", "/admin/audit"):
        assert operator in (await ada.get(path))[1].text


async def test_a_viewer_changes_nothing(world: World, site: Starlette, ada: Visitor) -> None:
    """A viewer reads everything, gets no form of a replay, and is refused with a form of an operator."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    _, page = await ada.get("/admin/events/evt_1")
    _, confirmation = await ada.submit(page.form("/admin/replay"))
    async with visitor(site, PROXY).client as client:
        client.headers["X-Forwarded-Email"] = "bob@example.com"
        bob = Visitor(client)
        for path in ("/admin", "/admin/events?status=dead", "/admin/events/evt_1", "/admin/audit"):
            response, page = await bob.get(path)
            assert response.status_code == 200
            assert "Replay" not in page.text
        token = page_token((await bob.get("/admin/events/evt_1"))[1].html)
        for path in ("/admin/replay", "/admin/replay/confirmed"):
            fields = {**dict(confirmation.form("/admin/replay/confirmed").fields), "token": token, "event": "evt_1"}
            response, page = await bob.post(path, fields)
            assert response.status_code == 403
            assert "You may only read" in page.text
        response, page = await bob.submit((await bob.get("/admin/events/evt_1"))[1].form("/admin/payload"))
        assert response.status_code == 200
    assert await world.status("evt_1") is Status.DEAD


async def test_a_named_operator_s_forms_need_their_token(world: World, ada: Visitor) -> None:
    """A form of another site, or with another user's token, is refused although the proxy names the user."""
    await world.state_of(delivery("evt_1"), Status.DEAD)
    _, page = await ada.get("/admin/events/evt_1")
    form = page.form("/admin/replay")
    assert (await ada.post(form.action, form.fields, Origin="https://evil.test"))[0].status_code == 403
    ada.client.headers["X-Forwarded-Email"] = "bob@example.com"
    response, _ = await ada.post(form.action, form.fields)
    assert response.status_code == 403


async def test_a_proxy_s_session_is_no_password_s(ada: Visitor, site: Starlette) -> None:
    """Without the header, what the proxy's visitor has in the browser opens nothing."""
    await ada.get("/admin")
    cookies: httpx.Cookies = ada.client.cookies
    assert not list(cookies.jar)
    del ada.client.headers["X-Forwarded-Email"]
    assert (await ada.get("/admin"))[0].status_code == 303


def page_token(html: str) -> str:
    """The CSRF token of a page's first form."""
    return html.split('name="token" value="')[1].split('"')[0]
