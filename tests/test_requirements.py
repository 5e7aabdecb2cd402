"""The requirements: they resolve, and `constraints.txt` pins all that they install."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")


def read(name: str) -> dict[str, Requirement]:
    """Returns the requirements in a file by canonical name."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in (line.partition("#")[0].strip() for line in lines) if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins() -> dict[str, Version]:
    """Returns the versions in `constraints.txt` by canonical name."""
    return {name: Version(str(pin.specifier).removeprefix("==")) for name, pin in read("constraints.txt").items()}


@pytest.mark.parametrize("file", REQUIREMENTS)
def test_every_requirement_is_pinned_to_a_version_that_satisfies_it(file):
    versions = pins()
    for name, requirement in read(file).items():
        assert name in versions, f"{file} names {name}: add its version to constraints.txt"
        assert versions[name] in requirement.specifier, f"{name}=={versions[name]} does not satisfy {requirement}"


def test_every_pin_is_exact_and_free_of_platforms():
    for name, pin in read("constraints.txt").items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin} is no exact, portable version"
        assert not name.startswith(("nvidia-", "cuda-", "triton", "pip")), f"pip must be free to choose {name}"


@pytest.mark.skipif(
    Path(sys.prefix) != REPOSITORY / ".venv", reason="this Python is not in the environment that `make` builds"
)
def test_the_environment_has_the_pinned_versions_and_they_need_nothing_else():
    """Packages that only some platforms or versions of Python need may be missing in `constraints.txt`."""
    versions, seen = pins(), set()
    pending = [requirement for file in REQUIREMENTS for requirement in read(file).values()]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name not in versions and re.search("platform|python|implementation|os_name", str(requirement.marker)):
            continue
        assert name in versions, f"add {name} to constraints.txt"
        installed = Version(metadata.version(name))
        assert Version(installed.public) == versions[name], f"{name} {installed} is installed: update constraints.txt"
        assert requirement.specifier.contains(installed, prereleases=True), f"{name} {installed} is not {requirement}"
        if (name, *requirement.extras) not in seen:
            seen.add((name, *requirement.extras))
            needed = (Requirement(line) for line in metadata.requires(name) or ())
            extras = requirement.extras or {""}
            pending += [n for n in needed if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]


@pytest.mark.slow
def test_the_requirements_resolve():
    """Slow: older versions of pip download every package to read its requirements. Skipped without a package index."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "-r", "requirements.txt", "-c", "constraints.txt"],
        cwd=REPOSITORY, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    if result.returncode and "connection broken" in result.stderr:
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stderr[-2000:]
