"""The parts of `firstclaim send`: templates that stripe-python accepts, the client, and the report."""

import asyncio
import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import stripe
from rich.console import Console

import firstclaim
from firstclaim.errors import ConfigurationError
from firstclaim.event import parse_event
from firstclaim.handlers.invoices import payment_failure
from firstclaim.sending.client import Answer, _client, check_url, send, sign
from firstclaim.sending.events import build_event, changed, event_id_of, marked_event, read_event, shipped_types
from firstclaim.sending.report import exit_code, report
from tests.fixtures import SECRET, event_body, old_shape_payment_failed, signed

SERVER = "http://localhost:8000"
URL = f"{SERVER}/webhooks/stripe"
THIN = "v1.billing.meter.error_report_triggered"
SNAPSHOTS = [each for each in shipped_types() if each != THIN]

# Every kind of id in the templates, spelt out, where the code under test has a rule.
ID = re.compile(rb"\b(?:acct|ch|cs|cus|evt|il|in|mtr|pi|pm|pmc|price|prod|req|si|sub|test|txn)_\w{14,}")

# The class by which stripe-python declares each object that a template holds.
DECLARED: dict[str, Any] = {
    "balance": stripe.Balance,
    "charge": stripe.Charge,
    "checkout.session": stripe.checkout.Session,
    "customer": stripe.Customer,
    "event": stripe.Event,
    "invoice": stripe.Invoice,
    "line_item": stripe.InvoiceLineItem,
    "payment_intent": stripe.PaymentIntent,
    "plan": stripe.Plan,
    "price": stripe.Price,
    "subscription": stripe.Subscription,
    "subscription_item": stripe.SubscriptionItem,
}

DONE = Answer(200, "payment_failure_recorded", True, 0.012, None)
DUPLICATE = Answer(200, "ignored", False, 0.003, None)
DEFERRED = Answer(202, "deferred", False, 0.05, None)
REFUSED = Answer(None, None, None, 0.001, "ConnectError: All connection attempts failed")


def ids(body: bytes) -> set[bytes]:
    return set(ID.findall(body))


def printed(answers: list[Answer]) -> str:
    out = io.StringIO()
    report(answers, Console(file=out, width=100))
    return out.getvalue()


def unknown_fields(value: Any, declared: Any, path: str) -> list[str]:
    """The fields under `value` that the class `declared`, or the class of a nested object, does not have."""
    if isinstance(value, list):
        return [each for item in value for each in unknown_fields(item, declared, path)]
    if not isinstance(value, dict):
        return []
    if value.get("object") == "list":
        return unknown_fields(value["data"], None, path)
    if isinstance(value.get("object"), str):
        declared = DECLARED[value["object"]]
    if declared is None:  # metadata, previous_attributes: the names are the customer's, or checked elsewhere
        return []
    inner = getattr(declared, "_inner_class_types", {})
    here = [f"{path}.{name}" for name in value if name not in declared.__annotations__]
    return here + [
        each for name, item in value.items() for each in unknown_fields(item, inner.get(name), f"{path}.{name}")
    ]


# -- templates ----------------------------------------------------------------------------------------


def test_the_promised_types_are_shipped() -> None:
    """The types that are promised have templates."""
    assert shipped_types() == [
        "balance.available",
        "charge.refunded",
        "checkout.session.completed",
        "customer.created",
        "customer.subscription.deleted",
        "customer.subscription.updated",
        "invoice.paid",
        "invoice.payment_failed",
        "payment_intent.succeeded",
        "v1.billing.meter.error_report_triggered",
    ]


@pytest.mark.parametrize("event_type", shipped_types())
def test_every_template_is_an_event_of_its_type(event_type: str) -> None:
    """Our own parser accepts each template, and finds its type and the id of its object."""
    event = parse_event(build_event(event_type))
    assert event.type == event_type
    assert event.livemode is False
    assert event.thin == (event_type == THIN)
    assert (event.object_id is None) == (event_type == "balance.available")


@pytest.mark.parametrize("event_type", SNAPSHOTS)
def test_stripe_verifies_and_parses_every_snapshot(event_type: str) -> None:
    """stripe-python's own verification accepts our signature and our template."""
    body = build_event(event_type)
    event = stripe.Webhook.construct_event(body, sign(body, SECRET), SECRET)
    assert event.type == event_type
    assert event.api_version == stripe.api_version


