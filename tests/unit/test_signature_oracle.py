"""Our signature check compared with stripe-python's: both decide alike, except for a list of intended differences.

stripe-python is used as installed, with its clock stopped, so that the limits of the tolerance can be tested exactly.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Final, NamedTuple

import pytest
import stripe
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from tests.unit.test_signature import BODY, NOW, OTHER, SECRET, header, refusal, v1

SECRETS: Final = (SECRET, OTHER)
TOLERANCE: Final = 300  # both sides' default
ANY: Final = st.text(alphabet=st.characters(codec="latin-1"))  # any header value


class Difference(NamedTuple):
    """Headers that stripe-python accepts and we refuse: a predicate for them, and an example."""

    applies: Callable[[Sequence[str]], bool]
    example: Sequence[str]


def items(headers: Sequence[str]) -> list[str]:
    """The items of the first header, which is the only one that stripe-python gets."""
    return headers[0].split(",")


def without_blanks(headers: Sequence[str]) -> list[str]:
    """The headers without blanks and tabs around their commas: we accept these, stripe-python does not."""
    return [",".join(item.strip(" \t") for item in header.split(",")) for header in headers]


def times(headers: Sequence[str]) -> list[str]:
    return [item.partition("=")[2] for item in items(headers) if item.partition("=")[0] == "t"]


# Each example is a valid header with only this change.
DIFFERENCES: Final[Mapping[str, Difference]] = {
    "a second header, which stripe-python does not get": Difference(
        lambda headers: len(headers) > 1, [header(), header()]
    ),
    "a time in the future by more than the tolerance": Difference(
        lambda headers: any(re.fullmatch("[0-9]+", at) and int(at) > NOW + TOLERANCE for at in times(headers)),
        [header(at=NOW + TOLERANCE + 1)],
    ),
    "a second time, where stripe-python uses the first": Difference(
        lambda headers: len(times(headers)) > 1, [f"{header()},t={NOW}"]
    ),
    "a time that is not 1 to 12 plain digits, but that int() accepts": Difference(
        lambda headers: any(not re.fullmatch("[0-9]{1,12}", at) for at in times(headers)), [f"t=+{NOW},{v1()}"]
    ),
    "an item that is not a pair": Difference(
        lambda headers: any("=" not in item for item in items(headers)), [f"{header()},v2"]
    ),
    "more than 32 items": Difference(lambda headers: len(items(headers)) > 32, [header() + ",v0=00" * 31]),
    "a non-ASCII character in an item that stripe-python ignores": Difference(
        lambda headers: not headers[0].isascii(), [f"{header()},v0=\xe9"]
    ),
}


@pytest.fixture(scope="module", autouse=True)
def stripes_clock() -> Iterator[None]:
    """stripe-python's clock, stopped at NOW."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stripe._webhook.time", SimpleNamespace(time=lambda: float(NOW)))
        yield


def stripe_accepts(headers: Sequence[str]) -> bool:
    """Whether stripe-python accepts the first header with any of the secrets."""
    return any(_verifies(headers[0], secret) for secret in SECRETS) if headers else False


def _verifies(text: str, secret: str) -> bool:
    try:
        return bool(stripe.WebhookSignature.verify_header(BODY, text, secret, tolerance=TOLERANCE))
    except (stripe.SignatureVerificationError, TypeError):  # a digest that is not ASCII cannot be compared
        return False


def we_accept(headers: Sequence[str]) -> bool:
    return refusal(headers, secrets=SECRETS) is None


def differing(headers: Sequence[str]) -> list[str]:
    return [name for name, difference in DIFFERENCES.items() if difference.applies(headers)]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_difference_is_real(name: str) -> None:
    """stripe-python accepts the example, we refuse it, and no other difference applies: each entry is needed."""
    headers = DIFFERENCES[name].example
    assert stripe_accepts(headers)
    assert not we_accept(headers)
    assert differing(headers) == [name]


# -- any header ---------------------------------------------------------------------------------------

AWAY: Final = (0, 1, -1, TOLERANCE, -TOLERANCE, TOLERANCE + 1, -TOLERANCE - 1, 10**6, -(10**6))
MOMENTS: Final = st.sampled_from([NOW + away for away in AWAY])
PAIRS: Final = st.builds(v1, st.sampled_from([*SECRETS, "whsec_wrong"]), st.just(BODY), MOMENTS)
ODD_TIMES: Final = st.sampled_from(
    [f"+{NOW}", f" {NOW}", f"{NOW} ", "1_793_610_041", f"{NOW}=1", f"00{NOW}", "-1", "", "x"]
)
ITEMS: Final = st.one_of(
    MOMENTS.map(lambda at: f"t={at}"),
    ODD_TIMES.map(lambda at: f"t={at}"),
    PAIRS,
    PAIRS.map(str.upper),
    st.sampled_from(["v1=", "v0=00", "v2=x", "", "t", "=", "v1", "T=1", "v1=\xe9", "v0=\xe9", " v1=00", "\tv0=00 "]),
)
COMPOSED: Final = st.lists(ITEMS, max_size=6).map(",".join)


@st.composite
def edited(draw: st.DrawFn) -> str:
    """A valid header with the time NOW, and a few characters deleted, replaced or inserted."""
    text = header(draw(st.sampled_from(SECRETS)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(ANY.filter(lambda put: len(put) < 4)) + text[place + draw(st.integers(0, 2)) :]
    return text


@st.composite
def signed_then(draw: st.DrawFn) -> str:
    """A signature that is correct for its time, whatever that time is, among other items."""
    at = draw(MOMENTS)
    found = [f"t={at}", v1(draw(st.sampled_from(SECRETS)), BODY, at), *draw(st.lists(ITEMS, max_size=3))]
    return ",".join(draw(st.permutations(found)))


@settings(deadline=None, database=None, max_examples=300)
@given(st.lists(signed_then() | edited() | COMPOSED | ANY, min_size=1, max_size=2))
@example([header()])
@example([header(at=NOW - TOLERANCE)])
@example([header(at=NOW - TOLERANCE - 1)])
@example([header(at=NOW + TOLERANCE)])
@example([f"t=0{NOW},{v1()}"])
@example([f"t={NOW} ,\t{v1()}"])
@example([f"\u00a0t={NOW},{v1()}"])
@example([f"{header()}," + "v0=00," * 29 + v1(OTHER)])
def test_we_decide_as_stripe_python_does(headers: list[str]) -> None:
    """What we accept stripe-python accepts without blanks, and the reverse, except for the listed differences."""
    ours, headers = we_accept(headers), without_blanks(headers)
    theirs = stripe_accepts(headers)
    event(f"ours {ours}, theirs {theirs}")
    if ours:
        assert theirs
    if theirs and not ours:
        assert differing(headers)
    if differing(headers):
        assert not ours
