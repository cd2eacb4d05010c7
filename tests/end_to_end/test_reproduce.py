"""A published table: planned, run small, stopped and gone on with, and set beside what was published."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from yuriiformer import presets
from yuriiformer.cli import main
from yuriiformer.compare import parse_arm
from yuriiformer.config import override
from yuriiformer.model import flops_per_token, training_flops_per_token
from yuriiformer.report.reproduction import beside, duration, rows
from yuriiformer.training.run import Run

SMALL = (
    "--set model.layers=1 model.heads=2 model.width=16 model.context=16 training.batch=4 "
    "training.evaluate_sequences=8 training.precision=fp32 training.compile=no"
)


def command(corpus, out, *more, scale=0.01):
    return ["reproduce", "tinystories", "--scale", scale, "--corpus", corpus, "--out", out, *SMALL.split(), *more]


def python(*arguments):
    return [sys.executable, "-m", "yuriiformer", *map(str, arguments)]


@pytest.fixture(scope="module")
def reproduced(corpus, tmp_path_factory):
    """100 steps of three arms; the folder, what it printed for a program, and what for a reader."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    done = subprocess.run(python(*command(corpus.path, out, "--json")), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_our_numbers_stand_beside_the_published_ones(reproduced, corpus):
    out, found, shown = reproduced
    assert found == json.loads((out / "reproduction.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["gradient_descent", "nesterov", "imex,k=2"]
    comparison = {arm["name"]: arm for arm in json.loads((out / "comparison.json").read_text())["arms"]}
    baseline, nesterov, imex = found["rows"]
    for row in found["rows"]:
        assert row["best_validation"] == comparison[row["arm"]]["best_validation"]
        assert row["best_validation"]["0"] <= row["final_validation"]["0"]
    assert (nesterov["published"][0]["source"], nesterov["published"][0]["best"]) == ("arXiv:2601.23236", 1.078)
    assert nesterov["published"][0]["best_minus_baseline"] == pytest.approx(-0.028)
    assert nesterov["best_minus_baseline"] == nesterov["best_validation"]["0"] - baseline["best_validation"]["0"]
    assert (baseline["best_minus_baseline"], imex["published"][0]["final"]) == (None, None)
    page = (out / "reproduction.html").read_text()
    table = (out / "reproduction.md").read_text()
    for text in (shown, page, table):
        assert "Not comparable with the published numbers: model.layers 1 instead of 12" in text
        assert "training.steps 100 instead of 10,000" in text
        assert f"text {corpus.manifest['source']} instead of tinystories; tokenizer bpe:300 instead of gpt2" in text
        assert "1.106" in text
    assert "| gradient_descent | arXiv:2601.23236 (another summary: final 1.113) | 1.106 |" in table
    assert page.count("<svg") == 2
    assert (out / "report.html").is_file()


def test_differences_are_taken_where_the_numbers_are_comparable(reproduced):
    out, found, _ = reproduced
    comparison = json.loads((out / "comparison.json").read_text())
    assert all(said["best_difference"] is None for row in found["rows"] for said in row["published"])
    assert {cells[4] for cells in rows(found)} == {"not comparable"}

    same = beside(presets.find_table("tinystories"), comparison, found["plan"] | {"deviations": []})
    assert same["comparable"]
    for row in same["rows"]:
        for said in row["published"]:
            for which in ("best", "final"):
                expected = said[which] and row[f"{which}_validation"]["0"] - said[which]
                assert said[f"{which}_difference"] == expected
    assert rows(same)[0][4] == f"{same['rows'][0]['best_validation']['0'] - 1.106:+.4f}"


def test_stopped_and_gone_on_with_it_says_the_same(reproduced, corpus, tmp_path):
    out, arguments = tmp_path / "out", python(*command(corpus.path, tmp_path / "out"))
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("runs/nesterov-seed0/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert error.strip().endswith("saved. The same command goes on.")
    assert not (out / "runs" / "nesterov-seed0" / "summary.json").exists(), "it was in the middle"
    going_on = subprocess.run(arguments, capture_output=True, text=True)
    assert going_on.returncode == 0, going_on.stderr

    def numbers(folder):
        return [r | {"seed": None} for r in json.loads((folder / "reproduction.json").read_text())["rows"]]

    assert numbers(out) == numbers(reproduced[0])


def test_stopped_while_it_prepares_the_text(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("".join(f"The {i}th story is about number {i * i}.\n<|endoftext|>\n" for i in range(100_000)))
    out = tmp_path / "out"
    process = subprocess.Popen(
        python(*command(text, out, "--tokenizer", "bytes")), stderr=subprocess.PIPE, text=True, env=os.environ
    )
    while not (out / "corpus.partial").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert error.strip().endswith("nothing is kept of that. The same command goes on.")
    assert not (out / "corpus").exists()
    assert not (out / "corpus.partial").exists()


@pytest.fixture
def plan(capsys, monkeypatch, tmp_path):
    """The plan of a command, printed for a program; nothing is written."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert main([*map(str, arguments), "--plan", "--json"]) == 0
        assert not list(tmp_path.iterdir())
        return json.loads(capsys.readouterr().out)

    return run


def test_the_plan_adds_up(plan):
    found = plan("reproduce", "openwebtext", "--seeds", 2)
    assert (found["deviations"], found["estimate"]["mfu"], found["estimate"]["peak_flops"]) == ([], 0.4, 989e12)
    for row in found["arms"]:
        config = parse_arm(row["arm"], presets.openwebtext_small()).config.model
        validations, sequences = 300, 4_800
        forward = sum(flops_per_token(config).values())
        assert row["tokens"] == 30_000 * 491_520
        assert row["flops_per_token"] == training_flops_per_token(config) == 3 * forward
        assert row["flops"] == row["tokens"] * 3 * forward + validations * sequences * 1024 * forward
        assert row["h100_hours"] == pytest.approx(row["flops"] / (0.4 * 989e12) / 3600)
        assert (row["runs"], row["done"], row["hours_here"]) == (2, 0, None)
    # 14.7 billion tokens at 8.5e8 FLOPs each are 8.8 hours at 396 TFLOP/s, and validation is a thirtieth of that
    assert found["arms"][0]["h100_hours"] == pytest.approx(8.84 * (1 + 1 / 30), rel=1e-2)
    assert found["total"] == {**found["left"], "tokens": 8 * 30_000 * 491_520}
    assert found["total"]["flops"] == sum(2 * row["flops"] for row in found["arms"])


def test_a_plan_knows_what_is_done_and_how_fast_this_device_is(reproduced, corpus, plan):
    out, _, _ = reproduced
    found = plan(*command(corpus.path, out))
    assert [row["done"] for row in found["arms"]] == [1, 1, 1]
    assert found["left"] == {"flops": 0, "h100_hours": 0, "hours_here": 0}
    for row, run in zip(found["arms"], ("gradient_descent", "nesterov", "imex_k=2"), strict=True):
        summary = json.loads((out / "runs" / f"{run}-seed0" / "summary.json").read_text())
        speed = summary["tokens_per_second"] * row["flops_per_token"]
        assert row["parameters"] == sum(summary["parameters"].values())
        assert row["hours_here"] == pytest.approx(row["flops"] / speed / 3600)
    more = plan(*command(corpus.path, out, "--controls"))
    assert [row["done"] for row in more["arms"]] == [1, 1, 1, 0, 0, 0]
    assert more["left"]["flops"] == sum(row["flops"] for row in more["arms"][3:])
    assert all(row["hours_here"] > 0 for row in more["arms"]), "an arm that has not run yet has the speed of the others"


def test_an_unfinished_run_counts_by_its_steps(corpus, plan, tmp_path, monkeypatch):
    run = Run.create(
        tmp_path.parent / f"{tmp_path.name}_out" / "runs" / "nesterov-seed0",
        override(presets.demo(), {"training.steps": 100}),
        corpus,
    )
    monkeypatch.setattr(Run, "step", 25)
    found = plan(*command(corpus.path, run.path.parents[1]))
    assert [row["done"] for row in found["arms"]] == [0, 0.25, 0]


def test_a_short_calibration_tells_the_speed(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*map(str, command(corpus.path, out, "--calibrate", "--plan", "--json"))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(row["tokens_per_second_here"] > 0 and row["hours_here"] > 0 for row in found["arms"])
    assert [p.name for p in out.iterdir()] == [".lock"]


@pytest.mark.parametrize(("hours", "shown"), [(8.84, "8.8 h"), (0.5, "30.0 min"), (0.001, "3.6 s")])
def test_durations(hours, shown):
    assert duration(hours) == shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["openwebtex"], "table 'openwebtex' is not known; did you mean 'openwebtext'?"),
        (["tinystories", "--scale", "0"], "--scale must be above 0 and at most 1; got 0."),
        (["tinystories", "--scale", "1.5"], "--scale must be above 0 and at most 1; got 1.5."),
        (["tinystories", "--scale", "nan"], "--scale must be above 0 and at most 1; got nan."),
        (["tinystories", "--scale", "1e-5"], "less than one of 10,000 steps; give at least 0.0001."),
        (["tinystories", "--seeds", "0"], "--seeds must be at least 1; got 0."),
        (["tinystories", "--data", "x"], "--data and --limit belong to --tasks; name some."),
        (["tinystories", "--tasks", "hellaswag", "--limit", "0"], "--limit must be at least 1; got 0."),
        (["tinystories", "--plan", "--tokenizer", "gpt3"], "tokenizer 'gpt3' is not known."),
        (["tinystories", "--plan", "--set", "model.heads=5"], "model.heads must divide model.width"),
        (["tinystories", "--corpus", "no.txt"], "source 'no.txt' is no file, no folder and no name."),
    ],
)
def test_bad_input(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("yuriiformer: ")
    assert says in last
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_another_recipe_in_the_same_place_is_refused(reproduced, corpus, text, tmp_path, capsys):
    out, _, _ = reproduced

    def refused(*arguments):
        assert main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("cat", "dog"))
    assert main(["prepare", str(other), "--out", str(tmp_path / "c"), "--tokenizer", "bpe:300"]) == 0
    assert "holds a comparison with another corpus" in refused(*command(tmp_path / "c", out))
    assert "holds a comparison with another budget" in refused(*command(corpus.path, out, scale=0.02))
    assert "holds a comparison with another seeds" in refused(*command(corpus.path, out, "--seeds", 2))
    assert "holds a comparison with another arms" in refused(*command(corpus.path, out, "--controls"))
    line = refused(*command(corpus.path, out, "--tokenizer", "bytes"))
    assert "was prepared with tokenizer bpe:300, not bytes; leave --tokenizer out." in line
