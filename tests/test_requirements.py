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
        assert not name.startswith(("nvidia-", "cuda-", "triton", "pip")), f"pip must be free to choose {name}"


@pytest.mark.skipif(Path(sys.prefix) != REPOSITORY / ".venv", reason="not the environment that `make` builds")
def test_the_environment_has_the_pinned_versions_and_they_need_nothing_else():
    """Packages that only some platforms or versions of Python need may be missing in `constraints.txt`."""
    seen = set()
    pending = [requirement for file in REQUIREMENTS for requirement in read(file).values()]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if name not in PINS and re.search("platform|python|implementation|os_name", str(requirement.marker)):
            continue
        assert Version(Version(metadata.version(name)).public) == PINS.get(name), f"{name} in constraints.txt"
        if (name, *requirement.extras) not in seen:
            seen.add((name, *requirement.extras))
            extras = requirement.extras or {""}
            needed = map(Requirement, metadata.requires(name) or ())
            pending += [n for n in needed if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
