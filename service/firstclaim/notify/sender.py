"""HTTP to the receiver of notices.

Guarantees: a request goes to the operator's address and to no other: redirects are not followed, and nothing of an
event is part of the address. No request takes longer than its timeout, and no more than the head of an answer is read.
An error is named by its class or its status, without the address, whose path may be a secret.
"""

import asyncio
from typing import Final

import httpx

from firstclaim.notify.notice import Notice
from firstclaim.observability.redaction import class_name

TIMEOUT_SECONDS: Final = 5.0
_HEADERS: Final = {"content-type": "application/json", "user-agent": "firstclaim"}


class Sender:
    """The client of one address."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = httpx.AsyncClient(timeout=TIMEOUT_SECONDS, follow_redirects=False, headers=_HEADERS)

    async def send(self, notice: Notice) -> str | None:
        """Send a notice. Returns why the receiver has not taken it, or None: it has."""
        answer = await self._request("POST", content=notice.body(), headers={"idempotency-key": notice.notice_id})
        return None if isinstance(answer, int) and 200 <= answer < 300 else _reason(answer)

    async def reach(self) -> tuple[bool, str]:
        """Ask for the head of the address, which sends no notice. Returns whether there was an answer, and which."""
        answer = await self._request("HEAD")
        return isinstance(answer, int), _reason(answer)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _request(self, method: str, **arguments: object) -> int | str:
        """The status of the answer, or the class of the error."""
        try:
            async with (
                asyncio.timeout(TIMEOUT_SECONDS),
                self._client.stream(method, self._url, **arguments) as answer,  # type: ignore[arg-type]
            ):
                return answer.status_code
        except Exception as error:  # noqa: BLE001  (also of a resolver or a certificate; the message names the address)
            return class_name(error)


def _reason(answer: int | str) -> str:
    return f"status {answer}" if isinstance(answer, int) else answer
