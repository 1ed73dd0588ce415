"""What `serve` prints at its start."""

import itertools
import shlex
from typing import Literal

import pytest

from firstclaim.cli.serve import _command_to_try
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
