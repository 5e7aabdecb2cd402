"""Which lines for a GPU the tests execute."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
from conftest import REPOSITORY
from test_house import PACKAGES

WORDS = re.compile(r"\b(cuda|is_cuda|mps|pin_memory|pinned|Event|CUDAGraph|graph)\b|!= 'cpu'")
FOLDERS = [".", *sorted(PACKAGES.keys() - {"benchmarks"})]
"""A benchmark runs on real GPUs only."""
SOURCE: dict[str, Any] = {"source": [str(REPOSITORY)], "omit": ["*/tests/*", "*/.venv/*"]}
START = """
import atexit, coverage, sys
recorded = coverage.Coverage({data!r}, data_suffix=True, **{source})
recorded.start()
atexit.register(recorded.save)
sys.path.append({tests!r})
from pretended_gpu import PretendedGpu
PretendedGpu().__enter__()
"""


class ExecutedLines:
    """Records the executed lines of this process, and of others that get `variables`, which have a pretended GPU."""

    def __init__(self, folder: Path):
        self.folder, self.variables = folder, {"PYTHONPATH": str(folder)}
        start = START.format(data=str(folder / ".coverage"), source=SOURCE, tests=str(REPOSITORY / "tests"))
        (folder / "sitecustomize.py").write_text(start)  # Python runs it first of all
        self.recorded = coverage.Coverage(data_file=None, **SOURCE)

    def __enter__(self) -> ExecutedLines:
        self.recorded.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.recorded.stop()

    def missing(self) -> list[str]:
        """Returns the lines for a GPU that were not executed, as `file:line`."""
        self.recorded.stop()
        self.recorded.combine([str(self.folder)])
        found = []
        for path in (path for folder in FOLDERS for path in sorted((REPOSITORY / folder).glob("*.py"))):
            missing = self.recorded.analysis2(str(path))[3]
            found += [f"{path.relative_to(REPOSITORY)}:{i}" for i in sorted({*lines_for_a_gpu(path)} & {*missing})]
        return found


def lines_for_a_gpu(path: Path) -> Iterator[int]:
    """Yields the lines of statements that name a GPU, and of all that happens under a condition that does."""
    compound = ast.FunctionDef | ast.ClassDef | ast.If | ast.For | ast.While | ast.With | ast.Try
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and WORDS.search(ast.unparse(node.test)):
            yield from (inner.lineno for inner in ast.walk(node) if isinstance(inner, ast.stmt))
        elif isinstance(node, ast.stmt) and not isinstance(node, compound):
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_docstring and WORDS.search(ast.unparse(node)):
                yield node.lineno
