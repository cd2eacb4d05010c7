"""`yuriiformer theory` as a user runs it, in this process: an import of torch for each line would take most of the time."""

import json

import pytest

from yuriiformer.cli import main

SMALL = ["model.layers=2", "model.heads=2", "model.width=16", "model.context=16", "training.steps=2",
         "training.batch=2", "training.evaluate_sequences=2", "training.compile=no"]  # fmt: skip
BOASTING = """from yuriiformer.rule import Oracle, Stream, rule


@rule(source="nowhere", textbook=lambda s: (1 - s, {}))
def boasting(x: Stream, oracle: Oracle) -> Stream:
    return x + oracle(x)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(exit code, standard output, standard error) of a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("arm", "exact"), [("nesterov,oracles=tied", True), ("verlet", False)])
def test_theory_of_a_trained_run(run, tmp_path, corpus, arm, exact):
    code, _, errors = run("train", arm, "--out", "run", "--corpus", corpus.path, "--set", *SMALL)
    assert code == 0, errors
    only = ["causal_untied", "commutator", "beyond_quadratics"]
    code, out, errors = run("theory", "--run", "run", "--only", *only, "--out", "t", "--json")
    assert code == 0, errors
    theory = json.loads(out)
    assert theory == json.loads((tmp_path / "t" / "theory.json").read_text())
    assert [s["name"] for s in theory["statements"]] == only
    assert [row["holds"] for row in theory["statements"][0]["rows"] if "MLP" in row["what"]] == [exact]
    assert theory["subject"] in (tmp_path / "t" / "theory.html").read_text()


def test_what_cannot_be_computed_is_one_line(run, tmp_path, corpus):
    for arguments, line in (
        (["--only", "rate"], "did you mean 'rates'?"),
        (["--run", "nowhere"], "nowhere is no run directory"),
        (["--tokens", "1"], "--tokens must be at least 2; got 1"),
        (["--rule", "none.py"], "rule file 'none.py' does not exist"),
    ):
        code, out, errors = run("theory", *arguments)
        assert (code, out, errors.count("\n")) == (2, "", 1)
        assert line in errors
    assert not (tmp_path / "runs").exists()

    (tmp_path / "mine.py").write_text(BOASTING)
    assert run("train", "mine.py", "--out", "run", "--corpus", corpus.path, "--set", *SMALL)[0] == 0
    (tmp_path / "mine.py").unlink()
    code, _, errors = run("theory", "--run", "run")
    assert code == 2
    assert "mine.py, which is missing or has changed" in errors


def test_a_refuted_statement_has_exit_code_1(run, tmp_path):
    """A rule file whose promise is too good is found out."""
    (tmp_path / "boasting.py").write_text(BOASTING)
    code, _, errors = run("theory", "--only", "other_functions", "--rule", "boasting.py", "--out", "t")
    assert code == 1
    assert "Not as theory says: other_functions" in errors
    assert "unlike theory" in (tmp_path / "t" / "theory.html").read_text()
