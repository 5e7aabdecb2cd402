"""The rules of the house: how large it is, and which file may import which."""

from __future__ import annotations

import ast
import functools
import graphlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = {
    "prepare_data.py", "train.py", "generate.py", "prepare_sft_data.py", "train_sft.py", "app.py",
    "train_classifier.py", "classify.py", "evaluate.py", "export.py", "demo.py",
}  # fmt: skip
SCRIPT_FLOOR = 6
PACKAGES = {"system": 0, "text": 1, "weights": 2, "generation": 3, "training": 4, "interface": 5, "benchmarks": 6}
FLOORS = {
    "gpt_config": 0, "model": 0.5, **PACKAGES, **{script.removesuffix(".py"): SCRIPT_FLOOR for script in SCRIPTS}
}  # fmt: skip

MAX_LINES, MAX_TEST_LINES, MAX_WORDS = 11_100, 7_900, 11_300
"""The sizes of 0.3, and what is new since: the device check, the pretended GPU, `--minutes`, guesses, Persimmon. In
all, 1,500 lines, 1,000 lines of tests and 1,000 words may come."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60
MAX_TRAINING_FILES, MAX_TRAINING_LINES = 40, 6_650

THE_EXCEPTION = ("model", "weights", ("GPT", "from_pretrained"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: str
    """dotted name: `torch.nn`, `weights.checkpoint`"""
    line: int
    top: str
    """the package or script: `weights`"""
    scopes: tuple[str, ...]
    """names of the functions and classes around the import, from the outside in"""
    in_function: bool


@dataclass(frozen=True)
class Module:
    """One of the project's Python files."""

    path: Path
    """relative to the repository"""
    name: str
    """dotted name: `weights.checkpoint`"""
    top: str
    """the package or script: `weights`"""
    source: str

    @cached_property
    def nodes(self) -> list[tuple[ast.AST, tuple]]:
        """Every node of the syntax tree with the functions and classes around it."""
        return list(walk(ast.parse(self.source)))

    @cached_property
    def imports(self) -> list[Import]:
        """Every import but the exception, those in functions and under `if TYPE_CHECKING` too."""
        found = []
        for node, scopes in self.nodes:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = list(dict.fromkeys(name if name in modules() else str(node.module) for name in inner))
            where = (tuple(scope.name for scope in scopes), any(isinstance(scope, Function) for scope in scopes))
            found += [Import(name, node.lineno, name.partition(".")[0], *where) for name in names]
        return [i for i in found if (self.name, i.top, i.scopes) != THE_EXCEPTION]

    @property
    def our_imports(self) -> list[Import]:
        """The imports of the project's own modules."""
        return [i for i in self.imports if i.top in FLOORS]


def walk(node: ast.AST, scopes: tuple = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Yields the nodes of a syntax tree with the functions and classes around each, from the outside in."""
    yield node, scopes
    if isinstance(node, Function | ast.ClassDef):
        scopes = (*scopes, node)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, scopes)


@functools.cache
def modules() -> dict[str, Module]:
    """Returns the project's Python files outside of the tests by their dotted names."""
    return {module.name: module for folder in (".", "docs", *PACKAGES) for module in files_in(folder)}


def files_in(folder: str) -> list[Module]:
    """Returns the Python files in a folder of the repository."""
    found = []
    for path in sorted((REPOSITORY / folder).glob("*.py")):
        file = path.relative_to(REPOSITORY)
        name = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        found.append(Module(file, name, name.partition(".")[0], path.read_text(encoding="utf-8")))
    return found


def n_lines(files: Iterable[Module]) -> int:
    """Returns how many lines files have together."""
    return sum(len(file.source.splitlines()) for file in files)


def fail_with(problems: Iterable[str]) -> None:
    """Fails the test if there are problems, and prints each on a line."""
    if problems := list(problems):
        pytest.fail("\n".join(problems), pytrace=False)


def test_the_house_and_its_tests_are_small():
    lines, test_lines = n_lines(modules().values()), n_lines(files_in("tests"))
    assert lines <= MAX_LINES and test_lines <= MAX_TEST_LINES, f"{lines:,} lines, and {test_lines:,} of tests"


def test_the_documentation_is_short():
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)
    assert words <= MAX_WORDS, f"{words:,} words"


def test_files_and_functions_are_short():
    lengths = {}
    for module in [*modules().values(), *files_in("tests")]:
        lengths[f"{module.path}"] = n_lines([module]) - MAX_FILE_LINES
        for node in (node for node, _ in module.nodes if isinstance(node, Function)):
            n = node.end_lineno - node.lineno + 1
            lengths[f"{module.path}:{node.lineno}: {node.name}"] = n - MAX_FUNCTION_LINES
    fail_with(f"{name} has {n} lines too many" for name, n in lengths.items() if n > 0)


def test_train_reaches_little():
    """All that `train.py` imports, directly or not, with the imports inside functions. `__init__.py` holds no code."""
    reached = {"train"}
    for _ in modules():  # no chain of imports is longer
        reached |= {i.module for name in reached for i in modules()[name].our_imports}
    lines, files = n_lines(modules()[name] for name in reached), len(reached)
    assert files <= MAX_TRAINING_FILES and lines <= MAX_TRAINING_LINES, f"{files} files, {lines:,} lines"


def test_the_root_holds_the_scripts_the_model_and_the_packages():
    assert {path.name for path in REPOSITORY.glob("*.py")} == SCRIPTS | {"model.py", "gpt_config.py"}
    assert {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} == PACKAGES.keys()


def test_no_file_imports_from_a_higher_floor():
    fail_with(
        f"{module.path}:{i.line}: {module.top} (floor {FLOORS[module.top]}) imports {i.module} (floor {FLOORS[i.top]})"
        for module in modules().values()
        if FLOORS.get(module.top, SCRIPT_FLOOR) != SCRIPT_FLOOR
        for i in module.our_imports
        if i.top != module.top and FLOORS[i.top] >= FLOORS[module.top]
    )


def test_no_imports_close_a_circle():
    lines = {module.name: {i.module: i.line for i in module.our_imports} for module in modules().values()}
    try:
        graphlib.TopologicalSorter(lines).prepare()
    except graphlib.CycleError as error:
        circle = itertools.pairwise(error.args[1][::-1])
        fail_with(f"{a}, line {lines[a][b]}: imports {b}" for a, b in circle)


def test_the_model_imports_torch_and_its_shape_only():
    for name, allowed in {"model": {"torch", "gpt_config"}, "gpt_config": set()}.items():
        tops = {i.top for i in modules()[name].imports}
        assert tops - sys.stdlib_module_names <= allowed, name


def test_only_the_app_and_the_interface_import_streamlit():
    fail_with(
        f"{module.path}:{i.line}: imports {i.module}; only app.py and interface/ may"
        for module in modules().values()
        for i in module.imports
        if i.top == "streamlit" and module.top not in ("app", "interface")
    )


def test_our_own_modules_are_imported_at_the_top():
    """A script delays the imports that import torch to `main`, so that `--help` is quick."""
    fail_with(
        f"{module.path}:{i.line}: {'.'.join(i.scopes)} imports {i.module} inside the function"
        for module in modules().values()
        for i in module.our_imports
        if i.in_function and not (FLOORS.get(module.top, SCRIPT_FLOOR) == SCRIPT_FLOOR and i.scopes == ("main",))
    )
