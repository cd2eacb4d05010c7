"""Imports go down only, rules know nothing but `rule`, and no file outside names one."""

import ast
import re
from pathlib import Path

import yuriiformer
from yuriiformer.rule import all_rules

ROOT = Path(yuriiformer.__file__).parent
LAYERS = [
    ["errors", "signals"],
    ["config", "files", "flatten", "machine", "rule"],
    ["rules", "splitting", "presets", "progress", "tied"],
    ["oracle", "tracking"],
    ["cache"],
    ["model"],
    ["data", "generate", "huggingface", "surgery", "theory"],
    ["training"],
    ["engines"],
    ["bench", "compare", "report", "export", "export_check", "importing"],
    ["arguments", "evaluate", "inspection", "reproduce", "torture"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """The top-level parts of the package that a file imports, at any depth of its code."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("yuriiformer"):
            found.add([*node.module.split("."), "__init__"][1])
    return found - {"__version__", "__init__"}


def files():
    return [p for p in ROOT.rglob("*.py") if p.name != "__init__.py"]


def test_imports_only_go_down():
    for path in files():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in imports(path) - {own}:
            assert LEVEL[other] < LEVEL[own], f"{path.name} ({own}) imports {other}"


def test_rules_import_only_rule():
    for path in (ROOT / "rules").glob("*.py"):
        assert imports(path) <= {"rule"}, path.name


def test_what_must_start_fast_imports_no_torch():
    free = {"errors", "signals", "config", "files", "presets", "progress", "data", "report", "arguments", "cli"}
    for path in files():
        if path.relative_to(ROOT).parts[0].removesuffix(".py") in free:
            heads = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not any("torch" in ast.unparse(n) for n in heads), path.name


def test_a_rules_name_stands_in_rules_and_presets_only():
    for path in files():
        if path.parent.name != "rules" and path.name != "presets.py":
            code = "\n".join(line for line in path.read_text().splitlines() if "#" not in line)
            strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not strings & set(all_rules()), path.name
            assert not re.search(r"rules\.\w+ import", code), path.name


def test_a_rule_is_at_most_25_lines_and_the_core_below_950():
    lines = {p: len(p.read_text().splitlines()) for p in (ROOT / "rules").glob("*.py")}
    assert max(lines.values()) <= 25, lines
    core = sum(
        len((ROOT / f"{name}.py").read_text().splitlines())
        for name in ("rule", "splitting", "oracle", "cache", "model")
    )
    assert core + sum(lines.values()) < 950