def test_stripe_verifies_and_parses_the_thin_event() -> None:
    """stripe-python's own parser knows the thin event and its related object."""
    body = build_event(THIN)
    thin: Any = stripe.StripeClient("sk_test_1").parse_event_notification(body, sign(body, SECRET), SECRET)
    assert type(thin).__name__ == "V1BillingMeterErrorReportTriggeredEventNotification"
    assert thin.related_object.url == f"/v1/billing/meters/{thin.related_object.id}"
    assert "data" not in orjson.loads(body)


@pytest.mark.parametrize("event_type", SNAPSHOTS)
def test_no_template_holds_a_field_that_stripe_has_not(event_type: str) -> None:
    """Every field, however deep, is one that stripe-python declares for that object."""
    assert unknown_fields(orjson.loads(build_event(event_type)), None, "") == []


@pytest.mark.parametrize("event_type", shipped_types())
@pytest.mark.parametrize(
    ("head", "mark"), [("evt_1", b"\xff" * 4), ("evt_1", b"\xff" * 12), ("evt_a1b2c3", b"\xff" * 8)]
)
def test_what_takes_the_place_of_a_mark_makes_another_event(event_type: str, head: str, mark: bytes) -> None:
    """The event's id is head and mark, however short. Two replacements share no id at all, and both are events."""
    marked = marked_event(event_type, head, mark)
    bodies = [marked.replace(mark, digit * len(mark)) for digit in (b"0", b"1")]
    events = [parse_event(body) for body in bodies]
    assert [event.id for event in events] == [head + digit * len(mark) for digit in "01"]
    assert ids(bodies[0]) & ids(bodies[1]) == set()


def test_an_update_names_what_changed() -> None:
    """`previous_attributes` differs from the object that it belongs to, in the field that it names."""
    data = orjson.loads(build_event("customer.subscription.updated"))["data"]
    before, after = (each["items"]["data"][0] for each in (data["previous_attributes"], data["object"]))
    assert before["price"]["unit_amount"] < after["price"]["unit_amount"]
    assert before["id"] == after["id"]
    assert unknown_fields(data["previous_attributes"], stripe.Subscription, "") == []


@pytest.mark.parametrize("event_type", shipped_types())
def test_every_id_is_fresh(event_type: str) -> None:
    """Two events of one type share no id: not that of the event, not that of the object, and none inside."""
    first, second = build_event(event_type), build_event(event_type)
    assert ids(first)
    assert ids(first).isdisjoint(ids(second))
    assert parse_event(first).id.startswith("evt_")


def test_references_within_an_event_stay_consistent() -> None:
    """An id that recurs, alone or inside a URL, is replaced by the same new id everywhere."""
    invoice = orjson.loads(build_event("invoice.payment_failed"))["data"]["object"]
    line = invoice["lines"]["data"][0]
    assert line["invoice"] == invoice["id"]
    assert invoice["lines"]["url"] == f"/v1/invoices/{invoice['id']}/lines"
    assert line["subscription"] == invoice["parent"]["subscription_details"]["subscription"]
    intent = orjson.loads(build_event("payment_intent.succeeded"))["data"]["object"]
    assert intent["client_secret"].startswith(f"{intent['id']}_secret_")


@pytest.mark.parametrize("event_type", shipped_types())
def test_only_ids_and_instants_are_renewed(event_type: str) -> None:
    """Amounts, types and all other text stay as they are in the template."""
    instants = rb'\b[12]\d{9}\b|(?<="created": )"20[^"]+"'
    template = (Path(firstclaim.__file__).parent / "sending" / "templates" / f"{event_type}.json").read_bytes()
    built = (ID.sub(b"*", re.sub(instants, b"*", body)) for body in (build_event(event_type) + b"\n", template))
    assert next(built) == next(built)


@pytest.mark.parametrize("event_type", shipped_types())
def test_an_event_is_created_now(event_type: str) -> None:
    """A template's own date is never sent: the event is created at the time of the call."""
    before = datetime.now(UTC).replace(microsecond=0)
    assert before <= parse_event(build_event(event_type)).created <= datetime.now(UTC)


