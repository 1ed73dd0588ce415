"""The tests tested: each rule of the protocol is broken in a copy of the service, and the test named for it fails.

Guarantees: a mutant is caught only if that very test failed in its own body, by an assertion. A failed import,
collection, set-up or parse does not count, nor does a timeout. The same tests pass in an unchanged copy. The service
itself contains no switch that weakens it.
"""

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

import pytest

from tests.conftest import FOUND
from tests.mutants.mutant import Mutant
from tests.mutants.mutants import MUTANTS, SECTIONS
from tests.stores import Stores

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
COPIED = ("service", "tests", "pyproject.toml")
# Plugins that were imported before pytest started cannot have their assertions rewritten, and do not need it.
QUIET = ("-p", "no:cacheprovider", "-q", "-m", "", "--color=no", "-W", "ignore::pytest.PytestAssertRewriteWarning")
# Python's own traceback: for pytest's, with the source of each function, a failed test's whole file is parsed again.
NATIVE = "--tb=native"
LANES = 8  # runs at once, on two cores: most of the time the tests only wait, for what does not happen
TEST_SECONDS = 60  # for a test that takes one or two; a mutant that times out is not caught

CONTROL = "control"
Runs = dict[str, Future[tuple[int, str]]]  # by the mutant's name

# The output of a mutant that is itself invalid: Python or SQL that cannot run proves nothing about a rule.
NONSENSE = re.compile(
    r"^(?:E +)?(?:\w+\.)*TypeError\b|\b(?:Attribute|Import|Indentation|ModuleNotFound|Name|Syntax|UnboundLocal)Error\b"
    r"|\(42(?:601|703|803|804|883|P\d\d)\)|PostgresSyntaxError|Undefined(?:Column|Function|Table)Error"
    r"|DatatypeMismatchError|IndeterminateDatatypeError|AmbiguousParameterError|invalid input for query argument"
    r"|^(?:E +)?Failed: Timeout ",
    flags=re.MULTILINE,
)

ids = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def copy(folder: Path) -> None:
    """Copy what the tests need of the repository. Times are kept, so that compiled files count as fresh."""
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            # Without the temporary files of another run that compiles: they vanish.
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.pyc.*"))
        else:
            shutil.copy2(source, folder / name)


def change(folder: Path, file: Path, source: str) -> None:
    """Give a file of the copy another source, and delete its compiled code."""
    path = folder / "service" / "firstclaim" / file
    path.unlink()  # a link to the file of the first copy
    path.write_text(source)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


class Lane:
    """A process that forks for each run of pytest (see `tests.mutants.warm`)."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, str(HERE / "warm.py")]
        self._process = subprocess.Popen(
            command, env=environment, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True
        )

    def run(self, folder: Path, template: str, *arguments: str) -> tuple[int, str]:
        """Run pytest in `folder`; return its exit code and its output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(folder), template, *QUIET, *arguments]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return code, (folder / "output").read_text()

    def close(self) -> None:
        """End the process and its fork."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


class Lanes:
    """Runs of pytest, each in a copy of its own, as many at once as there are lanes.

    A copy consists of links to the files of a first copy in `folder`, which takes a fifth of the time.
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
        """Run pytest in a copy, with the mutant's rule broken."""
        # Applied here, not in the thread: in Python 3.11, two threads that parse at once disturb each other.
        return self._threads.submit(self._run, mutant.applied() if mutant else None, arguments)

    def _run(self, changed: tuple[Path, str] | None, arguments: Sequence[str]) -> tuple[int, str]:
        lane = self._free.get()
        try:
            with tempfile.TemporaryDirectory(dir=self._folder) as name:
                folder, template = Path(name), self._template
                shutil.copytree(self._folder / "unbroken", folder, copy_function=os.link, dirs_exist_ok=True)
                if changed is not None:
                    change(folder, *changed)
                    if "migrations" in changed[0].parts:
                        template = ""  # the run migrates its own
                return lane.run(folder, template, *arguments)
        finally:
            self._free.put(lane)

    def close(self) -> None:
        """End all processes and threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for lane in self._lanes:
            lane.close()


@pytest.fixture(scope="module")
def lanes(stores: Stores) -> Iterator[Lanes]:
    """Lanes on the stores of this run and their migrated template."""
    addresses = {"TEST_DATABASE_URL": stores.postgres_url, "TEST_REDIS_URL": stores.redis_url}
    environment = os.environ | addresses | {"COLUMNS": "1000"}  # a failure's first line is not cut short
    with tempfile.TemporaryDirectory(prefix="firstclaim-mutants-") as folder:
        lanes = Lanes(Path(folder), environment, stores.template)
        yield lanes
        lanes.close()


@pytest.fixture(scope="module")
def runs(lanes: Lanes, request: pytest.FixtureRequest) -> Runs:
    """The runs of the selected tests, in their order. While the result of one is checked, the next ones continue."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = {item.callspec.id for item in items if item.originalname == "test_the_named_test_fails"}
    runs: Runs = {}
    if any(item.originalname == "test_the_unchanged_copy_passes" for item in items):
        files: dict[str, dict[str, None]] = {}
        for mutant in MUTANTS:
            files.setdefault(mutant.red.partition("::")[0], {})[mutant.node_id] = None
        for number in range(LANES):
            share = [node_id for file in list(files.values())[number::LANES] for node_id in file]
            runs[f"{CONTROL} {number}"] = lanes.submit(None, *share)
    for mutant in MUTANTS:
        if mutant.name in names:
            runs[mutant.name] = lanes.submit(mutant, "-x", NATIVE, f"--timeout={TEST_SECONDS}", mutant.node_id)
    return runs


