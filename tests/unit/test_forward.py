"""Forwarding: what a file of targets may say, the two signatures, and the breaker, which only ever delays."""

import hashlib
import hmac
import random
import time
from pathlib import Path

import pytest
import stripe
from pydantic import SecretStr

from firstclaim.errors import ConfigurationError
from firstclaim.handlers.forward.breaker import Breaker, Request, Result
from firstclaim.handlers.forward.delivery import Forwarder
from firstclaim.handlers.forward.signing import key_of, signed_headers
from firstclaim.handlers.forward.targets import Target, load_targets
from firstclaim.registry import Registry
from firstclaim.server.preflight import check_handlers
from firstclaim.settings import Settings
from tests.canaries import STORY
from tests.forward_target import SECRET, ForwardTarget, status, targets_file

MODULE = "firstclaim.handlers.forward"
URL = "https://crm.example.com/hooks/c4n4rypath"


def settings_of(path: Path | None, handlers: tuple[str, ...] = (MODULE,)) -> Settings:
    """Settings with this file."""
    return Settings(stripe_webhook_secrets=(SecretStr("whsec_a"),), handlers=handlers, forward_targets=path)


# -- the file -----------------------------------------------------------------------------------------


def test_each_target_is_a_handler(tmp_path: Path) -> None:
    """A target gets every event that its types cover: beside others it is one of several handlers, by its name."""
    path = targets_file(
        tmp_path / "targets.toml",
        {"name": "all", "url": URL, "types": ["*"]},
        {"name": "crm", "url": URL, "types": ["invoice.*", "customer.created"], "timeout_seconds": 5, "concurrency": 2},
        {"name": "erp", "url": URL, "types": ["invoice.paid"]},
    )
    for _ in range(2):  # a second load declares none twice
        registry = Registry.load([MODULE], settings_of(path))
        names = {handler.pattern: handler.name for handler in registry if not handler.pattern.startswith("handler:")}
        assert names == {
            "*": "forward:all",
            "invoice.*": "forward:all, forward:crm",
            "customer.created": "forward:all, forward:crm",
            "invoice.paid": "forward:all, forward:crm, forward:erp",
        }
    members = {handler.pattern for handler in registry} - set(names)
    assert members == {"handler:forward:all", "handler:forward:crm", "handler:forward:erp"}


def test_the_defaults_and_the_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`secret_env` names a variable; a target says no more than it must, and shows neither secret nor address."""
    monkeypatch.setenv("CRM_SECRET", SECRET)
    path = tmp_path / "targets.toml"
    path.write_text(f'[[target]]\nname = "crm"\nurl = "{URL}"\ntypes = ["*"]\nsecret_env = "CRM_SECRET"\n')
    [target] = load_targets(path, deadline_seconds=30)
    assert (target.secret.get_secret_value(), target.timeout_seconds, target.concurrency) == (SECRET, 10, 8)
    assert SECRET not in repr(target)
    assert "c4n4rypath" not in repr(target)


@pytest.mark.parametrize("host", ["256.256.256.256", "xn--a", "xn--", "[v1.a]", "h/" + "x" * 70_000])
def test_an_address_that_no_request_can_have(tmp_path: Path, host: str) -> None:
    """What the HTTP client would refuse for each event is refused at the start."""
    path = targets_file(tmp_path / "targets.toml", {"name": "crm", "url": f"http://{host}/"})
    with pytest.raises(ExceptionGroup) as caught:
        load_targets(path, deadline_seconds=30)
    assert "target 1 (crm): url: expected http" in str(caught.value.exceptions[0])


async def test_no_cookie_is_kept() -> None:
    """The targets share a client: what one of them sets is sent to no other, nor back."""
    async with ForwardTarget().listening() as target:
        target.respond = lambda _: status(200, b"", "Set-Cookie: session=c4n4ry; Path=/\r\n")
        crm = Target.model_validate({"name": "crm", "url": target.url, "types": ["*"], "secret": SECRET})
        await Forwarder(crm).forward("evt_1", b'{"id":"evt_1"}')
        await Forwarder(crm).forward("evt_2", b'{"id":"evt_2"}')
        assert len(target.received) == 2
        assert all("cookie" not in each.headers for each in target.received)


async def test_this_machine_is_behind_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that the environment names is for other targets: it is not asked for one on the loopback."""
    async with ForwardTarget().listening() as proxy, ForwardTarget().listening() as target:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        for number, url in enumerate((target.url, target.url.replace("127.0.0.1", "localhost"), "http://crm.invalid")):
            crm = Target.model_validate({"name": "crm", "url": url, "types": ["*"], "secret": SECRET})
            await Forwarder(crm).forward(f"evt_{number}", b'{"id":"evt_%d"}' % number)
        assert target.ids == {"evt_0", "evt_1"}
        assert proxy.ids == {"evt_2"}


