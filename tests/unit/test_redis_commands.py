"""The commands of the lock over a connection that a test answers for."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import InvalidResponse

from firstclaim.inbox.redis_commands import RedisCommands


class Line:
    """In place of the client's connection and of its transport: notes what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.wrote = asyncio.Event()
        self.is_open = True
        self._writer = SimpleNamespace(transport=self)

    async def connect(self) -> None:
        """See redis-py."""

    async def disconnect(self, **_: Any) -> None:
        """See redis-py."""

    def set_protocol(self, protocol: asyncio.Protocol) -> None:
        """See asyncio."""

    def write(self, data: bytes) -> None:
        """See asyncio."""
        self.written.append(data)
        self.wrote.set()

    def abort(self) -> None:
        """See asyncio."""
        self.is_open = False


async def sent(line: Line) -> tuple[RedisCommands, list[asyncio.Future[Any]]]:
    """Two commands that have gone out together, and their replies."""
    commands = RedisCommands(cast(AbstractConnection, line), timeout_seconds=5, max_batch=9)
    replies = [commands.call(b"one"), commands.call(b"two")]
    await line.wrote.wait()
    assert line.written == [b"onetwo"]
    return commands, replies


async def test_replies_go_to_their_commands() -> None:
    """In the order in which these were sent, however the bytes arrive."""
    commands, replies = await sent(Line())
    for byte in b"+first\r\n:2\r\n":
        commands.data_received(bytes([byte]))
    assert await asyncio.gather(*replies) == [b"first", 2]


@pytest.mark.parametrize("bytes_", [b"+stray\r\n+first\r\n+second\r\n", b"+first\r\n?\r\n"])
async def test_what_is_no_reply_of_its_batch_fails_all_of_it(bytes_: bytes) -> None:
    """With one reply too many, or one that cannot be read, each may be another command's: none is believed."""
    line = Line()
    commands, replies = await sent(line)
    commands.data_received(bytes_)
    errors = await asyncio.gather(*replies, return_exceptions=True)
    assert [type(error) for error in errors] == [InvalidResponse, InvalidResponse]
    assert not line.is_open
