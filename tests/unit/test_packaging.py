"""The lock, the Dockerfile, the compose file and the CI workflow agree with the code.

They are read as text, without Docker and without the network. CI builds and starts the image itself.
"""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from firstclaim.cli import livez
from firstclaim.listening import DEFAULT_PORT
from firstclaim.server import preflight
from firstclaim.setting_faults import PREFIX
from firstclaim.settings import Settings, environment_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
LOCK = (ROOT / "requirements.lock").read_text()
COMPOSE = (ROOT / "compose.yaml").read_text()
CI = (ROOT / ".github/workflows/ci.yaml").read_text()
TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "compose.yaml",
    "deploy",
    "docs",
    "justfile",
    "pyproject.toml",
    "requirements.lock",
    "service",
    "tests",
}

_HASH = re.compile(r"\s--hash=sha256:[0-9a-f]{64}(?=\s|$)")


def _logical_lines(text: str) -> list[str]:
    """`text` without comment lines, continued lines joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in kept.replace("\\\n", " ").splitlines() if line.strip()]


def _pins() -> list[Requirement]:
    return [Requirement(_HASH.sub("", line)) for line in _logical_lines(LOCK)]


def _version(pin: Requirement) -> str:
    [specifier] = pin.specifier
    assert specifier.operator == "==", f"{pin} is not an exact pin"
    return specifier.version


def _stages() -> list[list[tuple[str, str]]]:
    """The Dockerfile's stages, each a list of (instruction, rest)."""
    stages: list[list[tuple[str, str]]] = []
    for line in _logical_lines((ROOT / "Dockerfile").read_text()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest.strip()))
    return stages


def _last(instruction: str) -> str:
    """The last `instruction` of the final stage: the one that takes effect."""
    return [rest for name, rest in _stages()[-1] if name == instruction][-1]


def _pip_commands() -> list[list[str]]:
    """Every command of a RUN in which pip fetches, builds or installs something, split into words."""
    runs = [rest for stage in _stages() for name, rest in stage if name == "RUN"]
    commands = [shlex.split(part) for rest in runs for part in rest.split("&&")]
    return [words for words in commands if words[0] == "pip" and {"install", "wheel"} & set(words)]


def _services() -> dict[str, str]:
    """The text of each service in the compose file, by name."""
    block = re.split(r"^(?=\S)", COMPOSE.partition("\nservices:\n")[2], flags=re.MULTILINE)[0]
    parts = re.split(r"^  (\w+):\n", block, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _application() -> str:
    """The block that `migrate` and `service` share in the compose file."""
    return COMPOSE.partition("&firstclaim\n")[2].partition("\nservices:\n")[0]


# -- the wheel ----------------------------------------------------------------------------------------


def test_the_wheel_holds_one_package() -> None:
    """Only `firstclaim` is installed: nothing named `service` shadows an application's own package of that name."""
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["service/firstclaim"]}
    assert [path.name for path in (ROOT / "service").iterdir() if path.name != "__pycache__"] == ["firstclaim"]


