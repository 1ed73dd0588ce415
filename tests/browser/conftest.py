"""Fixtures of the browser tests: the services are those of the acceptance tests."""

from tests.acceptance.conftest import sandbox

__all__ = ["sandbox"]
