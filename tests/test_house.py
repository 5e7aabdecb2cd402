"""The rules of the house: which file may import which, how long files and functions may be, what is annotated."""

from __future__ import annotations

import ast
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
FLOORS = {
    "system": 1,
    "gpt_config": 0,
    "model": 1,
    "text": 2,
    "weights": 3,
    "generation": 4,
    "training": 5,
    "interface": 5,
    "benchmarks": SCRIPT_FLOOR,
    **{script.removesuffix(".py"): SCRIPT_FLOOR for script in SCRIPTS},
}
PACKAGES = {name for name in FLOORS if f"{name}.py" not in SCRIPTS | {"model.py"}}
MAX_LINES = {"model.py": 380, "training/trainer.py": 260}
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported module."""

    module: str
    """dotted name: `torch.nn`, `weights.checkpoint`"""
    line: int
    functions: tuple[str, ...]
    """names of the functions and classes around the import, from the outside in"""
    in_function: bool

    @property
    def top(self) -> str:
        """The package or script: `weights`."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """One of the project's Python files."""

    path: Path
    """relative to the repository"""

    @property
    def name(self) -> str:
        """Dotted name: `weights.checkpoint`."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def top(self) -> str:
        """The package or script: `weights`."""
        return self.name.partition(".")[0]

    @cached_property
    def source(self) -> str:
        return (REPOSITORY / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    def imports(self) -> Iterator[Import]:
        """Yields every import, those in functions and under `if TYPE_CHECKING` too."""
        for node, scopes in walk(self.tree):
            names = tuple(scope.name for scope in scopes)
            in_function = any(isinstance(scope, Function) for scope in scopes)
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno, names, in_function)
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(self.path.parts[: len(self.path.parts) - node.level]) if node.level else ""
                module = ".".join(part for part in (package, node.module) if part)
                inner = [f"{module}.{alias.name}" for alias in node.names]
                for found in dict.fromkeys(name if is_ours(name) else module for name in inner):
                    yield Import(found, node.lineno, names, in_function)

    def our_imports(self) -> Iterator[Import]:
        """Yields the imports of the project's own modules, except the one that `GPT.from_pretrained` may have."""
        for found in self.imports():
            is_exception = (self.name, found.top) == ("model", "weights")
            if found.top in FLOORS and not (is_exception and found.functions == ("GPT", "from_pretrained")):
                yield found

    def functions(self) -> Iterator[tuple[Function, tuple[ast.AST, ...]]]:
        """Yields every function and method with the functions and classes around it."""
        for node, scopes in walk(self.tree):
            if isinstance(node, Function):
                yield node, scopes


def walk(node: ast.AST, scopes: tuple = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Yields the nodes of a syntax tree with the functions and classes around each, from the outside in."""
    yield node, scopes
    if isinstance(node, Function | ast.ClassDef):
        scopes = (*scopes, node)
    for child in ast.iter_child_nodes(node):
        yield from walk(child, scopes)


def is_ours(name: str) -> bool:
    """Whether a dotted name is one of the project's modules, not a name inside one."""
    path = REPOSITORY.joinpath(*name.split("."))
    return name.partition(".")[0] in FLOORS and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def modules() -> list[Module]:
    """Returns every Python file at the root and in the packages; the tests are not among them."""
    paths = [*REPOSITORY.glob("*.py"), *(path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py"))]
    return [Module(path.relative_to(REPOSITORY)) for path in sorted(paths)]


def may_import(importer: str, imported: str) -> bool:
    """Whether a package or script may import another; `interface` imports `training` to read its logs."""
    if importer == imported or (importer, imported) == ("interface", "training"):
        return True
    return FLOORS[imported] < FLOORS[importer] or FLOORS[importer] == SCRIPT_FLOOR


def fail_with(problems: Iterable[str]) -> None:
    """Fails the test if there are problems, and prints each on a line."""
    if problems := list(problems):
        pytest.fail("\n".join(problems), pytrace=False)


def test_the_root_holds_the_scripts_the_model_and_the_packages():
    assert {path.name for path in REPOSITORY.glob("*.py")} == SCRIPTS | {"model.py"}
    assert {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} == PACKAGES


def test_no_file_imports_from_a_higher_floor():
    def problems() -> Iterator[str]:
        for module in modules():
            for found in module.our_imports():
                if not may_import(module.top, found.top):
                    yield (
                        f"{module.path}:{found.line}: {module.top} (floor {FLOORS[module.top]}) imports "
                        f"{found.module} (floor {FLOORS[found.top]})"
                    )

    fail_with(problems())


def test_no_imports_close_a_circle():
    lines = {module.name: {found.module: found.line for found in module.our_imports()} for module in modules()}
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(lines).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
    fail_with(f"{a}, line {lines[a][b]}: imports {b}" for a, b in itertools.pairwise(circle))


def test_the_model_imports_torch_only():
    (model,) = (module for module in modules() if module.name == "model")
    fail_with(
        f"model.py:{found.line}: imports {found.module}; only torch and the standard library are allowed"
        for found in model.imports()
        if found.top not in sys.stdlib_module_names | {"torch"}
        and (found.top, found.functions) != ("weights", ("GPT", "from_pretrained"))
    )


def test_only_the_app_and_the_interface_import_streamlit():
    """The benchmark of the app may import Streamlit's test driver."""
    fail_with(
        f"{module.path}:{found.line}: imports {found.module}; only app.py and interface/ may"
        for module in modules()
        for found in module.imports()
        if found.top == "streamlit"
        and module.top not in ("app", "interface")
        and not (module.top == "benchmarks" and found.module.startswith("streamlit.testing"))
    )


def test_our_own_modules_are_imported_at_the_top():
    """A script delays the imports that import torch to `main`, so that `--help` is quick."""
    fail_with(
        f"{module.path}:{found.line}: {'.'.join(found.functions)} imports {found.module} inside the function"
        for module in modules()
        for found in module.our_imports()
        if found.in_function and not (FLOORS[module.top] == SCRIPT_FLOOR and found.functions == ("main",))
    )


def test_functions_are_short():
    fail_with(
        f"{module.path}:{node.lineno}: {node.name} has {lines} lines; at most {MAX_FUNCTION_LINES} are allowed"
        for module in modules() + [Module(path.relative_to(REPOSITORY)) for path in Path(__file__).parent.glob("*.py")]
        for node, _ in module.functions()
        if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    )


@pytest.mark.parametrize("path", MAX_LINES)
def test_the_files_to_read_first_are_short(path):
    lines = len(Module(Path(path)).source.splitlines())
    assert lines <= MAX_LINES[path], f"{path} has {lines} lines; at most {MAX_LINES[path]} are allowed"


def test_public_functions_are_annotated():
    """Public are functions and methods that no underscore hides; of the special methods, all are."""

    def is_private(name: str) -> bool:
        return name.startswith("_") and not name.endswith("__")

    def unannotated(node: Function, is_method: bool) -> Iterator[str]:
        arguments = [*node.args.posonlyargs, *node.args.args]
        is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        if is_method and not is_static:
            arguments = arguments[1:]
        arguments += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        yield from (argument.arg for argument in arguments if argument.annotation is None)
        if node.returns is None and node.name != "__init__":
            yield "the return value"

    fail_with(
        f"{module.path}:{node.lineno}: {node.name} lacks annotations of {', '.join(missing)}"
        for module in modules()
        for node, scopes in module.functions()
        if not any(isinstance(scope, Function) or is_private(scope.name) for scope in scopes)
        and not is_private(node.name)
        and (missing := list(unannotated(node, is_method=bool(scopes))))
    )
