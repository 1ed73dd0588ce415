"""Invalid requests, which must cost no store a command: each has a name that says what is wrong, and a status.

`requests` builds them from a delivery that is valid except for that one fault. Those for request smuggling hide a
whole valid delivery of another event: if the service ever read it as a request, there would be a row.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from firstclaim.web.webhook import WEBHOOK_PATH
from tests.fixtures import event_body, signed

MEBIBYTE = 1024 * 1024
HOST = ("Host", "x")
CLOSE = ("Connection", "close")

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class InvalidRequest:
    """The chunks that are sent, and the status of the one answer."""

    chunks: Sequence[bytes]
    status: int


def request(headers: Headers, body: bytes = b"", line: str = f"POST {WEBHOOK_PATH} HTTP/1.1") -> bytes:
    """The bytes of a request."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{line}\r\n{head}\r\n".encode("latin-1") + body


def good() -> bytes:
    """A valid delivery of a new event."""
    body = event_body()
    return request([HOST, *signed(body).items(), length(body)], body)


def length(body: bytes) -> tuple[str, str]:
    """The Content-Length header of the body."""
    return "Content-Length", str(len(body))


def chunked(body: bytes) -> bytes:
    """The body as one chunk, with the last chunk behind it."""
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def requests() -> dict[str, InvalidRequest]:
    """All of them, with new events."""
    return {
        **{f"signature: {name}": InvalidRequest([sent], 400) for name, sent in _signatures()},
        **{f"framing: {name}": InvalidRequest([sent], 400) for name, sent in _framings()},
        **{f"size: {name}": refused for name, refused in _sizes().items()},
        **{f"place: {name}": refused for name, refused in _paths().items()},
        **{f"hidden: {name}": refused for name, refused in _hidden().items()},
    }


# -- signatures --------------------------------------------------------------------------------------


def _signatures() -> Iterator[tuple[str, bytes]]:
    body, now = event_body(), int(time.time())
    right = signed(body)["Stripe-Signature"]
    digest = right.partition(",")[2]
    several: Mapping[str, Sequence[str]] = {
        "missing": [],
        "twice": [right, right],
        "a wrong one, then the right one": [signed(body, "whsec_another")["Stripe-Signature"], right],
        "empty": [""],
        "nonsense": ["nonsense"],
        "not ASCII": [right + ",v1=\u00e9"],
        "not ASCII in another scheme": [right + ",v0=\u00ff"],
        "5,000 signatures": [f"t={now}," + "v1=00," * 5_000 + digest],
        "stale": [signed(body, at=now - 3600)["Stripe-Signature"]],
        "future": [signed(body, at=now + 3600)["Stripe-Signature"]],
        "only v0": [right.replace("v1=", "v0=")],
        "no time": [digest],
        "two times": [f"t={now},{right}"],
        "time zero": [f"t=0,{digest}"],
        "a time of 5,000 digits": [f"t={'9' * 5_000},{digest}"],
        "superscript time": [f"t=\u00b2,{digest}"],
        "no digest": [f"t={now},v1="],
        "half a digest": [right[:-32]],
        "upper case": [right.upper()],
        "another secret": [signed(body, "whsec_another")["Stripe-Signature"]],
        "another body": [signed(body + b" ")["Stripe-Signature"]],
    }
    for name, headers in several.items():
        lines = [("Stripe-Signature", header) for header in headers]
        yield name, request([HOST, CLOSE, *lines, length(body)], body)
    yield (
        "in a trailer",
        request(
            [HOST, CLOSE, ("Transfer-Encoding", "chunked")],
            chunked(body).removesuffix(b"\r\n") + f"Stripe-Signature: {right}\r\n\r\n".encode(),
        ),
    )
    yield "in the query", request([HOST, CLOSE, length(body)], body, f"POST {WEBHOOK_PATH}?{right} HTTP/1.1")
    yield "HTTP/1.0", request([length(body)], body, f"POST {WEBHOOK_PATH} HTTP/1.0")
    yield "absolute form", request([HOST, CLOSE, length(body)], body, f"POST http://x{WEBHOOK_PATH} HTTP/1.1")
    yield (
        "expecting a go-ahead it does not wait for",
        request([HOST, CLOSE, ("Expect", "a miracle"), length(body)], body),
    )


# -- framing -----------------------------------------------------------------------------------------


