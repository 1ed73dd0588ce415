"""The application's own routing, without stores: a path leads to a page only as it is written."""

from collections.abc import MutableMapping
from typing import Any, cast
from urllib.parse import unquote

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from firstclaim.app import Application
from firstclaim.web.webhook import WEBHOOK_PATH, Webhook


async def _page(_request: Request) -> Response:
    return Response("page")


async def _webhook(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("webhook")(scope, receive, send)


async def _request(method: str, target: str) -> tuple[int, bytes]:
    """Status and content of the answer to a request with this path, as the HTTP protocol passes it on."""
    paths = ("/metrics", "/livez", "/admin", "/admin/{rest:path}")
    application = Application(cast(Webhook, _webhook), [Route(path, _page) for path in paths], None)  # type: ignore[arg-type]
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
        "/admin/event%73",
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
