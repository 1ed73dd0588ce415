"""`firstclaim psql`: no password on a command line, and psql's own exit code."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from firstclaim.cli.commands import app
from firstclaim.cli.psql import without_password
from firstclaim.settings import Settings, environment_name

PSQL = """#!/bin/sh
for each; do echo "argument: $each"; done
echo "password: $PGPASSWORD"
exit 7
"""


@pytest.fixture(autouse=True)
def database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A database with a password, and no psql but what a test puts into the path."""
    for field in Settings.model_fields:
        monkeypatch.delenv(environment_name(field), raising=False)
    monkeypatch.setenv("DATABASE_URL", "postgresql://shop:p%40ss@db.test:5432/ledger")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("firstclaim.observability.logging.configure", lambda *_: None)
    monkeypatch.setattr("firstclaim.embedded.data_folder.psql_of_wheel", lambda: None)


@pytest.mark.parametrize(
    ("dsn", "address", "password"),
    [
        ("postgresql://u:p%40s@h:1/d?a=b", "postgresql://u@h:1/d?a=b", "p@s"),
        ("postgresql://u@h/d", "postgresql://u@h/d", None),
        ("postgresql://h/d", "postgresql://h/d", None),
        ("postgresql:///d?user=u&password=p%40s&host=/tmp/x", "postgresql:///d?user=u&host=/tmp/x", "p@s"),
        ("postgresql:/d?options=-c%20a%3D1", "postgresql:///d?options=-c%20a%3D1", None),
        ("postgresql://postgres@/d?host=/tmp/x&port=5432", "postgresql://postgres@/d?host=/tmp/x&port=5432", None),
    ],
)
def test_the_password_is_taken_out(dsn: str, address: str, password: str | None) -> None:
    """An address is split into what may be shown and the password."""
    assert without_password(dsn) == (address, password)


def test_psql_gets_arguments_and_password(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The arguments are psql's, the password is in its environment only, and its exit code is ours."""
    program = tmp_path / "psql"
    program.write_text(PSQL.replace("#!/bin/sh", f"#!{os.path.realpath('/bin/sh')}"))
    program.chmod(0o755)
    done = CliRunner().invoke(app, ["psql", "-c", "SELECT 1", "--csv"])
    assert done.exit_code == 7, done.output
    arguments = ["postgresql://shop@db.test:5432/ledger", "-c", "SELECT 1", "--csv"]
    assert capfd.readouterr().out.splitlines() == [*(f"argument: {each}" for each in arguments), "password: p@ss"]


def test_without_psql_the_address_is_told() -> None:
    """Where there is no psql, the message says what to install and where to connect, without the password."""
    done = CliRunner().invoke(app, ["psql"])
    assert done.exit_code == 3
    assert "psql is not installed" in done.output
    assert "postgresql://shop@db.test:5432/ledger" in done.output
    assert "p@ss" not in done.output
    assert "p%40ss" not in done.output
