"""Refused requests, in addition to rows 30 and 31 of the chaos suite: their answers, and that they leave no row."""

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.acceptance.harness import REJECTED, Sandbox, Service, post
from tests.fixtures import event_body, signed

BODY = event_body()
MEBIBYTE = 1024 * 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(shared_sandbox: Sandbox) -> Service:
    """One service for the whole module."""
    return await shared_sandbox.service().start()


@pytest_asyncio.fixture(autouse=True)
async def no_row_is_written(shared_sandbox: Sandbox) -> AsyncIterator[None]:
    """Nothing that is sent here may leave a row behind."""
    yield
    assert await shared_sandbox.rows() == 0


async def test_a_body_over_the_cap_is_refused(service: Service) -> None:
    """One byte over 1 MiB: 413, its sender gets to read that, and the connection is closed."""
    answer = await post(service.url, b" " * (MEBIBYTE + 1))
    assert (answer.status, answer.content["action"]) == (413, "rejected")
    assert answer.headers["connection"] == "close"


async def test_a_body_at_the_cap_is_read(service: Service) -> None:
    """Exactly 1 MiB is read to its end: the cap is not a byte tighter than it says."""
    answer = await post(service.url, b" " * (MEBIBYTE - 2) + b"[]")
    assert answer.result == REJECTED
    assert "body is not an event" in (answer.reason or "")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/webhooks/stripe", 405),
        ("PUT", "/webhooks/stripe", 405),
        ("POST", "/webhooks/Stripe", 404),
        ("POST", "/", 404),
        ("POST", "/readyz", 405),
    ],
)
async def test_other_paths_and_methods_are_refused(method: str, path: str, status: int, service: Service) -> None:
    """Any other path is 404, any other method 405, neither redirects, and both have the one shape of answer."""
    response = await service.request(method, path, BODY if method != "GET" else b"")
    assert response.status_code == status
    assert response.json()["action"] == "rejected"
    assert "location" not in response.headers
    if path == "/webhooks/stripe":
        assert response.headers["allow"] == "POST"


async def test_a_connection_survives_a_rejection(service: Service) -> None:
    """After a 400 the same connection takes the next delivery: Stripe keeps its connections."""
    async with httpx.AsyncClient(trust_env=False, verify=False, limits=httpx.Limits(max_connections=1)) as client:  # noqa: S501
        for _ in range(3):
            response = await client.post(service.url, content=b"{}", headers=signed(b"{}"))
            assert response.status_code == 400
            assert "connection" not in response.headers