def test_the_other_instants_move_along() -> None:
    """A failed payment's next attempt is three days after it, whenever the event is built."""
    row = payment_failure(parse_event(build_event("invoice.payment_failed")))
    assert row["next_attempt_at"] - row["failed_at"] == timedelta(days=3)


def test_a_given_id_is_used() -> None:
    """`--id` sets the id of the event, and no other id."""
    body = build_event("invoice.paid", "evt_mine")
    assert parse_event(body).id == "evt_mine"
    assert parse_event(body).object_id != parse_event(build_event("invoice.paid")).object_id


@pytest.mark.parametrize("event_id", ["", "evt_\N{EURO SIGN}", "evt_\n", "\ud800"])
def test_an_id_that_cannot_be_sent_is_refused(event_id: str) -> None:
    """An id that would break the body is refused with a sentence, not a traceback."""
    with pytest.raises(ValueError, match="--id: expected printable ASCII"):
        build_event("invoice.paid", event_id)


@pytest.mark.parametrize(
    ("event_type", "near"),
    [
        ("invoice.payment_faild", "invoice.payment_failed"),
        ("customer.subscription.update", "customer.subscription.updated"),
    ],
)
def test_an_unknown_type_names_the_closest(event_type: str, near: str) -> None:
    """The error for a misspelt type names the most similar type, all shipped types, and `--file`."""
    with pytest.raises(ValueError, match=f"did you mean {re.escape(near)}\\?") as refused:
        build_event(event_type)
    assert all(each in str(refused.value) for each in [*shipped_types(), "--file"])


@pytest.mark.parametrize("event_type", ["zzz", "", "../handlers/invoices", "invoice.paid.json"])
def test_a_strange_type_reaches_no_file(event_type: str) -> None:
    """Only the name of a shipped type becomes a path."""
    with pytest.raises(ValueError, match="no template for"):
        build_event(event_type)


# -- --file -------------------------------------------------------------------------------------------


def test_a_file_is_sent_byte_for_byte(tmp_path: Path) -> None:
    """Without `--id` no byte of the file changes: spacing, order and duplicate keys are part of the test case."""
    body = b'{ "object":"event",\r\n "id" : "evt_1", "id": "evt_2", "n": 1.50 }\n'
    (tmp_path / "event.json").write_bytes(body)
    assert read_event(tmp_path / "event.json") == body


def test_a_file_can_be_given_another_id(tmp_path: Path) -> None:
    """`--id` replaces the id and leaves the rest."""
    (tmp_path / "event.json").write_bytes(event_body("invoice.paid", "evt_old"))
    body = read_event(tmp_path / "event.json", "evt_new")
    assert orjson.loads(body) == orjson.loads((tmp_path / "event.json").read_bytes()) | {"id": "evt_new"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[]", "expected an event"),
        (b'"evt_1"', "expected an event"),
    ],
)
def test_a_bad_file_is_a_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    """Missing, unreadable, not JSON or not an object: each error is a sentence with the file's name."""
    path = tmp_path / "event.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--file .*event\.json: .*{sentence}"):
        read_event(path)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    """A path that cannot be read is reported like a missing one."""
    with pytest.raises(ValueError, match="Is a directory"):
        read_event(tmp_path)


# -- signing ------------------------------------------------------------------------------------------


def test_the_signature_is_stripes() -> None:
    """Our header and stripe-python's are the same for the same text."""
    body = build_event("invoice.paid")
    theirs = stripe.WebhookSignature.generate_signature_header(body.decode(), SECRET, 1_793_610_041)
    assert sign(body, SECRET, 1_793_610_041) == theirs


def test_bytes_that_are_no_text_are_signed() -> None:
    """A body that is not UTF-8 is signed over its bytes, because a receiver must be tested with such a body too."""
    assert re.fullmatch(r"t=7,v1=[0-9a-f]{64}", sign(b"\xff", SECRET, 7))
    assert sign(b"\xff", SECRET, 7) != sign(b"\xfe", SECRET, 7)


