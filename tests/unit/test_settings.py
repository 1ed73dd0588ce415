"""Settings: which values are accepted and refused, and that no message repeats a value."""

import pickle
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from firstclaim.errors import ConfigurationError
from firstclaim.setting_faults import PREFIX
from firstclaim.settings import Settings, environment_name, load_settings
from firstclaim.urls.archive import archive_url, bucket_and_prefix, folder
from firstclaim.urls.notify import notify_url, shown
from firstclaim.urls.postgres import postgres_dsn
from firstclaim.urls.redis import redis_url
from firstclaim.urls.stripe import stripe_base

CANARY = "c4n4rypw"
SECRETS = ("database_url", "redis_url", "stripe_webhook_secrets")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the environment that runs the tests."""
    for field in Settings.model_fields:
        monkeypatch.delenv(environment_name(field), raising=False)


def load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def faults(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as refused:
        load(monkeypatch, **environment)
    assert CANARY not in "".join(traceback.format_exception(refused.value))
    return refused.value.faults


# -- defaults -----------------------------------------------------------------------------------------


def test_an_empty_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run needs no setting, and the numbers are the documented defaults."""
    settings = load(monkeypatch)
    assert settings.embedded_database
    assert (settings.database_url, settings.redis_url, settings.stripe_webhook_secrets) == (None, None, ())
    assert settings.data_dir == Path(".firstclaim")
    assert (settings.handlers, settings.livemode) == (("firstclaim.handlers",), "any")
    assert (settings.lock_ttl_seconds, settings.marker_ttl_seconds) == (20, 96 * 3600)
    assert (settings.lease_seconds, settings.handler_deadline_seconds, settings.idle_in_transaction_seconds) == (
        15,
        30,
        35,
    )
    assert (settings.backoff_first_seconds, settings.backoff_most_seconds) == (5, 3600)
    assert (settings.give_up_seconds, settings.abandoned_most) == (3 * 86_400, 8)
    assert (settings.answer_budget_seconds, settings.body_most_bytes) == (5, 1024 * 1024)


def test_every_field_has_a_name_and_a_reason() -> None:
    """Each setting has its own variable and a description, from which the table in docs/ is generated."""
    names = [environment_name(field) for field in Settings.model_fields]
    assert len(set(names)) == len(names)
    assert all(field.description for field in Settings.model_fields.values())
    plain = {"DATABASE_URL", "REDIS_URL", "STRIPE_WEBHOOK_SECRETS", "STRIPE_API_KEY", "STRIPE_API_BASE", "PORT"}
    assert all(name.startswith(PREFIX) for name in set(names) - plain)


def test_empty_variables_are_unset_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, as in `DATABASE_URL=` in an env file, is the default and not an invalid URL."""
    settings = load(monkeypatch, DATABASE_URL="", REDIS_URL="", FIRSTCLAIM_LEASE_SECONDS="")
    assert settings == Settings()


def test_lists_are_comma_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets and handler modules are comma separated, and spaces around the comma are ignored."""
    settings = load(
        monkeypatch, STRIPE_WEBHOOK_SECRETS="whsec_a, whsec_b", FIRSTCLAIM_HANDLERS="shop.handlers, shop.more"
    )
    assert [secret.get_secret_value() for secret in settings.stripe_webhook_secrets] == ["whsec_a", "whsec_b"]
    assert settings.handlers == ("shop.handlers", "shop.more")


