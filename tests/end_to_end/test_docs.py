"""The README is true: its commands run, in its order, and its code is the code."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from yuriiformer.cli import main
from yuriiformer.presets import TABLES
from yuriiformer.report.scores import PAIRED, paired_rows

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
# What makes a command short.
CUT = {
    "compare": TINY,
    "train": TINY,
    "reproduce": [
        "--scale",
        "0.0003",
        "--corpus",
        "my_text.txt",
        "--tokenizer",
        "bpe:300",
        *TINY[:1],
        *TINY[2:],
        "model.heads=3",
    ],
    "generate": ["--tokens", "5"],
    "theory": ["--only", "log_sum_exp", "commutator", "beyond_quadratics"],
}

# Each page whose commands run, and how many there are at least.
PAGES = {
    "README.md": 8,
    "docs/evaluate.md": 6,
    "docs/export.md": 2,
    "docs/generate.md": 4,
    "docs/import.md": 5,
    "docs/reproduce.md": 5,
}


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in blocks("bash", page) for line in block.splitlines() if line.startswith("yuriiformer")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(cli, tmp_path, monkeypatch, capsys, request, page):
    """In the page's order, in a folder with the files that it speaks of; training is cut to three tiny steps.

    The README's commands run in processes of their own, those of other pages in this one: imports take long.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(next(b for b in blocks("python") if b.startswith("# my_rule.py")))
    (tmp_path / "my_text.txt").write_text("A text of my own, long enough to learn something from.\n" * 400)
    (tmp_path / "questions").mkdir()
    for split, first in (("train", 0), ("test", 30)):
        questions = [
            {"question": f"{i} + 1?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(first, first + 30)
        ]
        (tmp_path / "questions" / f"arc_easy_{split}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    if page == "docs/import.md":
        shutil.copytree(request.getfixturevalue("gpt2_folder"), tmp_path / "gpt2_folder")
    run = commands(page)
    assert len(run) >= PAGES[page]
    for line in run:
        _, *arguments = shlex.split(line)
        tiny = CUT.get(arguments[0], [])
        if page == "README.md":
            done = cli(*arguments, *tiny)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
        else:
            assert main([*arguments, *tiny]) == 0, f"{line}\n{capsys.readouterr().err}"
    if page == "README.md":
        assert (tmp_path / "runs" / "my_rule" / "report.html").is_file()


def test_the_paired_tests_of_the_evaluation_page_are_the_measured_ones():
    found = json.loads((ROOT / "results/evaluation/comparison.json").read_text())
    lines = [PAIRED, ("---",) * len(PAIRED), *paired_rows(found)]
    assert "".join(f"| {' | '.join(cells)} |\n" for cells in lines) in (ROOT / "docs/evaluate.md").read_text()


def test_the_published_numbers_of_the_page_are_those_of_the_presets():
    text = (ROOT / "docs/reproduce.md").read_text()
    shown = re.findall(r"^### `(\w+)`: (.+)\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    for (name, title, lines), (key, table) in zip(shown, TABLES.items(), strict=True):
        assert (name, title) == (key, table.title)
        rows = [
            (arm, *(str(n or "–") for n in (said.best, said.final)), said.source + f" ({said.note})" * bool(said.note))
            for arm, published in table.rows.items()
            for said in published
        ]
        cells = [("arm", "best", "final", "source"), ("---",) * 4, *rows]
        assert lines == "".join(f"| {' | '.join(row)} |\n" for row in cells)


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
            measured = re.findall(r"^\|.*\n", (ROOT / source).read_text(), re.MULTILINE)
            assert table == "".join(measured), source


def test_the_speeds_of_generation_are_the_measured_ones():
    measured = {
        (str(row["batch"]), row["rule"]): f"{row['tokens_per_second']:,.0f}"
        for row in json.loads((ROOT / "results/generation.json").read_text())["rows"]
        if row["way"] == "compiled"
    }
    table = re.findall(r"^\| (\d+) \| (\w+) \|.*$", (ROOT / "docs/generate.md").read_text(), re.MULTILINE)
    lines = re.findall(r"^\| \d+ \| \w+ \|.*$", (ROOT / "docs/generate.md").read_text(), re.MULTILINE)
    assert len(lines) == len(measured)
    for key, line in zip(table, lines, strict=True):
        assert line.split(" | ")[4].startswith(measured[key])


def test_no_number_in_the_readme_is_a_placeholder():
    assert not re.search(r"@\w+@|TODO|XXX", README)