def test_the_suites_own_headers_verify() -> None:
    """`signed` gives the headers that Stripe sends, with the given timestamp and secret."""
    body = old_shape_payment_failed(id="evt_1")
    headers = signed(body, "whsec_other")
    assert stripe.WebhookSignature.verify_header(body, headers["Stripe-Signature"], "whsec_other", 300)
    assert signed(body, at=5)["Stripe-Signature"].startswith("t=5,")


# -- sending ------------------------------------------------------------------------------------------


def answering(handle: Callable[[httpx.Request], httpx.Response]) -> httpx.MockTransport:
    return httpx.MockTransport(handle)


async def test_every_copy_is_posted_and_answered() -> None:
    """As many copies as requested arrive, with the same bytes and valid signatures; the callback gets each answer."""
    body = build_event("invoice.paid")
    seen: list[bytes] = []
    heard: list[Answer] = []

    def handle(request: httpx.Request) -> httpx.Response:
        assert stripe.WebhookSignature.verify_header(request.content, request.headers["Stripe-Signature"], SECRET, 300)
        seen.append(request.content)
        return httpx.Response(200, json={"action": "ignored", "processed": len(seen) == 1})

    answers = await send(URL, body, SECRET, 250, heard.append, transport=answering(handle))
    assert seen == [body] * 250
    assert heard == answers
    assert sum(answer.processed is True for answer in answers) == 1
    assert all(answer.status == 200 and answer.error is None and answer.seconds >= 0 for answer in answers)


async def test_copies_are_in_flight_together() -> None:
    """No copy is answered before all have been sent: they are in flight at once."""

    class Barrier(httpx.AsyncBaseTransport):
        def __init__(self, parties: int) -> None:
            self.barrier = asyncio.Barrier(parties)

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            async with asyncio.timeout(10):
                await self.barrier.wait()
            return httpx.Response(200, json={})

    answers = await send(URL, b"{}", SECRET, 200, lambda _: None, transport=Barrier(200))
    assert [answer.status for answer in answers] == [200] * 200


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            httpx.ConnectError("refused"),
            f"ConnectError: cannot connect to {SERVER} (refused): check that `firstclaim serve` runs there, "
            "or give --url",
        ),
        (
            httpx.ReadTimeout(""),
            f"ReadTimeout: no answer from {SERVER} within 30 s: check what listens there, and its log",
        ),
        (httpx.RemoteProtocolError("garbled"), "RemoteProtocolError: garbled"),
    ],
)
async def test_a_server_that_is_away_is_an_answer(error: Exception, said: str) -> None:
    """A refused connection or a timeout is counted like an answer, with the server, and no more of the address."""

    def handle(request: httpx.Request) -> httpx.Response:
        raise error

    url = URL.replace("://", "://user:c4n4ry@")
    answers = await send(url, b"{}", SECRET, 3, lambda _: None, transport=answering(handle))
    assert [answer.status for answer in answers] == [None] * 3
    assert {answer.error for answer in answers} == {said}
    assert exit_code(answers) == 1


@pytest.mark.parametrize(
    "url", ["", "nowhere", "ftp://host/", "http://", "http://[::1", "http://host:x/", "http://host:65536/"]
)
async def test_what_is_not_a_url_is_refused(url: str) -> None:
    """An invalid `--url` is refused with a sentence before anything is sent, and is never resolved."""
    with pytest.raises(ValueError, match=r"^--url: "):
        await send(url, b"{}", SECRET, 1, lambda _: None)


def test_a_part_of_the_address_is_not_shown() -> None:
    """A password with a slash in it is read as a port: what is wrong is named, and not what stood there."""
    with pytest.raises(ValueError, match=r"^--url: Invalid port; expected e\.g\. http://") as refused:
        check_url("http://user:c4n/4ry@host/c4nary")
    assert "c4n" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTPS_PROXY", "socks5://user:c4nary@127.0.0.1:1"),
        ("HTTPS_PROXY", "foo://user:c4nary@127.0.0.1:1"),
        ("ALL_PROXY", "http://user:c4nary@127.0.0.1:c4nary"),
        ("NO_PROXY", "[::c4nary"),
        ("SSL_CERT_FILE", "/c4nary"),
        ("SSL_CERT_FILE", __file__),
    ],
)
async def test_an_environment_that_cannot_be_used_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy or certificates that cannot be used: the variable is named, without its value, and nothing is sent."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable) as refused:
        await send("https://example.invalid/", b"{}", SECRET, 2, lambda _: None)
    assert "c4nary" not in str(refused.value)