# -- where it listens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "environment", "port"),
    [
        (None, {}, 8000),
        (None, {"PORT": "5000"}, 5000),
        (None, {"PORT": "5000", "FIRSTCLAIM_PORT": "6000"}, 6000),
        (7000, {"PORT": "5000", "FIRSTCLAIM_PORT": "6000"}, 7000),
        (0, {"PORT": "5000"}, 0),
        (None, {"PORT": "", "FIRSTCLAIM_PORT": ""}, 8000),
        (None, {"FIRSTCLAIM_PORT": "tcp://10.0.0.1:80"}, 8000),
        (None, {"FIRSTCLAIM_PORT": "tcp://10.0.0.1:80", "PORT": "5000"}, 5000),
    ],
)
def test_the_port_is_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, flag: int | None, environment: dict[str, str], port: int
) -> None:
    """The option, then FIRSTCLAIM_PORT, then the platform's PORT, then 8000; a link of Kubernetes is no setting."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load_settings(flags={} if flag is None else {"port": flag}).listen_port == port


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8000/webhooks/stripe"),
        ({"FIRSTCLAIM_HOST": "0.0.0.0", "PORT": "80"}, "http://127.0.0.1:80/webhooks/stripe"),  # noqa: S104
        ({"FIRSTCLAIM_HOST": "[::]", "FIRSTCLAIM_WEBHOOK_PATH": "/in/"}, "http://[::1]:8000/in"),
        ({"FIRSTCLAIM_HOST": "shop.internal", "FIRSTCLAIM_ROOT_PATH": "/pay/"}, "http://shop.internal:8000/pay"),
    ],
)
def test_the_endpoint_is_reached_at(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str) -> None:
    """The endpoint's address on this machine follows the host, the port and the paths."""
    assert load(monkeypatch, **environment).webhook_url.startswith(url)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("FIRSTCLAIM_WEBHOOK_PATH", value) for value in ("/", "hooks", "/a b", "/%41", "/a?b", "/../x", "/readyz/")),
        *(("FIRSTCLAIM_WEBHOOK_PATH", value) for value in ("/admin", "/admin/x", "/metrics", "/livez", "//x")),
        *(("FIRSTCLAIM_ROOT_PATH", value) for value in ("pay", "/pay?x", "/a/../b", "//evil.test", "/<x>", "/a\\b")),
        *(("FIRSTCLAIM_HOST", value) for value in ("http://x", "a b", "x/y")),
        *(("FIRSTCLAIM_PORT", value) for value in ("-1", "65536", "http://x", "8000/tcp")),
        *(("PORT", value) for value in ("0", "65536", "$PORT")),
        *(("FIRSTCLAIM_WORKERS", value) for value in ("0", "65", "auto")),
        *(("FIRSTCLAIM_KEEPALIVE_SECONDS", value) for value in ("0", "3601")),
    ],
)
def test_where_it_cannot_listen(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """An address or a path that cannot be served as it is written is refused by name."""
    [fault] = faults(monkeypatch, **{name: value})
    assert fault.startswith(f"{name}: ")


def test_a_fault_of_an_option_names_the_option() -> None:
    """What the command line got wrong is not reported as a variable that nobody has set."""
    with pytest.raises(ConfigurationError) as refused:
        load_settings(flags={"root_path": "pay"})
    assert refused.value.faults == (
        "--root-path: expected a path that begins with /, of letters, digits and . _ ~ -, e.g. /pay",
    )


# -- faults -------------------------------------------------------------------------------------------


def test_every_fault_at_once_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """All faults are reported at once, each in a line that begins with its variable."""
    found = faults(
        monkeypatch,
        DATABASE_URL=f"mysql://root:{CANARY}@db/shop",
        REDIS_URL=f"redis://:{CANARY}@cache:port/0",
        STRIPE_WEBHOOK_SECRETS=f"whsec_{CANARY},,",
        FIRSTCLAIM_LEASE_SECONDS=CANARY,
        FIRSTCLAIM_LIVEMODE=CANARY,
        FIRSTCLAIM_HANDLER_SLOTS="0",
        FIRSTCLAIM_HANLDERS=CANARY,
    )
    assert sorted(fault.partition(":")[0].partition(" ")[0] for fault in found) == [
        "DATABASE_URL",
        "FIRSTCLAIM_HANDLER_SLOTS",
        "FIRSTCLAIM_HANLDERS",
        "FIRSTCLAIM_LEASE_SECONDS",
        "FIRSTCLAIM_LIVEMODE",
        "REDIS_URL",
        "STRIPE_WEBHOOK_SECRETS",
    ]


@pytest.mark.parametrize("field", sorted(set(Settings.model_fields) - {"handlers", "data_dir", "redis_prefix"}))
def test_no_fault_repeats_its_value(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """If a password is set in the wrong variable, the message names only the variable."""
    name = environment_name(field)
    value = f"{CANARY},{CANARY} x" if field == "stripe_webhook_secrets" else f"://{CANARY}"
    secret = {"STRIPE_WEBHOOK_SECRETS": "whsec_a"} if field == "database_url" else {}
    found = faults(monkeypatch, **secret, **{name: value})
    assert [fault.partition(":")[0].partition(" ")[0] for fault in found] == [name]


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{CANARY}@h/db",
        f"postgresql://u:{CANARY}@h:port/db",
        f"postgresql://u:{CANARY}@h:99999/db",
        f"postgresql://u:{CANARY}@[::1/db",
        f"postgresql://u:5{CANARY}?x@h/db",
        f"postgresql://u:5#{CANARY}@h/db",
        f"postgresql://u:5/{CANARY}@h/db",
        f"postgresql://u:{CANARY}@h/db?pgbouncer=true",
        f"postgresql:{CANARY}",
        CANARY,
    ],
)
def test_a_bad_postgres_url_keeps_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The message about an invalid DATABASE_URL never repeats its password, also with unescaped characters in it."""
    [fault] = faults(monkeypatch, DATABASE_URL=url, STRIPE_WEBHOOK_SECRETS="whsec_a")
    assert fault.startswith("DATABASE_URL: ")


@pytest.mark.parametrize(("prefix", "fits"), [("shop:", True), ("{shop}:", True), ("{}:", False), ("a{b:", False)])
def test_a_prefix_on_a_cluster(prefix: str, fits: bool) -> None:
    """A { must begin a hash tag there, or the probe of a master would have a key of another one."""
    url = SecretStr("redis+cluster://h1,h2")
    assert Settings(redis_prefix=prefix).redis_prefix == prefix
    with nullcontext() if fits else pytest.raises(ConfigurationError, match="must begin a hash tag"):
        Settings(redis_prefix=prefix, redis_url=url)


@pytest.mark.parametrize(
    "url",
    [
        f"http://:{CANARY}@h",
        f"redis://:{CANARY}@h:port",
        f"redis://u:5?{CANARY}@h:1/0",
        f"redis://u:5#{CANARY}@h:1/0",
        f"redis://u:5/{CANARY}@h:1/0",
        f"redis+sentinel://:{CANARY}@a:1,b:2/main/first",
        f"redis://:{CANARY}@h?unheard_of=99",
        f"unix://:{CANARY}@",
        CANARY,
    ],
)
def test_a_bad_redis_url_keeps_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The message about an invalid REDIS_URL never repeats its password, also with unescaped characters in it."""
    [fault] = faults(monkeypatch, REDIS_URL=url)
    assert fault.startswith("REDIS_URL: ")


def test_settings_never_show_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repr, the str and the JSON dump of valid settings hold no password, key or signing secret."""
    settings = load(
        monkeypatch,
        DATABASE_URL=f"postgresql://u:{CANARY}@h/db",
        REDIS_URL=f"redis://:{CANARY}@h",
        STRIPE_WEBHOOK_SECRETS=f"whsec_{CANARY}",
        STRIPE_API_KEY=f"rk_live_{CANARY}",
        FIRSTCLAIM_NOTIFY_URL=f"https://hooks.slack.com/services/{CANARY}",
    )
    assert settings.stripe_webhook_secrets[0].get_secret_value() == f"whsec_{CANARY}"
    assert settings.stripe_api_key is not None
    assert settings.stripe_api_key.get_secret_value() == f"rk_live_{CANARY}"
    assert CANARY not in repr(settings) + str(settings) + settings.model_dump_json()


@pytest.mark.parametrize("secrets", ["whsec_a,", ",whsec_a", "whsec_a,,whsec_b", " ", ",", "whsec_a, ,whsec_b"])
def test_a_blank_secret_is_refused(monkeypatch: pytest.MonkeyPatch, secrets: str) -> None:
    """A blank secret is refused, because anybody could sign with it."""
    [fault] = faults(monkeypatch, STRIPE_WEBHOOK_SECRETS=secrets)
    assert fault.startswith("STRIPE_WEBHOOK_SECRETS: one of the secrets is blank")


@pytest.mark.parametrize("secret", ["whsec_\N{EURO SIGN}", "whsec_a whsec_b"])
def test_an_impossible_secret_is_refused(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """A secret that Stripe cannot have issued is refused at the start: no signature would ever match it."""
    [fault] = faults(monkeypatch, STRIPE_WEBHOOK_SECRETS=secret)
    assert fault.startswith("STRIPE_WEBHOOK_SECRETS: a secret holds a space or a non-ASCII")


@pytest.mark.parametrize(
    "key", [f"pk_live_{CANARY}", f"whsec_{CANARY}", f"sk_{CANARY} ", f"sk_{CANARY}\n", "sk_\u20ac", " "]
)
def test_a_key_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """A publishable key, a signing secret and a key with white space are refused, because Stripe would refuse them."""
    [fault] = faults(monkeypatch, STRIPE_API_KEY=key)
    assert fault.startswith("STRIPE_API_KEY: expected a secret key (sk_...) or a restricted one (rk_...)")


def test_a_database_of_your_own_needs_your_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DATABASE_URL requires signing secrets, as a generated one would verify nothing; a migration needs none."""
    [fault] = faults(monkeypatch, DATABASE_URL="postgresql://h/db")
    assert fault.startswith("STRIPE_WEBHOOK_SECRETS is missing or blank")
    assert load_settings(receiving=False).stripe_webhook_secrets == ()


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("FIRSTCLAIM_LEASE_SECOND", "FIRSTCLAIM_LEASE_SECONDS"),
        ("FIRSTCLAIM_HANDLER", "FIRSTCLAIM_HANDLERS"),
        ("FIRSTCLAIM_REDIS_TIMEOUT", "FIRSTCLAIM_REDIS_TIMEOUT_SECONDS"),
    ],
)
def test_a_misspelt_name_is_a_fault(monkeypatch: pytest.MonkeyPatch, name: str, suggestion: str) -> None:
    """A misspelt setting is refused, with the name that was probably meant."""
    assert faults(monkeypatch, **{name: CANARY}) == (f"{name} is not a setting; did you mean {suggestion}?",)