def test_nothing_else_lies_at_the_top_level() -> None:
    """What somebody has tried out is not committed by mistake: its output may have a path or a secret."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("no git checkout")
    assert {name.partition("/")[0] for name in found.stdout.split("\0") if name} == TOP_LEVEL


def test_the_sdist_holds_the_package_and_what_documents_it() -> None:
    """The source distribution has the package, its documentation and what its build needs; no tests."""
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    documents = {"/CHANGELOG.md", "/CONTRIBUTING.md", "/deploy", "/docs", "/LICENSE", "/README.md", "/SECURITY.md"}
    assert set(included) == {*documents, "/pyproject.toml", "/service"}
    assert [name for name in included if not (ROOT / name[1:]).exists()] == []


# -- pre-commit ---------------------------------------------------------------------------------------


def test_the_hooks_run_the_installed_ruff() -> None:
    """Every hook of pre-commit runs a tool of the `dev` extra, as it is installed: no hook is downloaded."""
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = re.findall(r"^      - id: (.+)$", text, flags=re.MULTILINE)
    tools = re.findall(r"^        entry: (\S+)", text, flags=re.MULTILINE)
    assert hooks == ["ruff-check", "ruff-format"]
    assert set(tools) <= {Requirement(line).name for line in PROJECT["optional-dependencies"]["dev"]}
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    assert text.count("language: system") == len(tools) == len(hooks)
    assert "://" not in text


# -- requirements.lock --------------------------------------------------------------------------------


@pytest.mark.parametrize("dependency", PROJECT["dependencies"])
def test_every_dependency_is_locked_inside_its_range(dependency: str) -> None:
    """The lock pins every dependency of the project, at a version within its range in pyproject.toml."""
    wanted = Requirement(dependency)
    pins = [pin for pin in _pins() if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
    assert pins, f"{wanted.name} is not locked: run the command at the head of requirements.lock"
    outside = [str(pin) for pin in pins if _version(pin) not in wanted.specifier]
    assert not outside, f"{outside}, but pyproject.toml wants {wanted}"


def test_extras_are_locked_too() -> None:
    """The lock includes the extras of our dependencies: the C parser and SQLAlchemy's asyncio support."""
    assert {"hiredis", "greenlet"} <= {pin.name for pin in _pins()}


def test_every_pin_has_hashes() -> None:
    """Every line of the lock is one exact version with at least one SHA-256."""
    lines = _logical_lines(LOCK)
    assert lines
    assert not [line for line in lines if not _HASH.search(line)]
    assert all(_version(pin) for pin in _pins())


def test_the_lock_says_what_and_never_where() -> None:
    """The lock holds no URL, no path and no option, so it installs from any configured index."""
    assert not re.findall(r"https?:|file:|git\+| @ |(?<!\w)/\w+/", LOCK)
    assert not re.findall(r"--(?:extra-)?index|--find-links|--trusted-host|--no-index", LOCK)
    assert not [line for line in _logical_lines(LOCK) if line.startswith("-")]


def test_the_lock_is_for_production_only() -> None:
    """The lock, and with it the image, holds nothing that only the tests or the embedded servers need."""
    extras = [Requirement(line).name for group in PROJECT["optional-dependencies"].values() for line in group]
    assert extras
    assert not {canonicalize_name(name) for name in extras} & {canonicalize_name(pin.name) for pin in _pins()}


# -- Dockerfile, .dockerignore ------------------------------------------------------------------------


