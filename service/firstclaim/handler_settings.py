"""The settings of what handlers get from Stripe's API, and of where they forward events to.

Guarantees: a key is checked before it is sent anywhere, and no fault repeats any part of it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode

from firstclaim.setting_faults import converted
from firstclaim.urls import stripe


class HandlerSettings(BaseSettings):
    """Stripe's API: for `reconcile`, and for handlers with `fresh=True`."""

    stripe_api_key: Annotated[SecretStr | None, converted(stripe.stripe_key)] = Field(
        None,
        validation_alias="STRIPE_API_KEY",
        description="For `reconcile`: a secret key, or a restricted key (`rk_...`) that may read Events.",
    )
    stripe_api_base: Annotated[str, AfterValidator(stripe.stripe_base)] = Field(
        "https://api.stripe.com",
        validation_alias="STRIPE_API_BASE",
        description="Address of Stripe's API, for tests: `https://`, or `http://` to the loopback.",
    )
    fresh_api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        description="API keys for handlers with `fresh=True`, which may read the objects: comma separated, one per "
        "mode. `name=rk_...`: of a named endpoint. Unset: `STRIPE_API_KEY`, for the endpoint without a name.",
    )
    fresh_timeout_seconds: float = Field(
        3,
        ge=0.05,
        le=600,
        description="For one request of a handler with `fresh=True` to Stripe's API. At most a quarter of the lease: "
        "no row is locked while it waits.",
    )

    forward_targets: Path | None = Field(
        None,
        description="A TOML file with the targets of `firstclaim.handlers.forward`, which forwards events over HTTP.",
    )

    @property
    def api_keys(self) -> Mapping[tuple[str | None, bool | None], str]:
        """The API keys of handlers with `fresh=True`, by endpoint and mode (None: for both modes)."""
        keys = [key.get_secret_value() for key in self.fresh_api_keys]
        if not keys and self.stripe_api_key is not None:
            keys = [self.stripe_api_key.get_secret_value()]
        return stripe.keys_by_endpoint_and_mode(keys)

    @field_validator("fresh_api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("fresh_api_keys")
    @classmethod
    def _api_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        stripe.check_api_keys([key.get_secret_value() for key in keys])
        return keys