def test_an_unknown_name_is_a_fault_without_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown setting that resembles no other gets no suggestion, and names without our prefix are ignored."""
    found = faults(monkeypatch, FIRSTCLAIM_="1", FIRSTCLAIM_QQQQQQQQQQQQQQQQQQQQ="1", LEASE_SECONDS="1")
    assert found == ("FIRSTCLAIM_ is not a setting", "FIRSTCLAIM_QQQQQQQQQQQQQQQQQQQQ is not a setting")


@pytest.mark.parametrize("modules", ["shop handlers", "shop/handlers.py", "shop..handlers", "shop.handlers,", "1shop"])
def test_a_handler_module_is_a_dotted_name(monkeypatch: pytest.MonkeyPatch, modules: str) -> None:
    """A path or an extra comma in FIRSTCLAIM_HANDLERS is refused before anything is imported."""
    [fault] = faults(monkeypatch, FIRSTCLAIM_HANDLERS=modules)
    assert fault.startswith("FIRSTCLAIM_HANDLERS: not a dotted module name")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FIRSTCLAIM_LEASE_SECONDS": "30"}, "FIRSTCLAIM_LEASE_SECONDS < FIRSTCLAIM_HANDLER_DEADLINE_SECONDS"),
        ({"FIRSTCLAIM_HANDLER_DEADLINE_SECONDS": "15"}, "FIRSTCLAIM_LEASE_SECONDS < FIRSTCLAIM_HANDLER_DEADLINE_"),
        ({"FIRSTCLAIM_IDLE_IN_TRANSACTION_SECONDS": "30"}, "FIRSTCLAIM_IDLE_IN_TRANSACTION_SECONDS must hold"),
        ({"FIRSTCLAIM_MARKER_TTL_SECONDS": "60", "FIRSTCLAIM_LOCK_TTL_SECONDS": "60"}, "FIRSTCLAIM_MARKER_TTL_SECONDS"),
        ({"FIRSTCLAIM_BACKOFF_FIRST_SECONDS": "3601"}, "FIRSTCLAIM_BACKOFF_FIRST_SECONDS"),
        ({"FIRSTCLAIM_DRAIN_SECONDS": "25"}, "FIRSTCLAIM_DRAIN_SECONDS"),
    ],
)
def test_numbers_must_agree(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str) -> None:
    """Each relation between settings that the protocol depends on is checked, and the message names them."""
    [fault] = faults(monkeypatch, **environment)
    assert named in fault


def test_relations_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults between settings are reported together, and beside the faults of single settings."""
    found = faults(
        monkeypatch, FIRSTCLAIM_LEASE_SECONDS="31", FIRSTCLAIM_DRAIN_SECONDS="40", DATABASE_URL="postgres://"
    )
    assert len(found) == 3


