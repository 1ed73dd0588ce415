"""The application's own routing, without stores: a path leads to a page only as it is written."""

from collections.abc import MutableMapping
from typing import Any, cast
from urllib.parse import unquote

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from firstclaim.web.application import Application
from firstclaim.web.webhook import WEBHOOK_PATH, Webhook


async def _page(request: Request) -> Response:
    return Response("page", headers={"prefix": request.scope.get("root_path", "")})


async def _webhook(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("webhook")(scope, receive, send)


def _application(**paths: str) -> Application:
    pages = ("/metrics", "/livez", "/admin", "/admin/{rest:path}")
    return Application({None: cast(Webhook, _webhook)}, [Route(each, _page) for each in pages], None, **paths)


async def _request(method: str, target: str, app: ASGIApp | None = None, **scope_of: Any) -> tuple[int, bytes]:
    """Status and content of the answer to a request with this path, as the HTTP protocol passes it on."""
    application = app or _application()
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": unquote(target),
        "raw_path": target.encode(),
        "query_string": b"",
        "headers": [],
        **scope_of,
    }
    await application(scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/admin", "/admin/events/evt_1.a:b-c"])
async def test_a_path_leads_to_its_page(path: str) -> None:
    """Each path is served as it is written, and a POST to the webhook's path is a delivery."""
    assert await _request("GET", path) == (200, b"page")
    assert await _request("POST", WEBHOOK_PATH) == (200, b"webhook")


@pytest.mark.parametrize(
    "path",
    [
        "/%6detrics",
        "/metric%73",
        "/metrics%0a",
        "/metrics%2f",
        "/%61dmin",
        "/%61dmin/events",
        "/admin%2fevents",
        "%2fmetrics",
        "//metrics",
        "/./metrics",
        "/livez/../metrics",
        "/metrics/",
        "/METRICS",
        "//admin",
        "/./admin",
    ],
)
async def test_another_spelling_of_a_path_is_not_found(path: str) -> None:
    """A path with percent-encoding, doubled slashes, dots or other case is a 404: a proxy's rule would not match it."""
    status, content = await _request("GET", path)
    assert status == 404
    assert b'"action":"rejected"' in content


@pytest.mark.parametrize(
    "path", ["/webhooks/%73tripe", "/webhooks%2fstripe", "/webhooks/stripe%0a", "//webhooks/stripe"]
)
async def test_another_spelling_of_the_webhooks_path_is_no_delivery(path: str) -> None:
    """A POST to another spelling of the webhook's path is a 404, and never reaches the webhook."""
    status, content = await _request("POST", path)
    assert status == 404
    assert b'"action":"rejected"' in content


# -- trailing slashes and prefixes --------------------------------------------------------------------


async def test_a_trailing_slash_is_the_same_endpoint() -> None:
    """An endpoint that was entered at Stripe with a trailing slash gets its deliveries, without a redirect."""
    assert await _request("POST", WEBHOOK_PATH + "/") == (200, b"webhook")
    assert (await _request("GET", WEBHOOK_PATH + "/"))[0] == 405
    assert (await _request("POST", WEBHOOK_PATH + "//"))[0] == 404


async def test_the_endpoint_has_the_path_that_is_set() -> None:
    """With a path of its own, that path is the endpoint, and no answer tells it to who does not know it."""
    app = _application(webhook_path="/hooks/9f2c")
    for path in ("/hooks/9f2c", "/hooks/9f2c/"):
        assert await _request("POST", path, app) == (200, b"webhook")
    status, content = await _request("POST", WEBHOOK_PATH, app)
    assert status == 404
    assert b"hooks" not in content


@pytest.mark.parametrize(
    ("app", "prefixes"),
    [
        (_application(root_path="/pay"), ("/pay", "")),
        (_application(root_path="/a/b-c.d"), ("/a/b-c.d", "")),
        (Starlette(routes=[Mount("/shop", _application())]), ("/shop",)),
        (Starlette(routes=[Mount("/shop", _application(root_path="/pay"))]), ("/shop/pay", "/shop")),
        (Starlette(routes=[Mount("/shop", Mount("/in", _application()))]), ("/shop/in",)),
    ],
)
async def test_the_paths_may_be_below_a_prefix(app: ASGIApp, prefixes: tuple[str, ...]) -> None:
    """Mounted or with a root path, which a proxy has removed or not: the same routes, and still no other spelling."""
    for prefix in prefixes:
        assert await _request("POST", prefix + WEBHOOK_PATH, app) == (200, b"webhook")
        assert await _request("POST", prefix + WEBHOOK_PATH + "/", app) == (200, b"webhook")
        assert await _request("GET", prefix + "/livez", app) == (200, b"page")
        assert await _request("GET", prefix + "/admin/events/evt_1", app) == (200, b"page")
        for other in ("/%6detrics", "/metrics/", "//metrics", "/admin%2fevents"):
            assert (await _request("GET", prefix + other, app))[0] == 404
        assert (await _request("POST", prefix + "x" + WEBHOOK_PATH, app))[0] == 404


async def test_a_prefix_with_escapes_is_not_ours_to_refuse() -> None:
    """The prefix that an application is mounted at may have escapes; its own paths still may not."""
    for path, status in ((WEBHOOK_PATH, 200), (WEBHOOK_PATH.replace("s", "%73"), 404)):
        assert (await _request("POST", "/%C3%A4%20b" + path, root_path="/ä b"))[0] == status


async def test_a_server_that_passes_no_raw_path() -> None:
    """The raw path is optional in ASGI: without it, the path counts."""
    assert await _request("POST", WEBHOOK_PATH, raw_path=None) == (200, b"webhook")
