"""The documentation inside every CPython, as plain text: the corpus of `make demo`.

There are three sources, and none is a download: the language reference in `pydoc_data.topics`; the docstrings of the
standard library, read from its sources with `ast`, so that nothing is imported or run; the docstrings of `builtins` and
its types, which are written in C, so that the running interpreter is asked for them.
"""

import ast
import builtins
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

Kind = Literal["topic", "module", "class", "function", "attribute"]

# Folders of the standard library without documentation: installed packages, tests and tables.
_SKIPPED = re.compile(
    "__pycache__|config-.*|encodings|ensurepip|(idle_)?tests?|pydoc_data|site-packages|turtledemo|nt(path|url2path).py"
)
# Modules whose public name is another one, although no `from … import` says so.
_PUBLIC_NAMES = {"_collections_abc": "collections.abc", "posixpath": "os.path", "genericpath": "os.path"}


@dataclass(frozen=True)
class Entry:
    """One piece of documentation."""

    name: str
    """qualified and public: `os.path.join`, not `posixpath.join`"""
    kind: Kind
    docstring: str
    """dedented"""
    parameters: str | None = None
    """as in the source: "a, *p"; None if there is no source"""


def entries() -> Iterator[Entry]:
    """Yields all documentation in a fixed order: topics, built-ins, modules by name.

    A docstring with several names (inherited, or copied) keeps the first.
    """
    seen: set[str] = set()
    for entry in chain(_topics(), _builtins(), _standard_library()):
        if entry.docstring and entry.docstring not in seen:
            seen.add(entry.docstring)
            yield entry


def documents() -> Iterator[str]:
    """Yields the text of each entry: the name, with the parameters if known, a blank line and the docstring."""
    for entry in entries():
        parameters = "" if entry.parameters is None else f"({entry.parameters})"
        yield f"{entry.name}{parameters}\n\n{entry.docstring}\n"


def answers(builtins_only: bool = False) -> Iterator[tuple[Entry, str]]:
    """Yields entries, built-ins first, with what they do or are: the first sentence of the docstring."""
    seen: set[str] = set()
    for entry in _builtins() if builtins_only else chain(_builtins(), entries()):
        answer = first_sentence(entry.docstring)
        if answer and entry.kind != "topic" and entry.name not in seen:
            seen.add(entry.name)
            yield entry, answer


def first_sentence(docstring: str) -> str | None:
    """Returns the first sentence of a docstring on one line, with its full stop, or None if there is no sentence.

    A leading signature ("print(value, ..., sep=' ')") is skipped. Text that looks like code (a doctest, an item of a
    list, an arrow) is no sentence.
    """
    paragraphs = inspect.cleandoc(docstring).strip().split("\n\n")
    for paragraph in paragraphs[:4]:
        text = " ".join(paragraph.split())
        text = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], ]+)?\s*(--+|:)?\s*", "", text)
        sentence = re.split(r"(?<!i\.e)(?<!e\.g)\.(?=\s|$)", text, maxsplit=1)[0]
        if re.match(r"[A-Z][A-Za-z'-]* \S+ \S+", sentence) and not re.search(r">>>|->|--|:$|[{}]", sentence):
            return sentence + "."
    return None


def _topics() -> Iterator[Entry]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Entry(name, "topic", inspect.cleandoc(text).strip())


def _builtins() -> Iterator[Entry]:
    """Yields the built-in functions, types and exceptions, and the public methods and attributes of the types."""
    for name, value in sorted(vars(builtins).items()):
        # Skip what the module `site` adds (`exit`, `help`), and aliases (`IOError` is `OSError`).
        if getattr(value, "__module__", "") != "builtins" or value.__name__ != name or name.startswith("_"):
            continue
        is_type = isinstance(value, type)
        yield Entry(name, "class" if is_type else "function", inspect.cleandoc(value.__doc__ or "").strip())
        for member_name in sorted(vars(value)) if is_type else []:
            if not member_name.startswith("_"):
                member = getattr(value, member_name)
                kind: Kind = "function" if callable(member) else "attribute"
                yield Entry(f"{name}.{member_name}", kind, inspect.cleandoc(member.__doc__ or "").strip())


def _standard_library() -> Iterator[Entry]:
    """Yields the documentation in the sources of the standard library, under public names."""
    modules = _parse_modules()
    public_names = _reexports(modules)
    for module, tree in modules.items():
        is_private = any(part.startswith("_") for part in module.split("."))
        if (docstring := ast.get_docstring(tree)) and not is_private:
            yield Entry(module, "module", docstring)
        for entry in _members(tree, module):
            definition = ".".join(entry.name.split(".")[: module.count(".") + 2])
            if definition in public_names:
                yield replace(entry, name=public_names[definition] + entry.name[len(definition) :])
            elif not is_private:
                yield entry


def _parse_modules() -> dict[str, ast.Module]:
    """Returns the parsed sources of the standard library by public module name, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, ast.Module] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not any(map(_SKIPPED.fullmatch, relative.parts)):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            module = modules.setdefault(_PUBLIC_NAMES.get(name, name), ast.Module([], []))
            module.body += ast.parse(path.read_bytes()).body
    return modules


def _reexports(modules: dict[str, ast.Module]) -> dict[str, str]:
    """Returns the names that users import by the names of the definitions: `json.JSONDecoder` by
    `json.decoder.JSONDecoder`.

    Packages re-export names of their own modules, and public modules those of private modules beside them.
    """
    public_names: dict[str, str] = {}
    for module, tree in modules.items():
        if module.rpartition(".")[2].startswith("_"):
            continue
        blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, (ast.Try, ast.If)))]
        for node in (node for block in blocks for node in block if isinstance(node, ast.ImportFrom)):
            source = f"{module}.{node.module}" if node.level else str(node.module)
            if source not in modules or not source.startswith((f"{module}.", "_")):
                continue
            defined = {n.name for n in modules[source].body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            imported = {alias.name for alias in node.names if not alias.asname}
            for name in defined if "*" in imported else imported & defined:
                if not name.startswith("_"):
                    public_names.setdefault(f"{source}.{name}", f"{module}.{name}")
    return public_names


def _members(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    """Yields the public classes, functions and methods in a module or a class."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_") and not child.name.startswith("__"):
            continue
        name, docstring = f"{prefix}.{child.name}", (ast.get_docstring(child) or "").strip()
        if isinstance(child, ast.ClassDef):
            yield Entry(name, "class", docstring)
            yield from _members(child, name)
        else:
            yield Entry(name, "function", docstring, ast.unparse(child.args))