def test_a_fault_is_not_reported_of_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault between settings is left out if one of them is faulty itself: with its default it would not be true."""
    [fault] = faults(
        monkeypatch,
        FIRSTCLAIM_ADMIN_PASSWORD="correct horse battery",
        FIRSTCLAIM_ADMIN_USER_HEADER="X-Forwarded-Email",
        FIRSTCLAIM_ADMIN_USER_PROXIES="10.0.0.0/33",
    )
    assert fault.startswith("FIRSTCLAIM_ADMIN_USER_PROXIES: expected addresses or networks")
    assert "a prefix is at most 32" in fault


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("lock_ttl_seconds", "0"),
        ("lock_ttl_seconds", "61"),
        ("handler_slots", "1.5"),
        ("answer_budget_seconds", "0"),
        ("answer_budget_seconds", "nan"),
        ("give_up_seconds", "-1"),
        ("give_up_seconds", "inf"),
        ("marker_ttl_seconds", "inf"),
        ("signature_tolerance_seconds", "0"),
        ("redis_prefix", "x" * 65),
        ("log_level", "loud"),
    ],
)
def test_a_number_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, field: str, wrong: str) -> None:
    """A number out of range is refused: a limit of 0 that disables a check, an infinite one, an unreasonable one."""
    [fault] = faults(monkeypatch, **{environment_name(field): wrong})
    assert fault.startswith(environment_name(field) + ": ")


@pytest.mark.parametrize(
    ("field", "wrong", "said"),
    [
        ("handler_slots", "10s", "expected a whole number, got '10s'"),
        ("handler_slots", "1.5", "expected a whole number, got '1.5'"),
        ("handler_slots", CANARY, "expected a whole number"),
        ("lease_seconds", "15 s", "expected a number, got '15 s'"),
        ("lease_seconds", CANARY, "expected a number"),
    ],
)
def test_what_is_no_number(monkeypatch: pytest.MonkeyPatch, field: str, wrong: str, said: str) -> None:
    """The fault says what was expected, and what was found if that looks like a number: no secret does."""
    [fault] = faults(monkeypatch, **{environment_name(field): wrong})
    assert fault == f"{environment_name(field)}: {said}"


# -- addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "converted"),
    [
        ("postgresql://u:p@h:5433/db", "postgresql://u:p@h:5433/db"),
        ("postgres://u:p@h/db", "postgresql://u:p@h/db"),
        ("  postgres://h/db\n", "postgresql://h/db"),
        ("postgresql+asyncpg://u@h/db", "postgresql://u@h/db"),
        ("postgresql://u:p%40%3F%2F@h/db", "postgresql://u:p%40%3F%2F@h/db"),
        ("postgresql://h/db?sslmode=require&channel_binding=require", "postgresql://h/db?sslmode=require"),
        ("postgres://h/db?connect_timeout=10&gssencmode=disable&keepalives=1&keepalives_idle=9", "postgresql://h/db"),
        ("postgresql:///db?host=/run/postgresql", "postgresql:///db?host=/run/postgresql"),
        ("postgresql://u@/db?host=%2Ftmp%2Fpg&port=5432", "postgresql://u@/db?host=/tmp/pg&port=5432"),
        ("postgresql://[::1]:5432/db", "postgresql://[::1]:5432/db"),
    ],
)
def test_postgres_addresses(given: str, converted: str) -> None:
    """Both schemes, a driver suffix and a unix socket are accepted; only parameters of libpq alone are dropped."""
    assert postgres_dsn(given) == converted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("mysql://h/db", "scheme 'mysql' is not PostgreSQL"),
        ("h:5432/db", "not a URL"),
        ("postgresql:/db", "not a URL"),
        ("postgresql://h:port/db", "not a URL"),
        ("postgresql://h/db?pgbouncer=true", "transaction-mode pooler"),
        ("postgresql://u:1#2@h/db", "%23"),
        ("postgresql://u:1?2@h/db", "%23"),
        ("postgresql://u:1/2@h/db", "%23"),
    ],
)
def test_postgres_addresses_that_are_refused(given: str, named: str) -> None:
    """An invalid or unsupported Postgres URL is refused with what is expected, before the first connection."""
    with pytest.raises(ValueError, match=named):
        postgres_dsn(given)


@pytest.mark.parametrize(
    ("given", "converted"),
    [
        ("redis://:p@h:6380/2", "redis://:p@h:6380/2"),
        ("rediss://u:p@h?ssl_cert_reqs=required", "rediss://u:p@h?ssl_cert_reqs=required"),
        ("valkey://h", "redis://h"),
        ("valkeys://h/1", "rediss://h/1"),
        ("unix:///run/redis.sock?db=3", "unix:///run/redis.sock?db=3"),
        ("redis+unix:///run/redis@1.sock", "unix:///run/redis@1.sock"),
        ("unix://:p@/run/redis.sock", "unix://:p@/run/redis.sock"),
        (" redis://h\n", "redis://h"),
    ],
)
def test_redis_addresses(given: str, converted: str) -> None:
    """URLs for TCP, TLS and unix sockets are accepted, also with Valkey's schemes."""
    assert redis_url(given) == converted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("redis+sentinel://a:26379,b:26379/0", "it names no service of the Sentinels"),
        ("redis+cluster:///0", "it names no host"),
        ("redis://a:6379,b:6379/0", "several hosts"),
        ("redis://a,b:6379/0", "several hosts"),
        ("http://h", "scheme 'http' is not Redis"),
        ("redis://h:port", "not a URL"),
        ("h:6379", "not a URL"),
        ("unix://", "needs a path"),
        (
            "redis://h?unheard_of=5&socket_timeout=5&another=1",
            "unknown parameter another, unheard_of; allowed",
        ),
        ("redis://h?unheard_of", "unknown parameter unheard_of"),
        ("redis://u:1#2@h", "%23"),
        ("redis://u:1?2@h", "%23"),
        ("redis://u:1/2@h", "%23"),
    ],
)
def test_redis_addresses_that_are_refused(given: str, named: str) -> None:
    """An unsupported Redis URL is refused with an error that names the reason, before the first connection."""
    with pytest.raises(ValueError, match=named):
        redis_url(given)


