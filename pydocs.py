"""The documentation that every CPython carries, as plain text: the corpus of `make demo`.

Three sources, none of them a download: the language reference in `pydoc_data.topics`, the docstrings of the standard
library, read from its sources with `ast` (nothing is imported or run), and those of `builtins` and its types, which
live in C and are read from the running interpreter.
"""

import ast
import builtins
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Folders of the standard library that hold no documentation: installed packages, tests and tables.
_SKIPPED_FOLDERS = {"__pycache__", "encodings", "ensurepip", "lib-dynload", "pydoc_data", "site-packages", "test",
                    "tests", "turtledemo"}
# Modules that are known under another name, where no `from … import` says so.
_PUBLIC_NAMES = {"posixpath": "os.path", "genericpath": "os.path", "ntpath": None, "nturl2path": None}


def documents() -> Iterator[tuple[str, str]]:
    """Yields every document once as (qualified name, text), in a fixed order: topics, built-ins, modules by name.

    The text is the name, with the parameters where the source shows them, then a blank line and the docstring. A
    docstring found under several names (inherited, or copied) is kept under the first.
    """
    seen = set()
    for name, heading, docstring in _entries():
        docstring = inspect.cleandoc(docstring).strip()
        if docstring and docstring not in seen:
            seen.add(docstring)
            yield name, f"{heading}\n\n{docstring}\n"


def builtin_docstrings() -> Iterator[tuple[str, str]]:
    """Yields (name, docstring) of the built-in functions, types and exceptions, and of the types' public methods."""
    for name, value in sorted(vars(builtins).items()):
        # Passed over: what the module `site` puts there (`exit`, `help`), and aliases (`IOError` is `OSError`).
        if getattr(value, "__module__", "") != "builtins" or value.__name__ != name or name.startswith("_"):
            continue
        yield name, value.__doc__ or ""
        for member_name in sorted(vars(value)) if isinstance(value, type) else []:
            if not member_name.startswith("_"):
                yield f"{name}.{member_name}", getattr(value, member_name).__doc__ or ""


def first_sentence(docstring: str) -> str | None:
    """Returns the first sentence of a docstring on one line, ending in a full stop, or None where there is none.

    A leading signature ("print(value, ..., sep=' ')") is passed over. What reads as code rather than as a sentence
    (a doctest, an item of a list, an arrow) is no sentence.
    """
    paragraphs = inspect.cleandoc(docstring).strip().split("\n\n")
    for paragraph in paragraphs[:4]:
        text = " ".join(paragraph.split())
        text = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], ]+)?\s*(--+|:)?\s*", "", text)
        sentence = re.split(r"(?<!i\.e)(?<!e\.g)\.(?=\s|$)", text, maxsplit=1)[0]
        if re.match(r"[A-Z][A-Za-z'-]* \S+ \S+", sentence) and not re.search(r">>>|->|--|:$|[{}]", sentence):
            return sentence + "."
    return None


def _entries() -> Iterator[tuple[str, str, str]]:
    """Yields (qualified name, heading, raw docstring), duplicates included."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield name, name, text
    for name, docstring in builtin_docstrings():
        yield name, name, docstring
    modules = _standard_library()
    public_names = _reexports(modules)
    for module, tree in modules.items():
        if docstring := ast.get_docstring(tree):
            yield module, module, docstring
        for name, heading, docstring in _members(tree, module):
            path = name.split(".")
            definition = ".".join(path[: len(module.split(".")) + 1])
            if name_outside := public_names.get(definition):
                yield name_outside + name[len(definition):], name_outside + heading[len(definition):], docstring
            elif not any(part.startswith("_") for part in module.split(".")):
                yield name, heading, docstring


def _standard_library() -> dict[str, ast.Module]:
    """Returns the parsed sources of the standard library by module name, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        name = _PUBLIC_NAMES.get(name, name)
        if name is None or _SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # a template such as those of lib2to3's tests
            continue
        if name in modules:
            modules[name].body += tree.body
        else:
            modules[name] = tree
    return modules


def _reexports(modules: dict[str, ast.Module]) -> dict[str, str]:
    """Maps the name of a definition to the name its users import: `json.decoder.JSONDecoder` → `json.JSONDecoder`.

    A package speaks for its own modules, a public module for the private one beside it.
    """
    public_names = {}
    for module, tree in modules.items():
        if module.rpartition(".")[2].startswith("_"):
            continue
        blocks = [tree.body, *(node.body for node in tree.body if isinstance(node, (ast.Try, ast.If)))]
        for node in (node for block in blocks for node in block if isinstance(node, ast.ImportFrom)):
            source = f"{module}.{node.module}" if node.level else str(node.module)
            if source not in modules or not (source.startswith(module + ".") or source.startswith("_")):
                continue
            defined = {n.name for n in modules[source].body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
            imported = defined if node.names[0].name == "*" else {alias.name for alias in node.names if not alias.asname}
            for name in imported & defined:
                if not name.startswith("_"):
                    public_names.setdefault(f"{source}.{name}", f"{module}.{name}")
    return public_names


def _members(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yields (name, heading, docstring) of the public classes, functions and methods below a module or class."""
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if child.name.startswith("_") and not child.name.startswith("__"):
            continue
        name = f"{prefix}.{child.name}"
        is_class = isinstance(child, ast.ClassDef)
        if docstring := ast.get_docstring(child):
            yield name, name if is_class else f"{name}({ast.unparse(child.args)})", docstring
        if is_class:
            yield from _members(child, name)
