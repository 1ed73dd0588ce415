"""A transport that sends bytes together with what the driver writes next, in one system call and one packet.

Guarantees: what `hold` was given is written in front of the next write, in the same call, or, after `drop`, never. So a
server never sees the one without the other, and a process that is frozen leaves nothing half sent.

asyncpg writes to the transport that its protocol was given when the connection was made, and has no parameter for
another one. But it can be given an event loop: `JoiningLoop` is the running loop, except that the transports it makes
are `JoinedWrites`. It is used while a connection is made, and not kept.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class JoinedWrites:
    """A transport of the event loop's, and bytes that go out with the next write."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self._write = transport.write
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def hold(self, data: bytes) -> None:
        """Send `data` with the next write, in front of it."""
        self._held = data

    def drop(self) -> None:
        """Do not send what is held. Does nothing if it was sent."""
        self._held = b""

    def write(self, data: bytes | memoryview) -> None:
        """Send what is held, and `data`."""
        if self._held:
            data, self._held = b"".join((self._held, data)), b""
        self._write(data)


class JoiningLoop:
    """The event loop `real`, for a driver that connects: its transports are `JoinedWrites`."""

    def __init__(self, real: asyncio.AbstractEventLoop) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    async def create_connection(self, factory: Callable[[], Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """As the loop's."""
        return await _joining(self.real.create_connection, factory, *arguments, **options)

    async def create_unix_connection(self, factory: Callable[[], Any], path: str) -> tuple[Any, Any]:
        """As the loop's."""
        return await _joining(self.real.create_unix_connection, factory, path)

    async def start_tls(self, plain: JoinedWrites, *arguments: Any, **options: Any) -> JoinedWrites | None:
        """As the loop's."""
        encrypted = await self.real.start_tls(plain.transport, *arguments, **options)
        return None if encrypted is None else JoinedWrites(encrypted)


async def _joining(
    connect: Callable[..., Awaitable[tuple[Any, Any]]], factory: Callable[[], Any], *arguments: Any, **options: Any
) -> tuple[Any, Any]:
    """Connect, with a protocol that is given the joined transport; returns both."""
    made: list[JoinedWrites] = []

    def joining() -> Any:
        protocol = factory()

        def connection_made(transport: Any) -> None:
            del protocol.connection_made  # this function: what it hides is called
            made.append(JoinedWrites(transport))
            protocol.connection_made(made[0])

        protocol.connection_made = connection_made
        return protocol

    _, protocol = await connect(joining, *arguments, **options)
    return made[0], protocol