@pytest.mark.parametrize(
    ("given", "converted"),
    [
        ("https://api.stripe.com", "https://api.stripe.com"),
        (" https://stripe.internal:8443/mock/ ", "https://stripe.internal:8443/mock"),
        ("http://127.0.0.1:12111", "http://127.0.0.1:12111"),
        ("http://localhost:12111/", "http://localhost:12111"),
        ("http://[::1]:12111", "http://[::1]:12111"),
    ],
)
def test_stripe_addresses(given: str, converted: str) -> None:
    """Stripe's address and a mock's on the loopback are accepted, and a trailing slash is removed."""
    assert stripe_base(given) == converted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("http://api.stripe.com", "the API key is sent there"),
        ("http://127.0.0.1.example.com", "the API key is sent there"),
        ("ftp://127.0.0.1", "the API key is sent there"),
        ("https://", "expected a scheme, a host"),
        ("https://api.stripe.com?x=1", "expected a scheme, a host"),
        ("https://me:pw@api.stripe.com", "expected a scheme, a host"),
        ("api.stripe.com", "not a URL"),
        ("https://api.stripe.com:port", "not a URL"),
    ],
)
def test_stripe_addresses_that_are_refused(given: str, named: str) -> None:
    """An address is refused if the key would be sent unencrypted over a network, or if it is not a URL."""
    with pytest.raises(ValueError, match=named):
        stripe_base(given)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://company-archive/stripe/", "s3://company-archive/stripe"),
        ("s3://bucket", "s3://bucket"),
        (" file:///srv/archive ", "file:///srv/archive"),
    ],
)
def test_addresses_of_archives(given: str, kept: str) -> None:
    """A bucket, with or without a prefix, or a folder."""
    assert archive_url(given) == kept


