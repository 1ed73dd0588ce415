"""The engine of `firstclaim send`: one event, signed as Stripe signs it, in as many copies as asked, at once.

Guarantees: `build_event` never yields the same event twice (every id in a template is drawn anew, alike
wherever it recurs, and its instants move to now), so that a second run is not a duplicate of the first; every
copy is the same bytes under a signature of its own, as Stripe's retries are; a server that is away is an
`Answer`, never a traceback. `report` says what was answered, `exit_code` whether the promise held: of all the
copies of an event, at most one is processed.

Snapshot templates are whole objects as API version 2026-10-28 renders them, and a test holds them to the
fields that stripe-python declares. The people and the ids in them are made up.
"""

import asyncio
import difflib
import hashlib
import hmac
import math
import re
import secrets
import ssl
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

# `in_1Sca5RKdVq2Wn7RtLxQt0Jx7`, `cs_test_a1...`, `pi_..._secret_...`: lower-case words, then at least 14
# letters and digits of which one is a digit, so that no enum value (`subscription_cycle`) is taken for an id.
_ID = re.compile(r"(?<![A-Za-z0-9])((?:[a-z]+_)+)(?=[A-Za-z]*\d)([A-Za-z0-9]{14,})(?![A-Za-z0-9])")

# An integer this near to the template's own `created` is an instant, and moves with it.
_NEAR_SECONDS = 400 * 86_400

# In flight at once: more than any one process dispatches, and well under the usual 1024 open files.
_LANES_MOST = 200

# A service answers within 5 s (its budget); past this the server is hanging, and that is the answer.
_TIMEOUT_SECONDS = 30.0

