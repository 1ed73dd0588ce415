"""The targets of a TOML file: what is refused before anything is forwarded.

Guarantees: the whole file is checked, and every fault names the target and the field. No fault repeats a secret or an
address.
"""

import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from firstclaim import on
from firstclaim.handlers.forward.signing import key_of

SETTING: Final = "FIRSTCLAIM_FORWARD_TARGETS"
# What an attempt needs beside the request: to lock the row and to mark it.
MARGIN_SECONDS: Final = 2.0
_UNKNOWN: Final = "whsec_" + "0" * 32  # so that the other fields of a target are checked: it is refused all the same
_NAME = re.compile(r"[a-z][a-z0-9_\-]{0,31}")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("expected a lower-case letter, then at most 31 of a-z, 0-9, _ and -")
    return text


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        httpx.URL(text).host  # noqa: B018  (it refuses more: no such address, no such IDNA name, too long)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except (ValueError, httpx.InvalidURL):
        known = False
    if not known or not text.isascii() or not text.isprintable() or " " in text or "#" in text:
        raise ValueError("expected http:// or https://, a host and a path, e.g. https://crm.example.com/webhooks")
    return text


def _pattern(text: str) -> str:
    try:
        on(text)
    except ValueError:
        raise ValueError('expected an event type, "prefix.*" or "*"') from None
    return text


def _secret(secret: SecretStr) -> SecretStr:
    key_of(secret.get_secret_value())
    return secret


class Target(BaseModel):
    """A place that events are forwarded to. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, AfterValidator(_name)]
    url: Annotated[str, AfterValidator(_url)] = Field(repr=False)
    types: Annotated[list[Annotated[str, AfterValidator(_pattern)]], Field(min_length=1)]
    secret: Annotated[SecretStr, AfterValidator(_secret)]
    timeout_seconds: float = Field(10, gt=0, allow_inf_nan=False, strict=True)
    concurrency: int = Field(8, ge=1, le=500, strict=True)

    def takes(self, pattern: str) -> bool:
        """Whether it gets the events of this type, or of all types of another pattern."""
        return any(pattern.startswith(own[:-1]) if own.endswith("*") else pattern == own for own in self.types)


def load_targets(path: Path | None, *, deadline_seconds: float) -> list[Target]:
    """The targets. Raises an `ExceptionGroup` of `ValueError`: every fault of the file."""
    if path is None:
        raise _faulty([f"{SETTING} is missing: firstclaim.handlers.forward needs a TOML file with its targets"])
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _faulty([f"{SETTING}: {path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise _faulty([f"{SETTING}: {path} is not UTF-8"]) from None
    except (ValueError, RecursionError) as error:  # also of a number with too many digits, and of deep nesting
        raise _faulty([f"{SETTING}: {path} is not TOML: {error}"]) from None
    found = list(_checked(content, deadline_seconds))
    if faults := [each for each in found if isinstance(each, str)]:
        raise _faulty([f"{SETTING}: {path}: {fault}" for fault in faults])
    return [each for each in found if isinstance(each, Target)]


def _checked(content: Mapping[str, Any], deadline_seconds: float) -> Iterator[Target | str]:
    """The targets that are valid, and the faults."""
    for name in content.keys() - {"target"}:
        yield f"{name!r:.60} is not known: expected [[target]] for each target"
    tables = content.get("target", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        yield "expected [[target]], once for each target"
        return
    found = [each for number, table in enumerate(tables, 1) for each in _target(number, table, deadline_seconds)]
    yield from found
    for name, count in Counter(each.name for each in found if isinstance(each, Target)).items():
        if count > 1:
            yield f"{count} targets are called {name}"


def _target(number: int, table: Mapping[str, Any], deadline_seconds: float) -> Iterator[Target | str]:
    where = f"target {number}" + (f" ({table['name']})" if _is_name(table.get("name")) else "")
    values, fault = _with_secret(table)
    if fault is not None:
        yield f"{where}: {fault}"
    try:
        target = Target.model_validate(values)
    except ValidationError as error:
        yield from (f"{where}: {fault}" for fault in _in_words(error))
        return
    if target.timeout_seconds > deadline_seconds - MARGIN_SECONDS:
        yield (
            f"{where}: timeout_seconds: expected at most {deadline_seconds - MARGIN_SECONDS:g}, which is "
            f"{MARGIN_SECONDS:g} s below FIRSTCLAIM_HANDLER_DEADLINE_SECONDS"
        )
    yield target


def _with_secret(table: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    """The fields of a target, with the secret that `secret_env` names; or what is wrong with `secret_env`."""
    if "secret_env" not in table:
        return table, None
    values = {key: value for key, value in table.items() if key != "secret_env"}
    if "secret" in values:
        return values, "secret and secret_env are both there: leave one of them out"
    name = table["secret_env"]
    if isinstance(name, str) and os.environ.get(name):
        return {**values, "secret": os.environ[name]}, None
    return {**values, "secret": _UNKNOWN}, "secret_env: expected the name of an environment variable that is set"


def _in_words(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = f"not known; expected some of {', '.join((*Target.model_fields, 'secret_env'))}"
        elif detail["type"] == "missing":
            message = "is missing" + (", and so is secret_env" if place == "secret" else "")
        yield f"{place}: {message}" if place else message


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _faulty(faults: list[str]) -> ExceptionGroup[ValueError]:
    return ExceptionGroup("the targets to forward to", [ValueError(fault) for fault in faults])