def test_what_an_address_of_an_archive_names() -> None:
    """Escapes are those of a URL."""
    assert bucket_and_prefix("s3://bucket/a/b%20c") == ("bucket", "a/b c")
    assert folder("file:///srv/my%20archive") == Path("/srv/my archive")
    assert folder("s3://bucket/srv") is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("/srv/archive", "not a URL; expected e.g. s3://bucket/prefix"),
        ("gs://bucket", "expected s3://bucket/prefix or file:///srv/archive"),
        ("s3://key:c4n4rypw@bucket", "expected no key"),
        ("s3://bucket?region=c4n4rypw", "expected no key and no parameter"),
        ("s3:///prefix", "the name of a bucket"),
        ("s3://My_Bucket", "in lower case"),
        ("file://srv/archive", "the whole path of a folder"),
        ("file:///", "the whole path of a folder"),
    ],
)
def test_addresses_of_archives_that_are_refused(given: str, named: str) -> None:
    """What is expected is said, and no key is repeated."""
    with pytest.raises(ValueError, match=named) as refused:
        archive_url(given)
    assert "c4n4rypw" not in str(refused.value)


@pytest.mark.parametrize("url", ["https://hooks.slack.com/services/T0/B0/x?y=1", "http://me:pw@alerts.internal:9000/"])
def test_addresses_for_notices(url: str) -> None:
    """HTTP and HTTPS are accepted, and of the address only scheme, host and port are ever shown."""
    assert notify_url(f" {url} ") == url
    assert shown(url) in ("https://hooks.slack.com", "http://alerts.internal:9000")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("hooks.slack.com/services/c4n4rypw", "not a URL"),
        ("ftp://hooks.slack.com/c4n4rypw", "expected https:// or http://"),
        ("https:///c4n4rypw", "expected a scheme, a host"),
        ("https://a,b/c4n4rypw", "expected a scheme, a host"),
        ("https://h:port/c4n4rypw", "not a URL"),
        ("'https://h/c4n4rypw'", "remove the quotes"),
        ("https://h/c4n4rypw#general", "remove the # and what follows it"),
        ("https://me:c4n4#rypw@h/", "must be written %23"),
    ],
)
def test_addresses_for_notices_that_are_refused(monkeypatch: pytest.MonkeyPatch, given: str, named: str) -> None:
    """The fault names the variable, and no part of the address."""
    [fault] = faults(monkeypatch, FIRSTCLAIM_NOTIFY_URL=given)
    assert fault.startswith("FIRSTCLAIM_NOTIFY_URL: ")
    assert named in fault


