"""The result of a check before the start."""

from dataclasses import dataclass
from enum import StrEnum

from firstclaim.errors import OperatorError


class Verdict(StrEnum):
    """The result of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `firstclaim check`. `exit_code` is 2 if the environment is at fault, whatever the stores are."""

    name: str
    verdict: Verdict
    detail: str
    fatal: bool = False
    exit_code: int = OperatorError.exit_code


def ok(name: str, detail: str) -> Check:
    """A check that passed."""
    return Check(name, Verdict.OK, detail)


def warn(name: str, detail: str) -> Check:
    """A check that passed, with something to know."""
    return Check(name, Verdict.WARN, detail)


def fail(name: str, detail: str, *, fatal: bool = True, exit_code: int = OperatorError.exit_code) -> Check:
    """A check that failed. A `fatal` one stops `serve`."""
    return Check(name, Verdict.FAIL, detail, fatal, exit_code)
