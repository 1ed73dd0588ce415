"""TLS in front of a server that has none, with a certificate authority of the test's own.

The embedded servers are built without TLS. What is tested is the client's side of it: which certificates it accepts,
what it says when it does not, and that it never continues without TLS.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit, urlunsplit

import trustme

from tests.proxy import before_postgres, before_redis

_SSL_REQUEST: Final = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority, the file of its certificate, and the files of a client's certificate and key."""

    ca: trustme.CA
    file: Path
    client_certificate: Path
    client_key: Path

    @classmethod
    def make(cls, folder: Path) -> Self:
        """One with its files in `folder`."""
        ca = trustme.CA()
        found = cls(ca, folder / "ca.pem", folder / "client.pem", folder / "client.key")
        client = ca.issue_cert("client@example.com")
        ca.cert_pem.write_to_path(str(found.file))
        client.cert_chain_pems[0].write_to_path(str(found.client_certificate))
        client.private_key_pem.write_to_path(str(found.client_key))
        return found

    def server(self, *names: str, clients: bool = False) -> ssl.SSLContext:
        """For a server with these names. `clients`: it accepts only clients with a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(*(names or ("localhost", "127.0.0.1"))).configure_cert(context)
        if clients:
            self.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@contextlib.asynccontextmanager
async def postgres_with_tls(url: str, context: ssl.SSLContext) -> AsyncIterator[str]:
    """The address, without a query, of the server of `url`, which can be reached by TLS alone."""
    async with before_postgres(url) as (proxy, plain), _front(proxy.port, context, negotiates=True) as port:
        parts = urlsplit(plain)
        yield urlunsplit(parts._replace(netloc=f"{parts.username}@localhost:{port}", query=""))


@contextlib.asynccontextmanager
async def redis_with_tls(url: str, context: ssl.SSLContext) -> AsyncIterator[str]:
    """The host and the port of the server of `url`, which can be reached by TLS alone."""
    async with before_redis(url) as (proxy, _), _front(proxy.port, context, negotiates=False) as port:
        yield f"localhost:{port}"


@contextlib.asynccontextmanager
async def _front(upstream: int, context: ssl.SSLContext, *, negotiates: bool) -> AsyncIterator[int]:
    """`negotiates`: as Postgres does, TLS begins after a request in plain text."""
    writers: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if negotiates:
                if await reader.readexactly(len(_SSL_REQUEST)) != _SSL_REQUEST:
                    writer.close()
                    return
                writer.write(b"S")
                await writer.start_tls(context)
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", upstream)
            writers.add(server_writer)
            await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))

    listener = await asyncio.start_server(serve, "localhost", 0, ssl=None if negotiates else context)
    ports = {each.getsockname()[1] for each in listener.sockets}
    async with listener:
        yield ports.pop()
        for writer in writers:
            writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.transport.abort()