# -- the settings object ------------------------------------------------------------------------------


def test_settings_are_frozen() -> None:
    """Settings cannot be changed after they were checked together."""
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.lease_seconds = 1  # type: ignore[misc]


def test_settings_in_code_say_all_faults_in_words() -> None:
    """A misspelt name, a bad value and numbers that do not agree: all at once, without pydantic's page or its URL."""
    with pytest.raises(ConfigurationError) as refused:
        Settings(handler_slot=5, workers=0, drain_seconds=60)  # type: ignore[call-arg]
    assert refused.value.faults[0].startswith("FIRSTCLAIM_WORKERS: ")
    assert "handler_slot: not a setting; did you mean handler_slots?" in refused.value.faults
    assert refused.value.faults[-1].startswith("FIRSTCLAIM_DRAIN_SECONDS must be below")
    assert "pydantic" not in str(refused.value)


def test_settings_survive_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings can be pickled for a worker process, including their secrets."""
    settings = load(monkeypatch, DATABASE_URL="postgresql://h/db", STRIPE_WEBHOOK_SECRETS="whsec_a")
    copy = pickle.loads(pickle.dumps(settings))  # noqa: S301
    assert copy == settings
    assert copy.stripe_webhook_secrets == (SecretStr("whsec_a"),)


def test_arguments_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test or an embedding application can set a field by its name, and the value is checked too."""
    monkeypatch.setenv("FIRSTCLAIM_LEASE_SECONDS", "9")
    arguments: dict[str, Any] = {"lease_seconds": 8}
    assert Settings(**arguments).lease_seconds == 8
    with pytest.raises(ConfigurationError, match="not a setting"):
        Settings(lease_second=8)  # type: ignore[call-arg]


def test_the_keys_of_fresh_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """By endpoint and mode, with STRIPE_API_KEY in their place; what is malformed or twice there is refused unseen."""
    name = "FIRSTCLAIM_FRESH_API_KEYS"
    assert load(monkeypatch, STRIPE_API_KEY=f"rk_live_{CANARY}").api_keys == {(None, True): f"rk_live_{CANARY}"}
    settings = load(monkeypatch, **{name: "rk_live_a, rk_test_b,eu=sk_live_c=,connect=rk_odd"})
    assert settings.api_keys == {
        (None, True): "rk_live_a",
        (None, False): "rk_test_b",
        ("eu", True): "sk_live_c=",
        ("connect", None): "rk_odd",
    }
    assert "sk_live_c" not in repr(settings)
    for value, says in {
        f"whsec_{CANARY}": "expected a secret key (sk_...) or a restricted one (rk_...)",
        f"EU=rk_live_{CANARY}": "the name of an endpoint, before the =, is malformed",
        f"eu=rk_live_{CANARY},eu=sk_live_{CANARY}": "two keys of one mode for the endpoint eu; expected one for",
    }.items():
        [fault] = faults(monkeypatch, **{name: value})
        assert fault.startswith(f"{name}: {says}")
        assert CANARY not in fault