def test_the_image_does_not_run_as_root() -> None:
    """The last USER of the image is a number above 0, which an orchestrator can verify."""
    user, _, group = _last("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


def test_the_service_is_process_1() -> None:
    """ENTRYPOINT and CMD use the exec form and run our command, so SIGTERM reaches the service and not a shell."""
    entrypoint, command = json.loads(_last("ENTRYPOINT")), json.loads(_last("CMD"))
    assert entrypoint == ["firstclaim"]
    assert entrypoint[0] in PROJECT["scripts"]
    # Neither host nor port is an option: each can be set by a variable, also by the platform's PORT.
    assert command == ["serve"]
    assert "FIRSTCLAIM_HOST=0.0.0.0" in _last("ENV").split()
    assert _last("EXPOSE") == str(DEFAULT_PORT)
    assert _last("STOPSIGNAL") == "SIGTERM"


def test_the_last_stage_takes_only_the_venv() -> None:
    """The image copies only the venv from the builder: no source tree, no build tools."""
    copied = [rest for name, rest in _stages()[-1] if name in ("COPY", "ADD")]
    assert copied == ["--from=builder /opt/venv /opt/venv"]


def test_everything_fetched_is_hashed() -> None:
    """Each pip command of the Dockerfile requires hashes or is offline, and one of them installs the lock."""
    commands = _pip_commands()
    loose = [
        words for words in commands if "--require-hashes" not in words and not {"--no-index", "--no-deps"} <= set(words)
    ]
    assert not loose
    assert any({"--require-hashes", "-r", "requirements.lock"} <= set(words) for words in commands)


def test_the_build_backend_is_the_one_pyproject_asks_for() -> None:
    """The Dockerfile pins the build backend by hash, at a version that pyproject.toml allows."""
    found = re.findall(r"'(\S+==\S+) --hash=sha256:[0-9a-f]{64}'", (ROOT / "Dockerfile").read_text())
    pins = {pin.name: pin for pin in map(Requirement, found)}
    for wanted in map(Requirement, PYPROJECT["build-system"]["requires"]):
        assert _version(pins[wanted.name]) in wanted.specifier


def test_the_image_names_no_address_and_no_secret() -> None:
    """No layer of the image contains an index URL, a download URL or a credential."""
    recipe = [rest for stage in _stages() for _, rest in stage]
    assert not [rest for rest in recipe if re.search(r"https?:|--(extra-)?index-url|--find-links", rest)]
    settings = [rest for stage in _stages() for name, rest in stage if name in ("ARG", "ENV")]
    assert settings
    assert not [rest for rest in settings if re.search(r"(?i)secret|token|password|_url\b", rest)]


def test_what_the_dockerfile_copies_is_let_into_the_build() -> None:
    """Everything that the Dockerfile copies exists, and .dockerignore lets exactly that into the build."""
    rules = _logical_lines((ROOT / ".dockerignore").read_text())
    copies = [rest.split() for stage in _stages()[:-1] for name, rest in stage if name == "COPY"]
    sources = {source for *sources, _ in copies for source in sources}
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert not [source for source in sources if not (ROOT / source).exists()]


def test_the_health_check_is_the_command_that_follows_host_and_port() -> None:
    """HEALTHCHECK runs `firstclaim livez`, whose tests are in test_livez.py, with enough time for it."""
    options, _, command = _last("HEALTHCHECK").partition(" CMD ")
    assert json.loads(command) == ["firstclaim", "livez"]
    [timeout] = re.findall(r"--timeout=(\d+)s", options)
    assert int(timeout) > livez._TIMEOUT_SECONDS


# -- compose.yaml -------------------------------------------------------------------------------------


def test_compose_has_the_service_and_all_it_needs() -> None:
    """The conditions in the compose file enforce the order: the two stores, the migration, the service."""
    services = _services()
    assert set(services) == {"postgres", "redis", "migrate", "service"}
    waits = {
        (name, *pair)
        for name, text in services.items()
        for pair in re.findall(r"^      (\w+):\n        condition: (\w+)$", text, flags=re.MULTILINE)
    }
    assert waits == {
        ("migrate", "postgres", "service_healthy"),
        ("service", "migrate", "service_completed_successfully"),
        ("service", "redis", "service_healthy"),
    }
    assert "command: [migrate]" in services["migrate"]
    assert all("healthcheck:\n      test:" in services[store] for store in ("postgres", "redis"))


def test_compose_publishes_only_the_service() -> None:
    """No store is reachable from outside: it publishes no port, and its only network is internal."""
    services = _services()
    assert [name for name, text in services.items() if "ports:" in text] == ["service"]
    assert all("networks: [stores]" in services[name] for name in ("postgres", "redis", "migrate"))
    assert "  stores:\n    internal: true\n" in COMPOSE


def test_compose_hardens_our_containers() -> None:
    """Both of our containers are read-only, without capabilities, and cannot gain any."""
    ours = _application()
    for line in ("read_only: true", "cap_drop: [ALL]", 'security_opt: ["no-new-privileges:true"]'):
        assert f"\n  {line}\n" in ours
    assert all("<<: *firstclaim" in _services()[name] for name in ("migrate", "service"))


def _given(service: str) -> dict[str, str]:
    return dict(re.findall(r"^      ([A-Z_]+): (\S.*)$", _services()[service], flags=re.MULTILINE))


def test_compose_gives_only_settings_that_exist_and_demands_the_secret() -> None:
    """Each variable that compose gives to the service is a setting, and compose requires the signing secret."""
    given = _given("service")
    assert set(given) >= {"DATABASE_URL", "REDIS_URL", "STRIPE_WEBHOOK_SECRETS"}
    assert set(given) <= {environment_name(field) for field in Settings.model_fields}
    assert given["STRIPE_WEBHOOK_SECRETS"].startswith("${STRIPE_WEBHOOK_SECRETS:?")


def test_compose_passes_on_what_an_image_of_yours_needs() -> None:
    """Image, handlers and the page's password come from where compose runs; unset, they are the image's defaults."""
    given = _given("service")
    for name in ("FIRSTCLAIM_HANDLERS", "FIRSTCLAIM_ADMIN_PASSWORD"):
        assert given[name] == f"${{{name}:-}}"
    assert "  image: ${IMAGE:-firstclaim}\n" in _application()


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_the_documented_step_installs_into_the_image(tool: str) -> None:
    """The page's Dockerfile becomes root only for the packages, installs them into the image's venv, and checks it."""
    page = (ROOT / "docs/how-to/container.md").read_text()
    blocks = [_logical_lines(block) for block in re.findall(r"```dockerfile\n(.*?)```", page, flags=re.DOTALL)]
    [lines] = [block for block in blocks if any(f"{tool} pip" in line or f"RUN {tool} " in line for line in block)][-1:]
    [run] = [line for line in lines if line.startswith("RUN ")]
    [venv] = [rest.split()[-1] for rest in [copied for name, copied in _stages()[-1] if name == "COPY"]]
    assert f"--python {venv}/bin/python" in run
    assert run.count(" check") == 1
    users = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")]
    assert users == ["root", _last("USER")]
    assert lines.index("USER root") < lines.index(run) < lines.index(f"USER {_last('USER')}")


def test_compose_keeps_the_secret_from_the_migration() -> None:
    """The migration gets only the database URL."""
    assert set(_given("migrate")) == {"DATABASE_URL"}


def test_compose_waits_for_a_graceful_stop() -> None:
    """The grace period before SIGKILL is longer than the service's own limit for a shutdown."""
    [grace] = re.findall(r"stop_grace_period: (\d+)s", _services()["service"])
    assert int(grace) > Settings.model_fields["shutdown_seconds"].default


def test_nothing_we_ship_looks_like_a_misspelt_setting() -> None:
    """Every FIRSTCLAIM_* name in the Dockerfile and the compose file is a setting."""
    names = set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", (ROOT / "Dockerfile").read_text() + COMPOSE))
    assert names
    assert names <= {environment_name(field) for field in Settings.model_fields}


# -- CI, and the release ------------------------------------------------------------------------------

RELEASE = (ROOT / ".github/workflows/release.yaml").read_text()


def test_ci_runs_every_python_we_claim() -> None:
    """The CI matrix has the Python versions that pyproject.toml names, and each job runs all of .ci/run."""
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    [matrix] = re.findall(r"^        python: (\[.*\])$", CI, flags=re.MULTILINE)
    assert json.loads(matrix) == claimed
    assert "run: bash .ci/run\n" in CI
    assert (ROOT / ".ci/run").is_file()


def test_ci_can_only_read() -> None:
    """The token of CI is read-only, and that of a release has no right but those that a job names."""
    assert re.findall(r"^permissions:\n((?:  .*\n)+)", CI, flags=re.MULTILINE) == ["  contents: read\n"]
    assert "\npermissions: {}\n" in RELEASE
    assert not re.findall(r"secrets\.", CI + RELEASE)


def test_actions_and_the_base_image_are_pinned_by_hash() -> None:
    """No tag that somebody else can move decides what runs here: the version is a comment."""
    used = re.findall(r"uses: (.+)", CI + RELEASE)
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", each)] == []
    bases = [stage[0][1] for stage in _stages()]
    names = {base.rpartition(" AS ")[2] for base in bases if " AS " in base}
    [outside] = [base.partition(" AS ")[0] for base in bases if base not in names and base.split()[0] not in names]
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64}", outside)


