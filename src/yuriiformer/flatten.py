"""Several source files of the package as one: what the roots need, and nothing else, in the files' order."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

PACKAGE = __package__


@dataclass(frozen=True)
class Definition:
    """A class, function or constant of a file's top level, with the comment above it."""

    file: Path
    text: str
    uses: frozenset[str]


def flatten(files: Sequence[Path], roots: Sequence[str], replaced: Mapping[str, str]) -> str:
    """The source of `roots` and of all they use in `files`; imports of anything else stay imports.

    files: what each uses stands in itself or before it.
    replaced: {name: source} to stand in place of a definition.
    Raises UserError when two files define the same name, since one file can hold only one.
    """
    definitions: dict[str, Definition] = {}
    imports: dict[str, str] = {}
    for file in files:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        imports |= dict(_outside(tree))
        for name, text in _definitions(source, tree):
            text = replaced.get(name, text)
            if name in definitions:
                raise UserError(f"{file} defines {name!r}, and so does {definitions[name].file}; rename it.")
            uses = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
            definitions[name] = Definition(file, text, frozenset(uses))

    needed, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in needed and (name in definitions or name in imports):
            needed.add(name)
            waiting += definitions[name].uses if name in definitions else ()

    parts = ["from __future__ import annotations\n"]
    parts.append("\n".join(sorted({imports[name] for name in needed if name in imports and name not in definitions})))
    for file in files:
        texts = [d.text for name, d in definitions.items() if d.file == file and name in needed]
        if texts:
            parts += [f"\n\n# {file.name}", *texts]
    return "\n\n".join(parts) + "\n"


def _outside(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, statement) of each import that is not of the package itself."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                text = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                yield alias.asname or alias.name.split(".")[0], text
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            inside = node.level > 0 or module.split(".")[0] == PACKAGE
            for alias in node.names:
                if inside and alias.asname:
                    raise UserError(f"{alias.name} is imported as {alias.asname}; one file needs its own name.")
                if not inside and module != "__future__":
                    text = f"from {module} import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                    yield alias.asname or alias.name, text


def _definitions(source: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, source) of each definition: its lines, with decorators and the comment lines right above."""
    lines = source.splitlines()
    for node in tree.body:
        match node:
            case ast.ClassDef() | ast.FunctionDef():
                names = [node.name]
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names, first = [name], node.lineno
            case _:
                continue
        while first > 1 and lines[first - 2].startswith("#"):
            first -= 1
        for name in names:
            yield name, "\n".join(lines[first - 1 : node.end_lineno])