def _framings() -> Iterator[tuple[str, bytes]]:
    """Each is a valid delivery to a server that parses leniently."""
    body = event_body()
    sign = list(signed(body).items())
    once, as_chunks = length(body), ("Transfer-Encoding", "chunked")
    for name, headers in {
        "length and chunks": [once, as_chunks],
        "chunks and length": [as_chunks, once],
        "two lengths": [once, ("Content-Length", "0")],
        "the same length twice": [once, once],
        "a list of lengths": [("Content-Length", f"{len(body)}, {len(body)}")],
        "a signed length": [("Content-Length", f"+{len(body)}")],
        "a negative length": [("Content-Length", "-1")],
        "a hexadecimal length": [("Content-Length", hex(len(body)))],
        "a length of nothing": [("Content-Length", "")],
        "a length of 30 digits": [("Content-Length", "9" * 30)],
        "a blank before the colon": [("Content-Length ", str(len(body)))],
    }.items():
        yield name, request([HOST, *sign, *headers], body)
    for name, coding in {
        "xchunked": "xchunked",
        "identity": "identity",
        "chunked, identity": "chunked, identity",
        "a vertical tab": "\x0bchunked",
        "quoted": '"chunked"',
    }.items():
        yield f"coding: {name}", request([HOST, *sign, ("Transfer-Encoding", coding)], chunked(body))
    yield "two codings", request([HOST, *sign, as_chunks, ("Transfer-Encoding", "identity")], chunked(body))
    whole = chunked(body)
    for name, pieces in {
        "no number": b"zz" + whole,
        "negative": b"-" + whole,
        "0x": b"0x" + whole,
        "too large to count": b"f" * 17 + b"\r\n",
        "bare line feeds": whole.replace(b"\r\n", b"\n"),
        "a line feed in an extension": whole.replace(b"\r\n", b";a\nb\r\n", 1),
        "more than it says": whole.replace(b"\r\n0\r\n", b"more\r\n0\r\n"),
        "a length in a trailer": whole.removesuffix(b"\r\n") + b"Content-Length: 0\r\n\r\n",
    }.items():
        yield f"chunk: {name}", request([HOST, *sign, as_chunks], pieces)
    plain = request([HOST, *sign, once, ("X", "a-b")], body)
    for name, old, new in (
        ("bare line feeds", b"\r\n", b"\n"),
        ("bare carriage returns", b"\r\n", b"\r"),
        ("a folded header", b"a-b", b"a\r\n b"),
        ("a header folded by a tab", b"a-b", b"a\r\n\tb"),
        ("NUL in a value", b"a-b", b"a\0b"),
        ("NUL in a name", b"X:", b"X\0:"),
        ("NUL in the target", b" HTTP/1.1", b"\0 HTTP/1.1"),
        ("a carriage return in a value", b"a-b", b"a\rb"),
        ("a line feed in a value", b"a-b", b"a\nb"),
        ("no colon", b"X: a-b", b"nonsense"),
        ("no name", b"X: a-b", b": a-b"),
        ("folded before the first", b"Host:", b" Host:"),
        ("HTTP/1.2", b"HTTP/1.1", b"HTTP/1.2"),
        ("lower case", b"HTTP/1.1", b"http/1.1"),
        ("no such method", b"POST", b"PORT"),
        ("no path", WEBHOOK_PATH.encode(), b"http://x"),
        ("a port of 8 digits", WEBHOOK_PATH.encode(), b"http://x:99999999" + WEBHOOK_PATH.encode()),
        ("not ASCII", WEBHOOK_PATH.encode(), WEBHOOK_PATH.encode() + b"\xff"),
        ("a tunnel", b"POST " + WEBHOOK_PATH.encode(), b"CONNECT x:80"),
        ("an upgrade with a body", b"X: a-b", b"Connection: Upgrade\r\nUpgrade: h2c"),
    ):
        assert old in plain
        yield name, plain.replace(old, new)
    yield "TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "the PROXY protocol", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + plain
    yield "a Redis command", b"*1\r\n$8\r\nFLUSHALL\r\n"


# -- sizes --------------------------------------------------------------------------------------------