def test_each_action_has_one_version() -> None:
    """CI and the release use the same commit of an action, and a commit has one version."""
    used = dict.fromkeys(re.findall(r"uses: (\S+?)@(\S+)  # (\S+)", CI + RELEASE))
    assert len({action for action, _, _ in used}) == len(used)


def test_ci_tries_what_a_release_builds() -> None:
    """The script that builds a release also runs in CI, and the release gives it its tag, which it compares."""
    assert "run: bash .ci/release\n" in CI
    assert 'run: bash .ci/release "$GITHUB_REF_NAME"\n' in RELEASE


@pytest.mark.parametrize("name", ["checks", "release"])
def test_the_tools_of_ci_are_pinned_by_hash(name: str) -> None:
    """What checks and builds a release is an exact version with its hashes, and named without an address."""
    lock, wanted = ((ROOT / ".ci" / f"{name}.{end}").read_text() for end in ("txt", "in"))
    lines = _logical_lines(lock)
    assert [line for line in lines if not _HASH.search(line)] == []
    pinned = {canonicalize_name(Requirement(_HASH.sub("", line)).name) for line in lines}
    assert {canonicalize_name(line) for line in _logical_lines(wanted)} <= pinned
    assert not re.findall(r"https?:|file:|--(?:extra-)?index|--find-links", lock)


