"""The tests tested: each rule of the protocol is broken in a copy of the service, and the test named for it fails.

Guarantees: a mutant counts as caught only when that very test failed in its own body, for what it saw: not because
something could not be imported, collected, set up or parsed, and not by running out of time. The same tests are
green on a copy that was not changed. The service itself holds no switch that weakens it.
"""

import asyncio
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import asyncpg
import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.mutants import MUTANTS, SECTIONS
from tests.stores import Stores

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
COPIED = ("service", "tests", "pyproject.toml")
# Plugins that were imported before pytest began cannot have their assertions rewritten: they need no such thing.
QUIET = ("-p", "no:cacheprovider", "-q", "-m", "", "--color=no", "-W", "ignore::pytest.PytestAssertRewriteWarning")
LANES = 2  # runs at once: most of a run is one process's work
TEST_SECONDS = 60  # for a test that takes one or two; a mutant that only hangs is not caught

# Of a mutant that is broken in itself: Python or SQL that cannot be run proves nothing about a rule.
NONSENSE = re.compile(
    r"^E +(?:\w+\.)*TypeError\b|\b(?:Attribute|Import|Indentation|ModuleNotFound|Name|Syntax|UnboundLocal)Error\b"
    r"|\(42(?:601|703|803|804|883|P\d\d)\)|PostgresSyntaxError|Undefined(?:Column|Function|Table)Error"
    r"|DatatypeMismatchError|IndeterminateDatatypeError|AmbiguousParameterError|invalid input for query argument"
    r"|^E +Failed: Timeout ",
    flags=re.MULTILINE,
)

ids = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def copy(folder: Path) -> None:
    """The repository as the tests need it. Times are kept, so that what was compiled counts as fresh."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            # Without what another run is just compiling: it is gone in a moment.
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
        else:
            shutil.copy2(source, folder / name)


def break_rule(mutant: Mutant, folder: Path) -> Path:
    """Apply the mutant to the copy, and return the file; no compiled code of the unbroken file is left beside it."""
    file, source = mutant.applied()
    path = folder / "service" / "firstclaim" / file
    path.unlink()  # it is a link to the file of the first copy
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
    return file


class Lane:
    """A process that forks for one run of pytest after the other (see `tests.mutants.warm`)."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, str(HERE / "warm.py")]
        self._process = subprocess.Popen(
            command, env=environment, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True
        )

    def run(self, folder: Path, template: str, *arguments: str) -> tuple[int, str]:
        """The exit code of pytest in `folder`, and its output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), template, *QUIET, *arguments]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, (folder / "said").read_text()

    def close(self) -> None:
        """End it, with whatever its fork hangs in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


class Lanes:
    """Runs of pytest, each in a copy of its own, as many at once as there are lanes.

    A copy consists of links to the files of a first copy in `folder`: that takes a fifth of the time.
    """

    def __init__(self, folder: Path, environment: dict[str, str], template: str) -> None:
        self._folder = folder
        self._template = template
        copy(folder / "unbroken")
        self._lanes = [Lane(environment) for _ in range(LANES)]
        self._free = queue.SimpleQueue[Lane]()
        for lane in self._lanes:
            self._free.put(lane)
        self._threads = ThreadPoolExecutor(LANES)

    def submit(self, mutant: Mutant | None, *arguments: str) -> Future[tuple[int, str]]:
        """Pytest in a copy, with the mutant's rule broken."""
        return self._threads.submit(self._run, mutant, arguments)

    def _run(self, mutant: Mutant | None, arguments: Sequence[str]) -> tuple[int, str]:
        lane = self._free.get()
        try:
            with tempfile.TemporaryDirectory(dir=self._folder) as name:
                folder, template = Path(name), self._template
                shutil.copytree(self._folder / "unbroken", folder, copy_function=os.link, dirs_exist_ok=True)
                if mutant is not None and "migrations" in break_rule(mutant, folder).parts:
                    template = ""  # it migrates one of its own
                return lane.run(folder, template, *arguments)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """End all of it."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for lane in self._lanes:
            lane.close()


@pytest.fixture(scope="module")
def lanes(stores: Stores) -> Iterator[Lanes]:
    """On the stores that this run has, and on its migrated template."""
    if "TEST_DATABASE_URL" not in os.environ:
        asyncio.run(forgo_fsync(stores.postgres_url))
    addresses = {"TEST_DATABASE_URL": stores.postgres_url, "TEST_REDIS_URL": stores.redis_url}
    environment = os.environ | addresses | {"COLUMNS": "1000"}  # a failure's first line is not cut short
    with tempfile.TemporaryDirectory(prefix="firstclaim-mutants-") as folder:
        lanes = Lanes(Path(folder), environment, stores.template)
        yield lanes
        lanes.close()


async def forgo_fsync(url: str) -> None:
    """Let a server that ends with this run not wait for its disk: dropping a database took a second, most of a run."""
    connection = await asyncpg.connect(url)
    await connection.execute("ALTER SYSTEM SET fsync = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


@pytest.fixture(scope="module")
def runs(lanes: Lanes, request: pytest.FixtureRequest) -> dict[str, Future[tuple[int, str]]]:
    """The runs of all mutants that this session is about, in their order: while one is judged, the next go on."""
    wanted = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = {item.callspec.id for item in wanted if item.originalname == "test_the_suite_goes_red"}
    mutants = [mutant for mutant in MUTANTS if mutant.name in names]
    return {each.name: lanes.submit(each, "-x", f"--timeout={TEST_SECONDS}", each.node_id) for each in mutants}


def why_not_red(node_id: str, code: int, said: str) -> str | None:
    """Why a run does not count as the test's failure; None: it does."""
    if code == 0:
        return "the test is green: nothing notices that the rule is broken"
    # Whatever it exits with: what a mutant leaves unclosed may break pytest's own end after the test has failed.
    if not re.search(rf"^FAILED {re.escape(node_id)}(?:\[| |$)", said, flags=re.MULTILINE):
        return "the test itself did not fail: something before it did"
    if nonsense := NONSENSE.search(said):
        return f"the test failed, but not because the rule is broken: {nonsense[0]}"
    return None


