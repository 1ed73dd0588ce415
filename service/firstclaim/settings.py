"""Settings: read once from the environment, checked together, frozen, with masked secrets.

Guarantees: `load_settings` reports all faults at once, in one `ConfigurationError`. No fault repeats the value that it
is about. A misspelt `FIRSTCLAIM_*` name is a fault too, because otherwise a team would notice in production that its
setting has no effect.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from firstclaim import setting_faults
from firstclaim.admin_settings import AdminSettings
from firstclaim.errors import ConfigurationError
from firstclaim.handler_settings import HandlerSettings
from firstclaim.listening import Listening
from firstclaim.schema_name import DEFAULT_SCHEMA, checked_schema
from firstclaim.setting_faults import PREFIX, converted
from firstclaim.urls import archive, notify, postgres, redis, stripe

METRICS_CONNECTIONS = 2  # a pool of their own, so that reading the ledger never delays a delivery
ADMIN_CONNECTIONS = 2  # a pool of their own too; two, so that one search does not block another page


class Settings(HandlerSettings, AdminSettings, Listening):
    """All settings. The description of a field is its row in the reference, and says why the default is what it is.

    Raises `ConfigurationError` with all faults, in code too.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_by_name=True,
        validate_by_alias=True,
    )

    database_url: Annotated[SecretStr | None, converted(postgres.postgres_dsn)] = Field(
        None,
        validation_alias="DATABASE_URL",
        description="PostgreSQL 14 or newer: `postgresql://` or `postgres://`. Unset: an embedded server.",
    )
    schema_name: Annotated[str, AfterValidator(checked_schema)] = Field(
        DEFAULT_SCHEMA,
        validation_alias="FIRSTCLAIM_SCHEMA",
        description="Schema of the ledger's tables: one of its own, that your migrations do not look into.",
    )
    redis_url: Annotated[SecretStr | None, converted(redis.redis_url)] = Field(
        None,
        validation_alias="REDIS_URL",
        description="Redis 7 or Valkey 8, or newer: `redis://`, `rediss://`, `unix://`, `redis+cluster://` or "
        "`redis+sentinel://`. Unset: an embedded Valkey.",
    )
    stripe_webhook_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        validation_alias="STRIPE_WEBHOOK_SECRETS",
        description="Signing secrets (`whsec_...`), comma separated: one per endpoint and mode, two during a roll. "
        "`name=whsec_...`: of a named endpoint, which has its own path, `/webhooks/stripe/name`.",
    )
    data_dir: Path = Field(
        Path(".firstclaim"),
        description="Folder of the embedded servers and the generated signing secret. It survives restarts.",
    )
    handlers: Annotated[tuple[str, ...], NoDecode] = Field(
        ("firstclaim.handlers",),
        description="Modules with the handlers, comma separated, importable by name.",
    )
    livemode: Literal["any", "live", "test"] = Field(
        "any",
        description="`any`, `live` or `test`. Events of the other mode are recorded as `ignored`: "
        "live Connect endpoints get test events too.",
    )
    redis_prefix: str = Field(
        "firstclaim:",
        max_length=64,
        description="Prefix of every key, so that several services can share a Redis.",
    )

    lock_ttl_seconds: float = Field(
        20,
        ge=1,
        le=60,
        description="TTL of the Redis lock: longer than recording takes. A stale lock delays an event by at most this.",
    )
    marker_ttl_seconds: float = Field(
        96 * 3600,
        ge=60,
        le=35 * 86_400,
        description="TTL of the `recorded` marker: one day longer than Stripe's 3 days of retries.",
    )
    lease_seconds: float = Field(
        15,
        ge=0.5,
        le=3600,
        description="An older claim whose row is not locked counts as abandoned. Below the handler deadline.",
    )
    handler_deadline_seconds: float = Field(
        30, ge=0.5, le=3600, description="A handler that runs longer has failed, and its connection is terminated."
    )
    idle_in_transaction_seconds: float = Field(
        35,
        ge=1,
        le=2 * 3600,
        description="Postgres ends a transaction that has been idle for this long, which unlocks the row of a frozen "
        "process. Above the handler deadline.",
    )
    handler_slots: int = Field(
        20,
        ge=1,
        le=500,
        description="Handlers that run at once, a connection each. A process handles at most "
        "slots / (latency + 5 ms) events a second: 20 allow 800 at 20 ms.",
    )
    ingest_connections: int = Field(
        5,
        ge=2,
        le=500,
        description="Connections for claiming and recording, separate so that slow handlers never block them.",
    )
    answer_budget_seconds: float = Field(
        5, gt=0, le=30, description="Stripe expects a quick answer: after this, 202 `deferred`, and the work continues."
    )
    redis_timeout_seconds: float = Field(
        0.2,
        ge=0.05,
        le=2,
        description="Per Redis command. A slower Redis counts as unreachable: correctness depends only on the ledger.",
    )
    redis_breaker_seconds: float = Field(
        1, ge=0.1, le=30, description="How often an unreachable Redis is tried: an outage costs one timeout a second."
    )
    postgres_timeout_seconds: float = Field(
        1.5,
        ge=0.1,
        le=30,
        description="To connect, to each host, and per ledger statement: a 503 within 2 s if Postgres is down.",
    )
    recovery_interval_seconds: float = Field(
        1, ge=0.05, le=60, description="Between two recovery rounds, per process. No pause after a full batch."
    )
    backoff_first_seconds: float = Field(
        5,
        gt=0,
        le=3600,
        description="Delay of the first retry. It doubles with each failure, and jitter shortens it by up to half.",
    )
    backoff_most_seconds: float = Field(3600, gt=0, le=86_400, description="Maximum of the backoff.")
    give_up_seconds: float = Field(
        3 * 86_400,
        gt=0,
        le=30 * 86_400,
        description="A failing event becomes `dead` this long after receipt: Stripe gives up then too.",
    )
    abandoned_most: int = Field(
        8, ge=1, description="An event that was abandoned this often seems to kill its process, and becomes `dead`."
    )
    signature_tolerance_seconds: int = Field(
        300,
        ge=1,
        le=3600,
        description="How far a signature's timestamp may differ from now, in either direction.",
    )
    drain_seconds: float = Field(
        0,
        ge=0,
        le=300,
        description="After SIGTERM, serve this long while `/readyz` returns 503: the time that your balancer needs.",
    )
    shutdown_seconds: float = Field(
        25,
        ge=1,
        le=3600,
        description="From SIGTERM to exit, including the drain: below Kubernetes' grace period of 30 s.",
    )
    notify_url: Annotated[SecretStr | None, converted(notify.notify_url)] = Field(
        None,
        description="Address for notices of dead events, failing handlers and refused signatures: "
        "a webhook of Slack's, or any that takes a POST of JSON.",
    )
    archive_url: Annotated[str, AfterValidator(archive.archive_url)] | None = Field(
        None, description="Where `events prune` stores payloads first: `s3://bucket/prefix`, or `file:///folder`."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, otherwise one JSON object per line."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The lowest level that is written: `debug`, `info`, `warning` or `error`."
    )

    @property
    def postgres_connections(self) -> int:
        """The maximum number of Postgres connections of one process."""
        admin = 0 if self.admin_password is None else ADMIN_CONNECTIONS
        return self.handler_slots + self.ingest_connections + METRICS_CONNECTIONS + admin

    @property
    def endpoints(self) -> Mapping[str | None, Sequence[str]]:
        """The signing secrets of each endpoint, by its name; None: the endpoint without a name, if it has secrets."""
        return stripe.secrets_by_endpoint(secret.get_secret_value() for secret in self.stripe_webhook_secrets)

    @property
    def _on_cluster(self) -> bool:
        return self.redis_url is not None and "+cluster:" in self.redis_url.get_secret_value()

    @property
    def embedded_database(self) -> bool:
        """Whether there is no `DATABASE_URL`, so that this process runs its own PostgreSQL."""
        return self.database_url is None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, and arguments in code. No dotenv file and no secrets folder."""
        return init_settings, env_settings

    @field_validator("stripe_webhook_secrets", "handlers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("stripe_webhook_secrets")
    @classmethod
    def _signing_secrets(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        stripe.check_signing_secrets([secret.get_secret_value() for secret in secrets])
        return secrets

    @field_validator("handlers")
    @classmethod
    def _module_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in names if not all(part.isidentifier() for part in name.split("."))]:
            raise ValueError(f"not a dotted module name: {', '.join(map(repr, wrong))}; expected e.g. shop.handlers")
        return names

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        rules = {
            "FIRSTCLAIM_LEASE_SECONDS < FIRSTCLAIM_HANDLER_DEADLINE_SECONDS < "
            "FIRSTCLAIM_IDLE_IN_TRANSACTION_SECONDS must hold, or a live handler could be taken over": (
                self.lease_seconds < self.handler_deadline_seconds < self.idle_in_transaction_seconds
            ),
            "FIRSTCLAIM_MARKER_TTL_SECONDS must be longer than FIRSTCLAIM_LOCK_TTL_SECONDS": (
                self.marker_ttl_seconds > self.lock_ttl_seconds
            ),
            "FIRSTCLAIM_BACKOFF_FIRST_SECONDS must not be above FIRSTCLAIM_BACKOFF_MOST_SECONDS": (
                self.backoff_first_seconds <= self.backoff_most_seconds
            ),
            "FIRSTCLAIM_REDIS_PREFIX: on a Cluster, a { must begin a hash tag, e.g. {shop}:": (
                "{" not in self.redis_prefix or not self._on_cluster or redis.has_hash_tag(self.redis_prefix)
            ),
            "FIRSTCLAIM_FORWARD_TARGETS has no effect without firstclaim.handlers.forward in FIRSTCLAIM_HANDLERS": (
                self.forward_targets is None or "firstclaim.handlers.forward" in self.handlers
            ),
            "FIRSTCLAIM_DRAIN_SECONDS must be below FIRSTCLAIM_SHUTDOWN_SECONDS, which includes it": (
                self.drain_seconds < self.shutdown_seconds
            ),
        }
        faults = [message for message, holds in rules.items() if not holds]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """All faults at once: of single settings, and between settings, found with defaults in place of faulty ones.

        A fault that needs a setting which is faulty itself is left out: with the default it may not be true.
        """
        try:
            return validate(values)
        except ValidationError as error:
            faults = setting_faults.explain(cls.model_fields, error)
            wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        if wrong:
            names = wrong | {name for name in cls.model_fields if setting_faults.key(cls.model_fields, name) in wrong}
            try:
                validate({name: value for name, value in values.items() if name not in names})
            except ValidationError as between:
                faulty = {
                    setting_faults.environment_name(cls.model_fields, name)
                    for name in cls.model_fields
                    if name in names
                }
                found = setting_faults.explain(cls.model_fields, between)
                faults += [fault for fault in found if not setting_faults.needs(fault, faulty)]
        raise ConfigurationError(faults)


def load_settings(*, receiving: bool = True, flags: Mapping[str, Any] = MappingProxyType({})) -> Settings:
    """Read and check the environment. Raises `ConfigurationError` with every fault, each of which names its variable.

    `flags` are settings from the command line: they override the environment, and a fault names the option.

    `receiving` says whether deliveries will be verified, which needs signing secrets. (`migrate` does not use them, and
    a migration job should not have them.)
    """
    faults = setting_faults.unknown_names(Settings.model_fields, os.environ)
    if receiving and os.environ.get("DATABASE_URL") and not os.environ.get("STRIPE_WEBHOOK_SECRETS", "").strip():
        faults.append("STRIPE_WEBHOOK_SECRETS is missing or blank: set it to the endpoint's signing secret (whsec_...)")
    try:
        settings = Settings(**flags)
    except ConfigurationError as error:
        named = [_named_by_option(fault, flags) for fault in error.faults]
        raise ConfigurationError([*faults, *named]) from None
    if faults:
        raise ConfigurationError(faults)
    return settings


def _named_by_option(fault: str, flags: Iterable[str]) -> str:
    names = {environment_name(field): "--" + field.removesuffix("_url").replace("_", "-") for field in flags}
    name, colon, text = fault.partition(":")
    return names.get(name, name) + colon + text


def environment_name(field: str) -> str:
    """The environment variable of `field`."""
    return setting_faults.environment_name(Settings.model_fields, field)
