"""A monotonic clock that a test moves by hand, in place of `time` in modules of the service."""

from types import ModuleType, SimpleNamespace

import pytest


class HandClock:
    """Stands still until the test changes `now`, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    @classmethod
    def installed(cls, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> "HandClock":
        """A clock that these modules read as `time.monotonic`. They may use nothing else of `time`."""
        clock = cls()
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
        return clock