async def test_a_proxy_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the proxy that cannot be reached, and not the server."""
    monkeypatch.setenv("HTTPS_PROXY", "http://user:c4nary@127.0.0.1:1")
    (answer,) = await send("https://example.invalid/c4nary", b"{}", SECRET, 1, lambda _: None)
    assert answer.error is not None
    assert "cannot connect to https://example.invalid through the environment's proxy" in answer.error
    assert "c4nary" not in answer.error


async def test_a_server_without_tls_is_named() -> None:
    """It answers, so nothing says that it cannot be reached: TLS has failed."""

    async def answer_in_plain_text(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer_in_plain_text, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        (answer,) = await send(f"https://127.0.0.1:{port}/", b"{}", SECRET, 1, lambda _: None)
    assert answer.error is not None
    assert answer.error.startswith(f"ConnectError: TLS fails with https://127.0.0.1:{port} (")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"[]", b"null", b"\xff", b'{"action": 7, "processed": "yes"}', b'{"action": null}'],
)
async def test_an_answer_that_is_not_ours_keeps_its_status(content: bytes) -> None:
    """A proxy's page, or a body of another form, is a status without an action."""
    transport = answering(lambda _: httpx.Response(502, content=content))
    (answer,) = await send(URL, b"{}", SECRET, 1, lambda _: None, transport=transport)
    assert (answer.status, answer.action, answer.processed, answer.error) == (502, None, None, None)


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        (URL, False),
        ("http://127.0.0.1:8000/", False),
        ("http://[::1]:8000/", False),
        ("HTTPS://LOCALHOST/", False),
        ("https://staging.example.com/", True),
    ],
)
def test_no_proxy_stands_before_this_machine(url: str, trusted: bool) -> None:
    """A proxy in the environment is used for other hosts, and never for a service on this machine."""
    assert _client(url, httpx.create_ssl_context(), None).trust_env is trusted


async def test_a_redirect_is_not_followed() -> None:
    """Stripe counts a redirect as a failure, so it is reported and not followed."""
    transport = answering(lambda _: httpx.Response(307, headers={"Location": "http://elsewhere/"}))
    (answer,) = await send(URL, b"{}", SECRET, 1, lambda _: None, transport=transport)
    assert answer.status == 307


# -- the report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ([DONE], 0),
        ([DONE, *[DUPLICATE] * 49], 0),
        ([DUPLICATE] * 3, 0),
        ([DEFERRED] * 3, 0),
        ([DONE, REFUSED], 0),
        ([DONE, DUPLICATE, DONE], 1),
        ([REFUSED] * 3, 1),
        ([Answer(400, "rejected", False, 0.1, None)] * 3, 1),
        ([Answer(500, "failed", False, 0.1, None)], 1),
        ([], 1),
    ],
)
def test_the_exit_code_is_the_promise(answers: list[Answer], code: int) -> None:
    """Processed twice, or never accepted: exit code 1. Processed once, or a duplicate: 0."""
    assert exit_code(answers) == code


def test_the_report_counts_every_kind_of_answer() -> None:
    """Status, action and processed are counted together, and the verdict is a sentence."""
    lines = printed([DONE, *[DUPLICATE] * 48, REFUSED]).splitlines()
    cells = [line.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split() for line in lines]
    assert ["200", "payment_failure_recorded", "yes", "1"] in cells
    assert ["200", "ignored", "no", "48"] in cells
    assert ["-", "ConnectError", "-", "1"] in cells
    assert "reason: ConnectError: All connection attempts failed" in lines
    assert lines[-1] == "Processed once, of 50 copies. 1 had no answer."


def test_a_narrow_terminal_loses_nothing() -> None:
    """At 40 columns, a long action goes on in the next line."""
    out = io.StringIO()
    report([Answer(200, "access_granted_for_a_year", True, 0.01, None)], Console(file=out, width=40))
    cells = [line.split("│")[2].strip() for line in out.getvalue().splitlines() if line.startswith("│")]
    assert "".join(cells) == "access_granted_for_a_year"
    assert "…" not in out.getvalue()