def why_not_red(node_id: str, code: int, output: str) -> str | None:
    """Why a run does not count as a failure of the test. None if it does."""
    if code == 0:
        return "the test passed: it does not detect that the rule is broken"
    # The exit code does not matter, nor whether there is a summary: what a mutant leaves open may break pytest's end
    # after the test has failed. The headline of an error outside the test has other words before its name.
    name = re.escape(node_id.rpartition("::")[2])
    failed = rf"^FAILED {re.escape(node_id)}(?:\[| |$)|^_+ {name}(?:\[.*\])? _+$"
    if not re.search(failed, output, flags=re.MULTILINE):
        return "the test itself did not fail, but something before it"
    if nonsense := NONSENSE.search(output):
        return f"the test failed, but because the mutant is invalid: {nonsense[0]}"
    return None


# -- the mutants --------------------------------------------------------------------------------------


@pytest.mark.mutants
@pytest.mark.timeout(900)
def test_the_unchanged_copy_passes(runs: Runs) -> None:
    """The control: all of these tests pass in unchanged copies. (That the copy is tested, the mutants show.)"""
    for code, output in (runs[name].result() for name in runs if name.startswith(CONTROL)):
        assert code == 0, output


@pytest.mark.mutants
@pytest.mark.timeout(3 * TEST_SECONDS)
@ids
def test_the_named_test_fails(mutant: Mutant, runs: Runs) -> None:
    """With the rule broken in a copy of the service, the test of the rule fails there, by an assertion."""
    code, output = runs[mutant.name].result()
    assert (reason := why_not_red(mutant.node_id, code, output)) is None, f"{mutant.name}: {reason}\n{output}"


@pytest.mark.mutants
@pytest.mark.parametrize("seed", range(6))
def test_libraries_are_imported_in_their_order(seed: int, tmp_path: Path) -> None:
    """A lane imports what its forks imported in the same order, or no task of the next fork would know itself."""
    (tmp_path / "libraries").write_text('["asyncio", "_asyncio"]')
    script = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
sys.path.insert(0, "")  # it takes the first one away
import warm
warm.import_libraries({str(tmp_path)!r})
import asyncio
async def known(): return asyncio.current_task() is not None
assert asyncio.run(known())
"""
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- checks that run no mutant ------------------------------------------------------------------------


@ids
def test_the_mutant_fits(mutant: Mutant) -> None:
    """The service has exactly once the code that the mutant changes, and the result is valid Python."""
    file, source = mutant.applied()
    compile(source, file, "exec")


def test_every_test_named_exists(request: pytest.FixtureRequest) -> None:
    """Pytest finds each test that a mutant names, parameters included."""
    found = request.config.stash[FOUND]
    known = found | {node_id.partition("[")[0] for node_id in found}
    if missing := {mutant.node_id for mutant in MUTANTS} - known:  # this run may be of a few files
        command = [sys.executable, "-m", "pytest", *QUIET, "--collect-only", *sorted(missing)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stdout


def test_no_two_have_one_name() -> None:
    """Each mutant has a name of its own."""
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
    ("code", "output", "caught"),
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
        (1, f"TypeError: f() takes 1 positional argument but 2 were given\n{RED}", False),  # of Python
        (1, f"E   Failed: Timeout (>60.0s) from pytest-timeout.\n{RED}", False),
        (1, f"Failed: Timeout (>60.0s) from pytest-timeout.\n{RED}", False),
        (1, f"E   TimeoutError\n{RED}", True),  # raised by the test itself
        (3, RED, True),  # pytest's end broke after the failure
        (3, "1 passed", False),
        (3, "_____ test_b _____\nAssertionError: no", True),  # nor did it print its summary
        (3, "_____ test_bc _____\nAssertionError: no", False),
        (1, "_____ ERROR at setup of test_b _____\nasyncpg.PostgresError: no", False),
    ],
)
def test_only_the_tests_own_failure_counts(code: int, output: str, caught: bool) -> None:
    """A pass, an error before the test, an invalid mutant and a timeout do not count."""
    assert (why_not_red("tests/a.py::test_b", code, output) is None) == caught
