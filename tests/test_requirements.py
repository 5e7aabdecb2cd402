"""The requirements: `constraints.txt` pins all that they install."""

import itertools
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
FREE = ("nvidia-", "cuda-", "triton", "pip")
"""Beginnings of names that pip must be free to choose."""


def read(name: str) -> dict[str, Requirement]:
    """Returns the requirements in a file by canonical name."""
    lines = (line.partition("#")[0].strip() for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, filter(None, lines))}


PINS = {name: Version(str(pin.specifier).removeprefix("==")) for name, pin in read("constraints.txt").items()}


def test_every_requirement_is_pinned_exactly_and_for_every_platform():
    for name, requirement in itertools.chain.from_iterable(read(file).items() for file in REQUIREMENTS):
        assert name in PINS and PINS[name] in requirement.specifier, f"{name} in constraints.txt"
    for name, pin in read("constraints.txt").items():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin} is no exact, portable version"
        assert not name.startswith(FREE), f"pip must be free to choose {name}"


@pytest.mark.skipif(Path(sys.prefix) != REPOSITORY / ".venv", reason="not the environment that `make` builds")
def test_the_environment_has_the_pinned_versions_and_nothing_else():
    for package in metadata.distributions():
        name = canonicalize_name(package.name)
        is_ours = not name.startswith((*FREE, "setuptools"))
        assert not is_ours or Version(Version(package.version).public) == PINS.get(name), f"{name} in constraints.txt"