def test_the_latency_is_of_answered_copies() -> None:
    """p50 and p99 are latencies of answered copies, in milliseconds; an error has no latency."""
    answers = [Answer(200, "ignored", False, each / 1000, None) for each in range(1, 101)]
    assert "latency p50 50.0 ms, p99 99.0 ms" in printed([*answers, REFUSED])
    assert "latency p50 2.0 ms, p99 3.0 ms" in printed(answers[:3])
    assert "latency p50 12.0 ms, p99 12.0 ms" in printed([DONE])
    assert "latency" not in printed([REFUSED])


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([DONE], "Processed once, of 1 copy."),
        ([DONE, DONE, DUPLICATE], "Processed 2 times: of 3 copies of one event, at most one may be processed."),
        ([DUPLICATE] * 2, "Not processed, of 2 copies. Most frequent answer: 200 ignored."),
        (
            [Answer(404, None, None, 0.1, None)],
            "Not processed, of 1 copy. Most frequent answer: 404 without an action.",
        ),
        ([REFUSED] * 2, "No copy was answered: ConnectError: All connection attempts failed"),
        ([], "No copy was answered: none was sent"),
    ],
)
def test_the_verdict_is_one_line(answers: list[Answer], verdict: str) -> None:
    """The last line gives the result, and the reason when the command fails."""
    assert printed(answers).splitlines()[-1] == verdict


def test_what_a_server_says_cannot_write_on_the_terminal() -> None:
    """Markup and escape sequences in an answer are printed as text."""
    text = printed([Answer(200, "[bold]x[/nope] \x1b[2J", False, 0.1, None)])
    assert "[bold]x[/nope]" in text
    assert "\x1b" not in text


def test_templates_are_pretty_printed_as_stripes_are() -> None:
    """Stripe signs indented JSON, so a receiver that re-serialises before it verifies fails with ours too."""
    body = build_event("customer.created")
    assert body == json.dumps(json.loads(body), indent=2, ensure_ascii=False).encode()


# -- what the command line changes and shows ----------------------------------------------------------


def test_fields_can_be_set() -> None:
    """`--set` changes what it names and nothing else: JSON as its value, other text as text, items by number."""
    body = build_event("invoice.paid")
    changes = ["data.object.currency=usd", "livemode=true", "data.object.lines.data.0.amount=5"]
    changes += ["data.object.metadata.note=a=b", "account=acct_1"]
    event, before = orjson.loads(changed(body, changes)), orjson.loads(body)
    invoice = event["data"]["object"]
    assert (invoice["currency"], event["livemode"], invoice["metadata"]["note"]) == ("usd", True, "a=b")
    assert invoice["lines"]["data"][0]["amount"] == 5
    before["data"]["object"]["currency"] = "usd"
    before["data"]["object"]["metadata"]["note"] = "a=b"
    before |= {"livemode": True, "account": "acct_1"}
    before["data"]["object"]["lines"]["data"][0]["amount"] = 5
    assert event == before
    assert changed(body, []) is body


def test_a_field_of_another_api_version_can_be_set() -> None:
    """What the template's version does not have is accepted together with `api_version`."""
    event = orjson.loads(changed(build_event("invoice.paid"), ["data.object.paid=true", "api_version=2024-06-20"]))
    assert event["data"]["object"]["paid"] is True


def test_the_report_shows_the_event_and_the_reasons() -> None:
    """The id that was sent, and each reason once, with nothing that an unknown server could inject."""
    body = build_event("invoice.paid")
    out = io.StringIO()
    answers = [DONE, *[Answer(200, "ignored", False, 0.003, None, "Event x already completed")] * 2]
    answers.append(Answer(500, "failed", False, 0.003, None, "bad\x1b[31m"))
    report(answers, Console(file=out, width=100), event_id_of(body))
    lines = out.getvalue().splitlines()
    assert lines[0] == f"event {orjson.loads(body)['id']}"
    assert lines.count("reason: Event x already completed") == 1
    assert "reason: 'bad\\x1b[31m'" in lines