_THIS_MACHINE = re.compile(r"https?://(localhost|127\.|\[::1\])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one copy met: a status with the body's `action` and `processed` if it had them, or an error."""

    status: int | None
    action: str | None
    processed: bool | None
    seconds: float
    error: str | None


# -- what is sent -------------------------------------------------------------------------------------


def shipped_types() -> list[str]:
    """The event types that have a template."""
    names = (entry.name for entry in _templates().iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def build_event(event_type: str, event_id: str | None = None) -> bytes:
    """A new event of a shipped type, pretty-printed as Stripe's are; raises `ValueError` for any other."""
    types = shipped_types()
    if event_type not in types:
        near = difflib.get_close_matches(event_type, types, n=1)
        raise ValueError(
            f"no template for {event_type!r}{f'; did you mean {near[0]}?' if near else '.'}\n"
            f"Shipped: {', '.join(types)}.\nAny other event: --file event.json"
        )
    template = orjson.loads((_templates() / f"{event_type}.json").read_bytes())
    now = datetime.now(UTC)
    thin = isinstance(template["created"], str)
    seconds = int(now.timestamp())
    event = _renewed(template, seconds if thin else template["created"], seconds, {})
    if thin:
        event["created"] = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return _dump(event, event_id)


def marked_event(event_type: str, id_head: str, mark: bytes) -> bytes:
    """A new event of a shipped type, whose id is `id_head` and `mark`, and whose every other id ends in `mark`.

    Put as many letters or digits in the mark's place: another event about other objects, without building one.
    """
    stand_in = id_head + string.ascii_letters[: len(mark)]
    body = re.sub(_ID.pattern.encode(), lambda found: found[0][: -len(mark)] + mark, build_event(event_type, stand_in))
    return body.replace(stand_in.encode(), id_head.encode() + mark)  # if it is too short to look like an id


def read_event(path: Path, event_id: str | None = None) -> bytes:
    """The event in a file, byte for byte unless `event_id` replaces its id; raises `ValueError`."""
    try:
        body = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--file {path}: {error.strerror}") from None
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"--file {path}: not JSON: {error}") from None
    if not isinstance(event, dict):
        raise ValueError(f"--file {path}: expected an event, which is a JSON object")
    return body if event_id is None else _dump(event, event_id)


def sign(body: bytes, secret: str, timestamp: int | None = None) -> str:
    """The `Stripe-Signature` header for `body`, at `timestamp` (unix seconds, default now).

    Over the bytes themselves: stripe-python's own takes text, and would refuse a body that is not UTF-8.
    """
    at = int(time.time()) if timestamp is None else timestamp
    digest = hmac.new(secret.encode(), b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


def _templates() -> Any:
    return resources.files("firstclaim") / "templates"


def _dump(event: dict[str, Any], event_id: str | None) -> bytes:
    if event_id is not None and not (event_id.isascii() and event_id.isprintable() and event_id):
        raise ValueError("--id: expected printable ASCII, e.g. evt_123")
    return orjson.dumps(event if event_id is None else event | {"id": event_id}, option=orjson.OPT_INDENT_2)


def _renewed(value: Any, created: int, now: int, ids: dict[str, str]) -> Any:
    """`value` with every id drawn anew (`ids` remembers them), its instants moved from `created` to `now`."""
    if isinstance(value, dict):
        return {name: _renewed(each, created, now, ids) for name, each in value.items()}
    if isinstance(value, list):
        return [_renewed(each, created, now, ids) for each in value]
    if isinstance(value, str):
        return _ID.sub(lambda found: ids.setdefault(found[0], found[1] + _drawn_like(found[2])), value)
    if isinstance(value, int) and abs(value - created) < _NEAR_SECONDS:
        return value - created + now
    return value


def _drawn_like(old: str) -> str:
    """A letter for a letter, a digit for a digit: without any digit it would not be found to be an id again."""
    return old[:2] + "".join(secrets.choice(string.digits if c.isdigit() else string.ascii_letters) for c in old[2:])


# -- sending ------------------------------------------------------------------------------------------


async def send(
    url: str,
    body: bytes,
    secret: str,
    copies: int,
    on_answer: Callable[[Answer], None],
    *,
    transport: httpx.AsyncBaseTransport | None = None,
) -> list[Answer]:
    """Post `copies` of `body`, up to 200 in flight together; the answers in the order they came.

    Raises `ValueError` for what is not a URL; nothing that happens on the way raises.
    """
    check_url(url)
    turns = iter(range(copies))
    answers: list[Answer] = []
    tls = httpx.create_ssl_context()

    async def lane(client: httpx.AsyncClient) -> None:
        for _ in turns:
            answer = await _post(client, url, body, secret)
            answers.append(answer)
            on_answer(answer)

    # A client for each lane: one client's pool walks through all of its connections at every request, and the
    # walk was most of the latency (500 copies of 50 ms, 200 in flight: p99 8.6 s, this way 0.5 s; httpx 0.28).
    async with AsyncExitStack() as clients, asyncio.TaskGroup() as lanes:
        for _ in range(min(copies, _LANES_MOST)):
            client = await clients.enter_async_context(_client(url, tls, transport))
            lanes.create_task(lane(client))
    return answers


def check_url(url: str) -> None:
    """Raise `ValueError` for what no event can be sent to."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--url: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65_535:
        raise ValueError("--url: expected e.g. http://localhost:8000/webhooks/stripe")


def _client(url: str, tls: ssl.SSLContext, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    # No proxy that the environment names may come between us and this machine.
    trust_env = not _THIS_MACHINE.match(url)
    return httpx.AsyncClient(verify=tls, timeout=_TIMEOUT_SECONDS, transport=transport, trust_env=trust_env)


async def _post(client: httpx.AsyncClient, url: str, body: bytes, secret: str) -> Answer:
    headers = {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": sign(body, secret)}
    started = time.perf_counter()
    try:
        response = await client.post(url, content=body, headers=headers)
    except httpx.HTTPError as error:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        return Answer(None, None, None, time.perf_counter() - started, text)
    seconds = time.perf_counter() - started
    return Answer(response.status_code, *outcome_of(response.content), seconds, None)


def outcome_of(content: bytes) -> tuple[str | None, bool | None]:
    """An answer's `action` and `processed`; whatever else answered (a proxy, say) had neither."""
    try:
        answer = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None, None
    fields = answer if isinstance(answer, dict) else {}
    action, processed = fields.get("action"), fields.get("processed")
    return (
        action if isinstance(action, str) else None,
        processed if isinstance(processed, bool) else None,
    )


# -- what is said -------------------------------------------------------------------------------------


@contextmanager
def progress(copies: int, console: Console) -> Iterator[Callable[[Answer], None]]:
    """Hands out an `on_answer` that moves a bar; where the output is no terminal, there is no bar."""
    columns = (TextColumn("sending"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sending", total=copies)
        yield lambda _answer: bar.advance(task)


def exit_code(answers: Sequence[Answer]) -> int:
    """1 if more than one copy was processed, or if none was answered with a 2xx; else 0."""
    return _verdict(answers)[0]


def report(answers: Sequence[Answer], console: Console) -> None:
    """Print the answers counted, their latency, and the verdict in a line."""
    table = Table("status", "action", "processed")
    table.add_column("count", justify="right")
    for (status, said, processed), count in _tally(answers).most_common():
        table.add_row(_cell(status), _cell(said), _cell(processed), str(count))
    console.print(table)
    if took := sorted(answer.seconds for answer in answers if answer.status is not None):
        latency = f"latency p50 {_milliseconds(took, 0.5)} ms, p99 {_milliseconds(took, 0.99)} ms"
        console.print(latency, markup=False, highlight=False)
    failed, verdict = _verdict(answers)
    console.print(Text(verdict, style="bold red" if failed else "bold green"), soft_wrap=True)


def _tally(answers: Sequence[Answer]) -> Counter[tuple[int | None, str | None, bool | None]]:
    return Counter((each.status, each.action or each.error, each.processed) for each in answers)


def _verdict(answers: Sequence[Answer]) -> tuple[int, str]:
    """The exit code, and the sentence that says why."""
    answered = [each for each in answers if each.status is not None]
    if not answered:
        return 1, f"No copy was answered: {answers[0].error if answers else 'none was sent'}"
    processed = sum(each.processed is True for each in answered)
    of = f"{len(answers)} {'copy' if len(answers) == 1 else 'copies'}"
    lost = f" {len(answers) - len(answered)} had no answer." if len(answered) < len(answers) else ""
    if processed > 1:
        return 1, f"Processed {processed} times: {of} of one event may be processed once at most.{lost}"
    if processed == 1:
        return 0, f"Processed once, of {of}.{lost}"
    accepted = any(each.status is not None and each.status < 300 for each in answered)
    status, action, _ = _tally(answered).most_common(1)[0][0]
    return (
        0 if accepted else 1,
        f"Not processed, of {of}; most were answered {status} {_cell(action or 'without an action')}.{lost}",
    )


def _cell(value: int | str | bool | None) -> Text:
    """What a stranger's server says goes to the terminal as text: no markup, no control characters."""
    if value is None:
        return Text("-")
    text = ("no", "yes")[value] if isinstance(value, bool) else str(value)
    return Text(text if text.isprintable() else ascii(text))


def _milliseconds(sorted_seconds: Sequence[float], quantile: float) -> str:
    """The nearest-rank quantile: a latency that some copy really had."""
    return f"{sorted_seconds[math.ceil(quantile * len(sorted_seconds)) - 1] * 1000:.1f}"