# -- the mutants --------------------------------------------------------------------------------------


@pytest.mark.mutants
@pytest.mark.timeout(3 * TEST_SECONDS)
@ids
def test_the_suite_goes_red(mutant: Mutant, runs: dict[str, Future[tuple[int, str]]]) -> None:
    """With the rule broken in a copy of the service, the test that proves it fails there, by what it asserts."""
    code, said = runs[mutant.name].result()
    assert (reason := why_not_red(mutant.node_id, code, said)) is None, f"{mutant.name}: {reason}\n{said}"


@pytest.mark.mutants
@pytest.mark.timeout(900)
def test_unbroken_they_are_green(lanes: Lanes) -> None:
    """The control: in a copy that is not changed all of these tests pass. (That it is the copy, the mutants show.)"""
    code, said = lanes.submit(None, *dict.fromkeys(mutant.node_id for mutant in MUTANTS)).result()
    assert code == 0, said


# -- what holds without running them ------------------------------------------------------------------


@ids
def test_the_mutant_fits(mutant: Mutant) -> None:
    """The service has exactly once what the mutant changes, and the result is valid Python."""
    file, source = mutant.applied()
    compile(source, file, "exec")


def test_every_test_named_exists() -> None:
    """Pytest finds each test that a mutant names, parameters included."""
    named = {mutant.node_id for mutant in MUTANTS}
    command = [sys.executable, "-m", "pytest", *QUIET, "--collect-only", *sorted(named)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout


def test_no_two_have_one_name() -> None:
    """A name in a report is one mutant."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_readme_has_the_same_mutants(heading: str) -> None:
    """README.md lists the mutants of each section under its heading: the rule, the mutant, the test that fails."""
    lines = ["| rule | mutant | test that fails |", "| --- | --- | --- |"]
    lines += [f"| {mutant.rule} | `{mutant.name}` | `{mutant.red}` |" for mutant in SECTIONS[heading]]
    wanted = "\n".join([f"## {heading}", "", *lines, "", "## "])
    assert wanted in (HERE / "README.md").read_text(), wanted


RED = "FAILED tests/a.py::test_b - AssertionError: assert 1 == 2"


@pytest.mark.parametrize(
    ("code", "said", "caught"),
    [
        (1, RED, True),
        (1, "FAILED tests/a.py::test_b[x y] - assert 1 == 2", True),
        (0, "1 passed", False),
        (1, "FAILED tests/a.py::test_bc - assert 1 == 2", False),
        (1, "ERROR tests/a.py::test_b - asyncpg.PostgresError: no", False),  # of a fixture
        (2, "ERROR tests/a.py - SyntaxError: invalid syntax", False),  # of the collection
        (4, "ERROR: not found: tests/a.py::test_b", False),
        (1, f"E   NameError: name 'x' is not defined\n{RED}", False),
        (1, f"delivery_broke error=\"NameError: name 'x' is not defined\"\n{RED}", False),
        (1, f"E   TypeError: f() takes 1 positional argument but 2 were given\n{RED}", False),
        (1, f'E   asyncpg.exceptions.PostgresSyntaxError: syntax error at or near "x"\n{RED}', False),
        (1, f"ledger_unavailable error='ProgrammingError (42703)'\n{RED}", False),
        (1, f"E   Failed: Timeout (>60.0s) from pytest-timeout.\n{RED}", False),
        (1, f"E   TimeoutError\n{RED}", True),  # of the test's own patience
        (3, RED, True),  # pytest's end was broken, after the failure
        (3, "1 passed", False),
    ],
)
def test_only_the_tests_own_failure_counts(code: int, said: str, caught: bool) -> None:
    """Not a green test, nor an error on the way to it, nor a mutant that is broken in itself, nor one that hangs."""
    assert (why_not_red("tests/a.py::test_b", code, said) is None) == caught