def test_every_fault_of_the_file_is_named(tmp_path: Path) -> None:
    """Together, each with its target and field, at the start and by `check`; no fault has a secret or an address."""
    path = tmp_path / "targets.toml"
    path.write_text(
        f"""
        retries = 3
        [[target]]
        name = "crm"
        url = "ftp://{STORY[:8]}.example.com"
        types = ["invoice*", "invoice.paid"]
        secret = "whsec_c4n4ry"
        colour = "red"
        [[target]]
        name = "Erp"
        url = "{URL}"
        types = []
        secret = "c4n4ry"
        secret_env = "NOT_SET"
        [[target]]
        name = "erp"
        url = "{URL} x"
        types = ["*"]
        secret_env = "NOT_SET"
        [[target]]
        name = "slow"
        url = "{URL}"
        types = ["*"]
        secret = "{SECRET}"
        timeout_seconds = 29
        concurrency = 0
        [[target]]
        name = "late"
        url = "{URL}"
        types = ["*"]
        secret = "{SECRET}"
        timeout_seconds = 29
        [[target]]
        name = "twice"
        url = "{URL}"
        types = ["*"]
        secret = "{SECRET}"
        [[target]]
        name = "twice"
        url = "{URL}"
        types = ["*"]
        """
        f'secret = "{SECRET}"\n[[target]]\ntimeout_seconds = true\nconcurrency = "8"'
    )
    with pytest.raises(ConfigurationError) as caught:
        Registry.load([MODULE], settings_of(path))
    place = f"FIRSTCLAIM_FORWARD_TARGETS: {path}: "
    assert [fault.removeprefix(place) for fault in caught.value.faults] == [
        "'retries' is not known: expected [[target]] for each target",
        "target 1 (crm): url: expected http:// or https://, a host and a path, e.g. https://crm.example.com/webhooks",
        'target 1 (crm): types.1: expected an event type, "prefix.*" or "*"',
        "target 1 (crm): secret: not base64 after whsec_; expected whsec_ and 24 to 64 random bytes in base64",
        "target 1 (crm): colour: not known; expected some of name, url, types, secret, timeout_seconds, concurrency, "
        "secret_env",
        "target 2: secret and secret_env are both there: leave one of them out",
        "target 2: name: expected a lower-case letter, then at most 31 of a-z, 0-9, _ and -",
        "target 2: types: List should have at least 1 item after validation, not 0",
        "target 2: secret: expected whsec_ and 24 to 64 random bytes in base64",
        "target 3 (erp): secret_env: expected the name of an environment variable that is set",
        "target 3 (erp): url: expected http:// or https://, a host and a path, e.g. https://crm.example.com/webhooks",
        "target 4 (slow): concurrency: Input should be greater than or equal to 1",
        "target 5 (late): timeout_seconds: expected at most 28, which is 2 s below FIRSTCLAIM_HANDLER_DEADLINE_SECONDS",
        "target 8: name: is missing",
        "target 8: url: is missing",
        "target 8: types: is missing",
        "target 8: secret: is missing, and so is secret_env",
        "target 8: timeout_seconds: Input should be a valid number",
        "target 8: concurrency: Input should be a valid integer",
        "2 targets are called twice",
    ]
    text = "".join(caught.value.faults)
    assert "c4n4ry" not in text
    assert STORY[:8] not in text
    checks = check_handlers(settings_of(path))
    assert [check.detail for check in checks] == list(caught.value.faults)
    assert all(check.fatal for check in checks)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[[target]]\nname = \n", "is not TOML: Invalid value (at line 2, column 8)"),
        (b"concurrency = " + b"9" * 5000, "is not TOML: "),
        (b"target = " + b"[" * 100_000, "is not TOML: "),
        (b"\xff", "is not UTF-8"),
        (b"", "expected [[target]], once for each target"),
        (b"target = 3", "expected [[target]], once for each target"),
        (b"[target]\nname = 'x'", "expected [[target]], once for each target"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, says: str) -> None:
    """What is no TOML, or has no targets, is named with the place."""
    path = tmp_path / "targets.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        Registry.load([MODULE], settings_of(path))
    assert caught.value.faults[0].startswith(f"FIRSTCLAIM_FORWARD_TARGETS: {path}")
    assert says in caught.value.faults[0]


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    """The setting, the file and the module need one another; each fault names what to do."""
    with pytest.raises(
        ConfigurationError, match=r"FIRSTCLAIM_FORWARD_TARGETS is missing: firstclaim\.handlers\.forward"
    ):
        Registry.load([MODULE], settings_of(None))
    with pytest.raises(ConfigurationError, match="cannot be read: No such file or directory"):
        Registry.load([MODULE], settings_of(tmp_path / "none.toml"))
    with pytest.raises(ConfigurationError, match=r"has no effect without firstclaim\.handlers\.forward in FIRSTCL"):
        settings_of(tmp_path, handlers=("firstclaim.handlers",))


@pytest.mark.parametrize(
    "url", ["http://", "https://a:0/", "https://a:b/", "https://ä.example/", "https://a/#b", "a", ""]
)
def test_an_address_that_is_none(tmp_path: Path, url: str) -> None:
    """It is refused without being repeated."""
    path = targets_file(tmp_path / "targets.toml", {"url": url})
    with pytest.raises(ConfigurationError, match=r"target 1 .*: url: expected http:// or https://"):
        Registry.load([MODULE], settings_of(path))


