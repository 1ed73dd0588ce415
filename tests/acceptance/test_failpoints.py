"""The failpoints themselves: they are there when named, and nowhere else."""

import re
from pathlib import Path

import pytest

import firstclaim
from tests import failpoints


def test_nothing_is_wrapped_without_the_variable() -> None:
    """Importing the module as a service does, with no point named, leaves every method as it was."""
    failpoints.arm({})
    assert failpoints.wrapped_points() == []


@pytest.mark.parametrize("name", failpoints.POINTS)
def test_a_named_point_is_wrapped_alone(name: str, tmp_path: Path) -> None:
    """Each point is a method that the service still has; naming it wraps that one and no other."""
    disarm = failpoints.arm({"TEST_FAILPOINT": name, "TEST_FAILPOINT_FOLDER": str(tmp_path)})
    try:
        assert failpoints.wrapped_points() == [name]
    finally:
        disarm()
    assert failpoints.wrapped_points() == []


def test_several_points_at_once(tmp_path: Path) -> None:
    """Points named together are wrapped together, two of one method as well, and undone together."""
    disarm = failpoints.arm({"TEST_FAILPOINT": "insert,found,handler", "TEST_FAILPOINT_FOLDER": str(tmp_path)})
    try:
        assert failpoints.wrapped_points() == ["insert", "found", "handler"]
    finally:
        disarm()
    assert failpoints.wrapped_points() == []


def test_an_unknown_point_is_refused(tmp_path: Path) -> None:
    """A typo cannot pass for a test that survived a kill."""
    with pytest.raises(KeyError):
        failpoints.arm({"TEST_FAILPOINT": "lokc", "TEST_FAILPOINT_FOLDER": str(tmp_path)})


def test_the_service_holds_no_switch() -> None:
    """Nothing in the package knows of failpoints, or of any test."""
    for path in Path(firstclaim.__path__[0]).rglob("*.py"):
        assert not re.search(r"(?i:failpoint)|\bTEST_|from tests|import tests", path.read_text()), path
