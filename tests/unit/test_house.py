"""The house rules that a test can check: documentation, size, words, and that nothing opens at import."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import firstclaim

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "service" / "firstclaim"
MODULE_MOST_LINES = 320  # that are not blank; two screens of code and what it argues for


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of every import in the module, those inside functions too."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: a relative import"
            yield from ((str(node.module), alias.name) for alias in node.names)


def imported_modules(name: str) -> set[str]:
    """Which of our modules it imports; `from firstclaim.inbox import outcome` is the module `outcome`."""
    found = set()
    for module, member in imports(name):
        if module.partition(".")[0] == "firstclaim":
            full = f"{module}.{member}"
            found.add(full if full in MODULES else module)
    return found


# -- who may import whom (the layers are a contract in pyproject.toml, checked by import-linter) ----------


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("firstclaim.handlers")])
def test_handlers_import_only_public_names(name: str) -> None:
    """The shipped handlers live by what any user's can: the public names, and other packages."""
    for module, member in imports(name):
        assert not module.startswith("firstclaim.") or module.startswith("firstclaim.handlers."), module
        assert module != "firstclaim" or member in firstclaim.__all__, member


def test_only_the_outermost_layers_know_the_web_server() -> None:
    """uvicorn is known to the server alone, and Typer to the command alone."""
    for package, rooms in {"uvicorn": {"server"}, "typer": {"cli"}}.items():
        knows = {name for name in MODULES if any(module.split(".")[0] == package for module, _ in imports(name))}
        assert {name.split(".")[1] for name in knows} == rooms


def test_no_service_has_the_load_generator_in_it() -> None:
    """locust and gevent are imported by one module, and that by nobody but a function which runs in a new process."""
    knows = {name for name in MODULES for module, _ in imports(name) if module.split(".")[0] in ("locust", "gevent")}
    assert knows == {"firstclaim.loadtest.users"}
    assert {name for name in MODULES if "firstclaim.loadtest.users" in imported_modules(name)} == {
        "firstclaim.loadtest.runner"
    }
    assert not [
        node
        for node in MODULES["firstclaim.loadtest.runner"].body
        if isinstance(node, ast.ImportFrom) and node.module == "firstclaim.loadtest.users"
    ]


@pytest.mark.parametrize(
    "name", ["firstclaim.event", "firstclaim.outcome", "firstclaim.inbox.model", "firstclaim.errors"]
)
def test_values_know_no_client(name: str) -> None:
    """What all others share talks to nothing: no driver, no client, no framework."""
    clients = {"asyncpg", "redis", "starlette", "uvicorn", "httpx", "asyncio"}
    assert not {module.split(".")[0] for module, _ in imports(name)} & clients


# -- nothing opens at import --------------------------------------------------------------------------

OPENS = """
import sys
opened = []
def note(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.fork", "sqlite3.")) and event != "socket.__new__":
        # stripe-python loads urllib3, which binds ::1 for a moment to see whether there is IPv6.
        if sys._getframe(1).f_globals.get("__name__") != "urllib3.util.connection":
            opened.append(event)
    if event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
        opened.append(f"open {arguments[0]}")
sys.dont_write_bytecode = True
sys.addaudithook(note)
import importlib, threading
importlib.import_module(sys.argv[1])
assert not opened, opened
assert threading.active_count() == 1, threading.enumerate()
heavy = {
    "_hashlib", "alembic", "asyncio", "asyncpg", "difflib", "orjson", "pydantic", "redis", "rich", "sqlalchemy",
    "starlette", "stripe", "structlog", "typer", "uvicorn",
}
loaded = heavy & set(sys.modules)
assert sys.argv[1] != "firstclaim" or not loaded, loaded
"""


@pytest.mark.parametrize("name", ["firstclaim", "firstclaim.handlers", "firstclaim.app", "firstclaim.cli.main"])
def test_importing_opens_nothing(name: str) -> None:
    """No socket, process, thread or file for writing; `firstclaim` alone loads nothing that is slow to import."""
    done = subprocess.run(
        [sys.executable, "-c", OPENS, name], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_all_there() -> None:
    """`from firstclaim import ...` offers what a handler module or an embedding application needs, and nothing else."""
    assert sorted(firstclaim.__all__) == [
        "BatchContext",
        "Context",
        "Event",
        "Pause",
        "Permanent",
        "Retry",
        "Settings",
        "TaskContext",
        "asgi",
        "on",
        "task",
    ]
    assert all(hasattr(firstclaim, name) for name in firstclaim.__all__)


# -- size and words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_too_long(name: str) -> None:
    """What does not fit in a head belongs in two modules."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert sum(1 for line in text.splitlines() if line.strip()) <= MODULE_MOST_LINES


def undocumented(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    """Public functions and classes at the top of a module, and public methods, without a docstring."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("name", [name for name, tree in MODULES.items() if tree.body])
def test_everything_public_says_what_it_is(name: str) -> None:
    """Every module says what it guarantees, every public class and function what it does."""
    tree = MODULES[name]
    assert ast.get_docstring(tree)
    if not name.startswith("firstclaim.migrations.versions"):  # their one function has Alembic's name and meaning
        assert not list(undocumented(tree.body, ""))


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_says_what_it_proves(path: Path) -> None:
    """Each test has one sentence, and each test module too."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", MODULES)
def test_words_we_avoid(name: str) -> None:
    """One word for one thing: none of those that house-style.md rules out is in a name of ours."""
    avoided = re.compile(r"processor(?!s)|dlq|stuck|stalled|zombie|orphan|exactly_once", re.IGNORECASE)
    names = {node.name for node in ast.walk(MODULES[name]) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in ast.walk(MODULES[name]) if isinstance(node, ast.Name)}
    assert not {each for each in names if avoided.search(each)}
