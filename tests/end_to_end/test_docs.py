"""The README is true: its commands run, in its order, and its code is the code."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TINY = [
    "--set",
    "training.steps=3",
    "model.layers=2",
    "model.width=24",
    "model.context=32",
    "training.batch=4",
    "training.evaluate_sequences=4",
    "training.compile=no",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def test_every_command_of_the_readme_runs(cli, tmp_path):
    """In the README's order, in an empty folder; training is cut to three tiny steps."""
    (tmp_path / "my_rule.py").write_text(next(b for b in blocks("python") if b.startswith("# my_rule.py")))
    (tmp_path / "my_text.txt").write_text("A text of my own, long enough to learn something from.\n" * 400)
    run = [line for line in commands() if line.startswith("yuriiformer")]
    assert len(run) >= 8
    for line in run:
        _, *arguments = shlex.split(line)
        tiny = TINY if arguments[0] in ("compare", "train") else ["--tokens", "5"] if arguments[0] == "generate" else []
        done = cli(*arguments, *tiny)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "runs" / "my_rule" / "report.html").is_file()


@pytest.mark.parametrize("target", ["demo", "test", "setup"])
def test_make_targets_exist_and_are_what_ci_runs(target):
    assert f"make {target}" in README
    planned = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert {"demo": "yuriiformer compare", "test": "pytest", "setup": "venv"}[target] in planned.stdout
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_rule_in_the_readme_is_the_rule():
    shown = next(b for b in blocks("python") if "def nesterov" in b)
    real = ast.parse((ROOT / "src/yuriiformer/rules/nesterov.py").read_text()).body[-1]
    real.body = real.body[1:]  # without its docstring
    assert ast.dump(ast.parse(shown).body[0]) == ast.dump(real)


def test_every_file_has_its_line_and_every_link_leads_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"
    for path in (ROOT / "src" / "yuriiformer").rglob("*.py"):
        inside = path.relative_to(ROOT)
        if path.name not in ("__init__.py", "__main__.py"):
            assert f"]({inside})" in README or f"]({inside.parent})" in README, f"{inside} has no line in the README"


def test_tables_are_the_measured_ones():
    for document in [ROOT / "README.md", ROOT / "results" / "README.md"]:
        shown = re.findall(r"<!-- (\S+) -->\n((?:\|.*\n)+)", document.read_text())
        assert len(shown) >= 2
        for source, table in shown:
            assert table == (ROOT / source).read_text(), source


def test_no_number_in_the_readme_is_a_placeholder():
    assert not re.search(r"@\w+@|TODO|XXX", README)