# -- signatures ---------------------------------------------------------------------------------------


def test_the_example_of_standard_webhooks() -> None:
    """The message of the specification gets the signature of the specification."""
    headers = signed_headers(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        b'{"test": 2432232314}',
        1614265330,
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-timestamp"] == "1614265330"


def test_stripes_library_verifies_it() -> None:
    """Code that verifies Stripe's deliveries verifies these with the target's secret, and no others."""
    body, now = b'{"id": "evt_1"}', int(time.time())
    header = signed_headers(SECRET, "evt_1", body, now)["stripe-signature"]
    assert stripe.WebhookSignature.verify_header(body.decode(), header, SECRET, 300)
    for changed, secret in ((body + b" ", SECRET), (body, SECRET + "=")):
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.WebhookSignature.verify_header(changed.decode(), header, secret, 300)
    digest = hmac.new(SECRET.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    assert header == f"t={now},v1={digest}"


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_AAAA", "whsec_" + "A" * 100, "whsec_a b=", "sk_" + "A" * 32])
def test_a_secret_that_is_too_weak(secret: str) -> None:
    """24 to 64 bytes in base64 after whsec_, as the specification has it."""
    with pytest.raises(ValueError, match="expected whsec_ and 24 to 64 random bytes in base64"):
        key_of(secret)


# -- the breaker --------------------------------------------------------------------------------------


class Clock:
    """Seconds that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At 100 s."""
    return Clock()


def fail(breaker: Breaker, times: int) -> None:
    """So many requests fail."""
    for _ in range(times):
        request = breaker.admit()
        assert isinstance(request, Request)
        breaker.note(request, Result.FAILED)


def test_it_opens_after_five_failures_and_probes_once(clock: Clock) -> None:
    """Four failures change nothing. After five, nothing is tried for a second; then one request is, and not two."""
    breaker = Breaker(clock)
    fail(breaker, 4)
    assert not breaker.is_open
    fail(breaker, 1)
    assert breaker.admit() == 1.0
    clock.now += 1
    probe = breaker.admit()
    assert isinstance(probe, Request)
    assert probe.probe
    assert breaker.admit() == 1.0
    breaker.note(probe, Result.ANSWERED)
    assert not breaker.is_open
    assert isinstance(breaker.admit(), Request)


def test_the_pause_grows_to_a_minute(clock: Clock) -> None:
    """Each probe that fails doubles it."""
    breaker = Breaker(clock)
    fail(breaker, 5)
    pauses = []
    for _ in range(8):
        left = breaker.admit()
        assert not isinstance(left, Request)
        pauses.append(left)
        clock.now += left
        fail(breaker, 1)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_what_was_on_its_way_does_not_prolong_it(clock: Clock) -> None:
    """Ten requests at once fail: that is one outage, and its first pause."""
    breaker = Breaker(clock)
    requests = [breaker.admit() for _ in range(10)]
    for request in requests:
        assert isinstance(request, Request)
        breaker.note(request, Result.FAILED)
    assert breaker.admit() == 1.0


def test_a_probe_that_is_interrupted_is_followed_by_another(clock: Clock) -> None:
    """A shutdown or a deadline in the middle of a probe does not leave the breaker open for ever."""
    breaker = Breaker(clock)
    fail(breaker, 5)
    clock.now += 1
    probe = breaker.admit()
    assert isinstance(probe, Request)
    breaker.note(probe, Result.UNKNOWN)
    following = breaker.admit()
    assert isinstance(following, Request)
    assert following.probe


def test_a_pause_that_the_target_asks_for(clock: Clock) -> None:
    """Nothing is tried before, although the target has answered and the breaker is closed."""
    breaker = Breaker(clock)
    request = breaker.admit()
    assert isinstance(request, Request)
    breaker.note(request, Result.ANSWERED, pause_seconds=40)
    assert breaker.admit() == 40
    clock.now += 40
    assert isinstance(breaker.admit(), Request)


@pytest.mark.parametrize("seed", range(20))
def test_it_never_stays_open(clock: Clock, seed: int) -> None:
    """Whatever happens in whichever order: once the target answers, a request gets through within a minute."""
    breaker, choice = Breaker(clock), random.Random(seed)
    open_requests: list[Request] = []
    for _ in range(500):
        clock.now += choice.choice((0, 0, 0.3, 5, 70))
        if isinstance(request := breaker.admit(), Request):
            open_requests.append(request)
        while open_requests and choice.random() < 0.6:
            ended = open_requests.pop(choice.randrange(len(open_requests)))
            pause = choice.choice((None, None, None, 2.0))
            breaker.note(ended, choice.choice(list(Result)), pause_seconds=pause)
    for request in open_requests:
        breaker.note(request, Result.UNKNOWN)
    clock.now += 60
    last = breaker.admit()
    assert isinstance(last, Request)
    breaker.note(last, Result.ANSWERED)
    assert isinstance(breaker.admit(), Request)
