"""Registers this suite's marker."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "model: runs the Spin model checker over the claim protocol (minutes)")
