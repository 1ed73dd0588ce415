"""Hostile bodies that could be sent under a valid signature, each with a name that says what is wrong with it.

`bodies()` builds them anew on each call. Those that are valid events (`ACCEPTED`) have event ids of their own, so that
tests can store them in one database.
"""

import codecs
from collections.abc import Callable
from datetime import datetime
from typing import Any

import orjson
from hypothesis import strategies as st

from tests.fixtures import event_body

_MARK = "PUT-IT-HERE"


def _with(literal: bytes) -> bytes:
    """A valid event, except for one raw JSON value in its object."""
    return event_body(data={"object": {"metadata": _MARK}}).replace(b'"' + _MARK.encode() + b'"', literal)


def _changed(**fields: Any) -> bytes:
    return orjson.dumps(orjson.loads(event_body()) | fields)


def _without(name: str) -> bytes:
    event = orjson.loads(event_body())
    del event[name]
    return orjson.dumps(event)


def nested(depth: int) -> bytes:
    return _with(b"[" * depth + b"]" * depth)


def _key_twice(body: bytes) -> bytes:
    return body.replace(b"{", b'{"id":"evt_first",', 1)


_MAKERS: dict[str, Callable[[], bytes]] = {
    "NUL escaped in a value": lambda: _with(b'"a\\u0000b"'),
    "NUL escaped in a key": lambda: _with(b'{"a\\u0000b":1}'),
    "NUL raw": lambda: _with(b'"a\x00b"'),
    "NUL in the id": lambda: _changed(id="evt_\0"),
    "NUL in the type": lambda: _changed(type="a\0b"),
    "NUL in the account": lambda: event_body(account="acct_\0"),
    "NUL in the object's id": lambda: event_body(data={"object": {"id": "in_\0"}}),
    "lone high surrogate": lambda: _with(b'"\\ud800"'),
    "lone low surrogate": lambda: _with(b'"\\udc00"'),
    "lone surrogate in the id": lambda: event_body(id="evt_x1").replace(b"evt_x1", b"evt_\\ud800"),
    "surrogate as UTF-8": lambda: _with(b'"\xed\xa0\x80"'),
    "surrogate pair": lambda: _with(b'"\\ud83d\\ude00"'),
    "NaN": lambda: _with(b"NaN"),
    "Infinity": lambda: _with(b"-Infinity"),
    "1e999999": lambda: _with(b"1e999999"),
    "1e-999999": lambda: _with(b"1e-999999"),
    "integer of 300 digits": lambda: _with(b"9" * 300),
    "integer of 400 digits": lambda: _with(b"9" * 400),
    "integer of 100,000 digits": lambda: _with(b"9" * 100_000),
    "fraction of 100,000 digits": lambda: _with(b"0." + b"3" * 100_000),
    "2**64": lambda: _with(b"18446744073709551616"),
    "minus zero": lambda: _with(b"-0"),
    "nested 500 deep": lambda: nested(500),
    "nested 100,000 deep": lambda: nested(100_000),
    "open brackets": lambda: b"[" * 100_000,
    "open objects": lambda: b'{"a":' * 100_000,
    "BOM": lambda: codecs.BOM_UTF8 + event_body(),
    "UTF-16": lambda: event_body().decode().encode("utf-16"),
    "UTF-32": lambda: event_body().decode().encode("utf-32"),
    "bad UTF-8": lambda: _with(b'"\xff"'),
    "overlong UTF-8": lambda: _with(b'"\xc0\x80"'),
    "beyond Unicode": lambda: _with(b'"\xf4\x90\x80\x80"'),
    "the id twice": lambda: _key_twice(event_body()),
    "a key ten thousand times": lambda: _with(b"{" + b'"a":1,' * 9_999 + b'"a":2}'),
    "ten thousand keys": lambda: _with(orjson.dumps({str(number): number for number in range(10_000)})),
    "an empty key": lambda: _with(b'{"":{"":null}}'),
    "dunder keys": lambda: _with(b'{"__proto__":1,"__class__":{"__init__":2}}'),
    "a string of 500 kB": lambda: _with(b'"' + b"x" * 500_000 + b'"'),
    "terminal escapes": lambda: _with(b'"\\u001b[2J\\u0007\\u202e"'),
    "line breaks in the account": lambda: event_body(account='acct\n{"forged":"line"}'),
    "an account of 300 characters": lambda: event_body(account="a" * 300),
    "SQL in the account": lambda: event_body(account="'; DROP TABLE stripe_events; --"),
    "the first instant": lambda: event_body(created="0001-01-01T00:00:00Z"),
    "the last instant": lambda: event_body(created="9999-12-31T23:59:59.999999Z"),
    "an instant before the first": lambda: event_body(created="0001-01-01T00:00:00+23:59"),
    "an instant in 1901": lambda: event_body(created=-2_177_452_800),
    "a huge instant": lambda: event_body().replace(b'"created":', b'"created":' + b"9" * 30 + b',"was":', 1),
    "no id": lambda: _without("id"),
    "no type": lambda: _without("type"),
    "no created": lambda: _without("created"),
    "no livemode": lambda: _without("livemode"),
    "no data": lambda: _without("data"),
    "an id of 300 characters": lambda: _changed(id="x" * 300),
    "another object": lambda: _changed(object="charge"),
    "livemode in words": lambda: _changed(livemode="yes"),
    "created in words": lambda: _changed(created="yesterday"),
    "an id for an object": lambda: _changed(data={"object": "in_1"}),
    "a list": lambda: b"[]",
    "words": lambda: b"not json",
    "a trailing comma": lambda: event_body()[:-1] + b",}",
    "two documents": lambda: event_body() + event_body(),
    "trailing NULs": lambda: event_body() + b"\0\0",
    "white space around": lambda: b"\r\n\t " + event_body() + b"\n",
    "a comment": lambda: b"/* */" + event_body(),
    "nothing": lambda: b"",
    "white space": lambda: b" \n",
    "half of it": lambda: event_body()[: len(event_body()) // 2],
}

# The hostile bodies that are valid events. Whether their content makes sense is for the handler to decide.
ACCEPTED = {
    "NUL escaped in a value",
    "NUL escaped in a key",
    "NUL in the account",
    "NUL in the object's id",
    "surrogate pair",
    "1e-999999",
    "integer of 300 digits",
    "2**64",
    "fraction of 100,000 digits",
    "minus zero",
    "nested 500 deep",
    "the id twice",
    "a key ten thousand times",
    "ten thousand keys",
    "an empty key",
    "dunder keys",
    "a string of 500 kB",
    "terminal escapes",
    "line breaks in the account",
    "an account of 300 characters",
    "SQL in the account",
    "an instant in 1901",
    "white space around",
}


def bodies() -> dict[str, bytes]:
    """All bodies, by name."""
    return {name: make() for name, make in _MAKERS.items()}


# -- for Hypothesis ------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# Documents that pass the first checks of an event, and are arbitrary otherwise.
NEARLY = st.fixed_dictionaries(
    {"object": st.sampled_from(["event", "v2.core.event"])},
    optional={
        "id": st.just("evt_1") | JSON,
        "type": st.just("invoice.paid") | JSON,
        "livemode": st.booleans() | JSON,
        "created": st.integers() | st.datetimes().map(datetime.isoformat) | JSON,
        "data": st.fixed_dictionaries({"object": st.dictionaries(st.just("id"), JSON) | JSON}) | JSON,
        "account": JSON,
        "context": JSON,
        "api_version": JSON,
        "related_object": st.dictionaries(st.just("id"), JSON) | JSON,
    },
)