def _sizes() -> dict[str, InvalidRequest]:
    body = event_body()
    large = body + b" " * (2 * MEBIBYTE - len(body))
    sign = list(signed(large).items())
    piece = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    endless = request([HOST, ("Transfer-Encoding", "chunked")])
    return {
        "2 MiB": InvalidRequest([request([HOST, *sign, length(large)], large)], 413),
        "2 MiB in a chunk": InvalidRequest(
            [request([HOST, *sign, ("Transfer-Encoding", "chunked")], chunked(large))], 413
        ),
        "one byte over": InvalidRequest([request([HOST, length(large[: MEBIBYTE + 1])], large[: MEBIBYTE + 1])], 413),
        "100 GB declared": InvalidRequest([request([HOST, ("Content-Length", str(100 * 1024**3))])], 413),
        "endless chunks": InvalidRequest([endless, *[piece] * 256], 413),
        "endless chunks of a byte": InvalidRequest([endless, *[b"1\r\n \r\n" * 10_000] * 1_000], 413),
        "an endless extension": InvalidRequest([endless, b"1;", *[b"x" * 65_536] * 16], 431),
        "an endless trailer": InvalidRequest([endless, b"0\r\nX: ", *[b"x" * 65_536] * 16], 431),
        "endless trailers": InvalidRequest([endless, b"0\r\n", *[b"X: y\r\n" * 10_000] * 16], 431),
        "a header of 1 MB": InvalidRequest([request([HOST, ("X", "x" * 1_000_000), length(b"")])], 431),
        "a target of 1 MB": InvalidRequest([request([HOST], line=f"POST /{'x' * 1_000_000} HTTP/1.1")], 431),
        "10,000 signatures": InvalidRequest([request([HOST, ("Stripe-Signature", "v1=00," * 10_000)])], 431),
        "20,000 headers": InvalidRequest([request([HOST, *[("X", "")] * 20_000])], 431),
        "a name of 1 MB": InvalidRequest([request([HOST, ("x" * 1_000_000, "")])], 431),
        "blank lines before it": InvalidRequest([b"\r\n" * 500_000], 431),
    }


# -- paths --------------------------------------------------------------------------------------------


def _paths() -> dict[str, InvalidRequest]:
    body = event_body()
    headers = [HOST, CLOSE, *signed(body).items(), length(body)]
    lines = {
        f"GET {WEBHOOK_PATH}": 405,
        f"PUT {WEBHOOK_PATH}": 405,
        "OPTIONS *": 404,
        "POST /": 404,
        f"GET {WEBHOOK_PATH}/": 405,
        f"POST {WEBHOOK_PATH}//": 404,
        "GET /metrics/": 404,
        f"POST /{WEBHOOK_PATH}": 404,
        f"POST {WEBHOOK_PATH}%00": 404,
        f"POST {WEBHOOK_PATH}%0d%0aX:y": 404,
        f"POST {WEBHOOK_PATH}/../..{WEBHOOK_PATH}": 404,
        f"POST {WEBHOOK_PATH.upper()}": 404,
        f"POST {WEBHOOK_PATH.replace('s', '%73')}": 404,
        f"POST {WEBHOOK_PATH}#x": 400,
        "GET /%6detrics": 404,
        "GET /%61dmin": 404,
        "POST /livez": 405,
    }
    return {
        line: InvalidRequest([request(headers, body, f"{line} HTTP/1.1")], status) for line, status in lines.items()
    }


# -- smuggling ----------------------------------------------------------------------------------------


def _hidden() -> dict[str, InvalidRequest]:
    inner = good()
    as_chunks = ("Transfer-Encoding", "chunked")
    return {
        "behind an unsigned delivery": InvalidRequest([request([HOST, length(b"{}")], b"{}") + inner], 400),
        "behind one that closes": InvalidRequest([request([HOST, CLOSE, length(b"{}")], b"{}") + inner], 400),
        "behind the end of chunks": InvalidRequest(
            [request([HOST, length(inner), as_chunks], b"0\r\n\r\n" + inner)], 400
        ),
        "in the body of a GET": InvalidRequest(
            [request([HOST, length(inner)], inner, f"GET {WEBHOOK_PATH} HTTP/1.1")], 405
        ),
        "in an unsigned body": InvalidRequest([request([HOST, CLOSE, length(inner)], inner)], 400),
        "behind a length of nothing": InvalidRequest([request([HOST, ("Content-Length", "0")], inner)], 400),
        "behind no length": InvalidRequest([request([HOST], inner)], 400),
        "behind nonsense": InvalidRequest([b"nonsense\r\n\r\n" + inner], 400),
        "behind a head that is too large": InvalidRequest([request([HOST, ("X", "x" * 40_000)], inner)], 431),
        "in the body of an upgrade": InvalidRequest(
            [request([HOST, ("Connection", "upgrade"), ("Upgrade", "h2c"), length(inner)]), inner], 400
        ),
        "behind an upgrade": InvalidRequest(
            [request([HOST, ("Connection", "upgrade"), ("Upgrade", "h2c")], inner)], 400
        ),
        "in a trailer": InvalidRequest([request([HOST, CLOSE, as_chunks], b"0\r\nX: ") + inner], 400),
        "in 10,000 of them": InvalidRequest([request([HOST, length(b"{}")], b"{}") + inner * 10_000], 400),
    }
