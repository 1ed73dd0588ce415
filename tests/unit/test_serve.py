"""What `serve` prints at its start."""

import itertools
import shlex
from typing import Literal

import pytest
from pydantic import SecretStr

from firstclaim.cli.serve import _command_to_try, _lines
from firstclaim.event import parse_event
from firstclaim.inbox.routes import Routes
from firstclaim.registry import Handler, Registry
from firstclaim.sending.events import build_event, changed
from firstclaim.settings import Settings


@pytest.mark.parametrize("livemode", ["any", "live", "test"])
def test_the_command_to_try_sends_what_is_handled(livemode: Literal["any", "live", "test"]) -> None:
    """In each mode its event has a handler: one of the other mode would be ignored, and seem not to work."""
    settings = Settings(livemode=livemode)
    command = _command_to_try(settings, settings.listen_port)
    assert command is not None
    program, name, event_type, *options = shlex.split(command)
    changes = [value for option, value in itertools.pairwise(options) if option == "--set"]
    event = parse_event(changed(build_event(event_type), changes))
    assert (program, name) == ("firstclaim", "send")
    assert isinstance(Routes(Registry.load(settings.handlers), livemode).find(event), Handler)


def test_each_endpoint_and_each_handler_has_its_line() -> None:
    """With several endpoints and several handlers, none of either replaces another one."""
    settings = Settings(
        stripe_webhook_secrets=(SecretStr("whsec_a"), SecretStr("connect=whsec_b"), SecretStr("eu=whsec_c")),
        handlers=("firstclaim.handlers.invoices", "firstclaim.handlers.load_probe"),
    )
    lines = [*_lines(settings, settings, "::1", 8000)]
    assert lines[:4] == [
        ("webhooks", "POST http://[::1]:8000/webhooks/stripe"),
        ("", "POST http://[::1]:8000/webhooks/stripe/connect"),
        ("", "POST http://[::1]:8000/webhooks/stripe/eu"),
        ("workers", "1"),
    ]
    assert [(name, value.split()[0]) for name, value in lines[4:6]] == [
        ("handlers", "*"),
        ("", "invoice.payment_failed"),
    ]
