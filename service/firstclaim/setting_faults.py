"""What is wrong with settings, in words: the variable, what was expected, and the setting that was probably meant.

Guarantees: no fault repeats the value that it is about, because that may be a secret in the wrong variable; only what
looks like a number is shown. `fields` are the settings' fields, by name.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from pydantic import AfterValidator, SecretStr, ValidationError
from pydantic.fields import FieldInfo

PREFIX = "FIRSTCLAIM_"

Fields = Mapping[str, FieldInfo]

# The variables that Kubernetes sets for a Service named firstclaim.
_SERVICE_LINK = re.compile(PREFIX + r"(?:SERVICE_(?:HOST|PORT)|PORT)(?:_.*)?")
_NUMBERS = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}
_LIKE_A_NUMBER = re.compile(r"[-+]?\d[\d.,_]{0,6} ?[a-zA-Z%]{0,3}")


def converted(convert: Callable[[str], str]) -> AfterValidator:
    """A validator that converts a secret. A ValueError of `convert` becomes the fault."""
    return AfterValidator(lambda value: None if value is None else SecretStr(convert(value.get_secret_value())))


def environment_name(fields: Fields, field: str) -> str:
    """The environment variable of `field`."""
    alias = fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()


def key(fields: Fields, field: str) -> str:
    """The name of `field` in pydantic's errors: its alias, if it has one."""
    return str(fields[field].validation_alias or field)


def unknown_names(fields: Fields, environ: Mapping[str, str]) -> list[str]:
    """Faults for misspelt variables."""
    known = {environment_name(fields, field).removeprefix(PREFIX): environment_name(fields, field) for field in fields}
    return [
        f"{name} is not a setting{_nearest(name.removeprefix(PREFIX), known)}"
        for name in sorted(environ)
        if name.startswith(PREFIX) and name not in known.values() and not _SERVICE_LINK.fullmatch(name)
    ]


def explain(fields: Fields, error: ValidationError) -> list[str]:
    """Every fault that pydantic found."""
    faults: list[str] = []
    for detail in error.errors(include_url=False, include_context=False):
        message = detail["msg"].removeprefix("Value error, ")
        if wanted := _NUMBERS.get(detail["type"]):
            given = detail["input"]
            shown = isinstance(given, str) and _LIKE_A_NUMBER.fullmatch(given)
            message = f"expected {wanted}, got {given!r}" if shown else f"expected {wanted}"
        if detail["type"] == "extra_forbidden":
            message = "not a setting" + _nearest(str(detail["loc"][0]), {field: field for field in fields})
        if detail["loc"]:
            name = str(detail["loc"][0])
            message = f"{environment_name(fields, name) if name in fields else name}: {message}"
        faults.extend(message.split("\n"))
    return faults


def needs(fault: str, names: Iterable[str]) -> bool:
    """Whether a fault between settings is about one of these variables."""
    return not {*re.findall(r"[A-Z_]{2,}", fault)}.isdisjoint(names)


def _nearest(name: str, known: Mapping[str, str]) -> str:
    near: Iterable[str] = difflib.get_close_matches(name, list(known), n=1)
    return "".join(f"; did you mean {known[each]}?" for each in near)