def test_dependabot_looks_at_everything_that_is_pinned() -> None:
    """Dependabot proposes new versions of the packages, of CI's tools, of the actions and of the images."""
    ecosystems = re.findall(
        r"package-ecosystem: (\S+)\n    directory: (\S+)\n", (ROOT / ".github/dependabot.yml").read_text()
    )
    assert set(ecosystems) == {
        ("pip", "/"), ("pip", "/.ci"), ("github-actions", "/"), ("docker", "/"), ("docker-compose", "/"),
    }  # fmt: skip


def test_the_changelog_has_the_version() -> None:
    """The version of pyproject.toml has a section with its date, and no other version is above it but Unreleased."""
    sections = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    versions = [section for section in sections if section != ("Unreleased", "")]
    assert versions[0][0] == PROJECT["version"]
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in versions)


def test_the_changelog_has_the_usual_sections() -> None:
    """Each version has each heading of Keep a Changelog at most once, and no other heading."""
    usual = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for version in re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.+)$", version, flags=re.MULTILINE)
        assert len(set(headings)) == len(headings)
        assert set(headings) <= usual


def test_the_supported_versions_are_those_that_are_checked() -> None:
    """The page of versions names the Pythons of the matrix, the oldest Postgres that starts, and CI's Kubernetes."""
    page = (ROOT / "docs/reference/versions.md").read_text()
    rows = dict(re.findall(r"^\| ([\w, ]+?) \| (.+?) \|", page, flags=re.MULTILINE))
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert rows["Python"] == f"{claimed[0]} to {claimed[-1]}"
    assert PROJECT["requires-python"] == f">={claimed[0]}"
    assert rows["PostgreSQL"] == f"{preflight._MIN_POSTGRES // 10_000} and newer"
    schemas = re.findall(r"^for version in (\S+) (\S+); do$", (ROOT / ".ci/schemas").read_text(), flags=re.MULTILINE)
    assert rows["Kubernetes"] == "{} to {}".format(*schemas[0])
    fixed = re.findall(r"^\| ([\d.]+) \| yes \|$", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    assert fixed == [PROJECT["version"].rpartition(".")[0]]
