"""The main job: compare, kill, go on, look at the report in a real browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from yuriiformer.compare import controls
from yuriiformer.config import override
from yuriiformer.data.corpus import Corpus
from yuriiformer.files import lock
from yuriiformer.signals import Stop
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite

SMALL = "--set model.layers=2 model.width=16 model.heads=2 model.context=16 training.batch=4 training.evaluate_every=10 training.compile=no training.precision=fp32"
ARMS = ["gradient_descent", "gradient_descent,second_table=true", "nesterov"]


def command(corpus, out, *more, arms=ARMS, seeds=2, steps=30):
    return [
        "compare",
        *arms,
        "--seeds",
        seeds,
        "--tokens",
        steps * 64,
        "--corpus",
        corpus.path,
        "--out",
        out,
        *SMALL.split(),
        *more,
    ]


@pytest.fixture(scope="module")
def comparison(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    arguments = [str(a) for a in command(corpus, out, "--json")]
    done = subprocess.run([sys.executable, "-m", "yuriiformer", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


def test_json_says_everything(comparison):
    out, printed, _ = comparison
    assert printed == json.loads((out / "comparison.json").read_text())
    for arm in printed["arms"]:
        keys = {"name", "rule", "splitting", "start", "parameters", "flops_per_token", "tokens_per_second"}
        assert keys | {"final_validation", "best_validation", "against_baseline"} <= set(arm)
        assert list(arm["final_validation"]) == ["0", "1"]
    baseline, second, nesterov = printed["arms"]
    assert baseline["against_baseline"] is None
    assert {"mean_difference", "low", "high", "p_value"} <= set(nesterov["against_baseline"])
    assert (baseline["start"], nesterov["start"]) == (None, "own")
    assert baseline["flops_per_token"] == second["flops_per_token"] == nesterov["flops_per_token"]
    extra = nesterov["parameters"] - second["parameters"]
    assert 0 < extra < 0.01 * baseline["parameters"] + 100, (
        "the control has the tables of the momentum arm, not its norms and scalars"
    )


def test_terminal_shows_a_verdict(comparison):
    _, _, shown = comparison
    assert re.search(r"nesterov ends \d\.\d+ nats (below|above) gradient_descent, in \d of 2 seeds", shown)
    assert "report.html" in shown


def test_every_arm_reads_the_same_batches(corpus, tmp_path, monkeypatch, config):
    """What the loop asks of the corpus, recorded for two arms: the same rows in the same order."""
    original, read = Corpus.batch_at, []

    def recorded(self, step, **settings):
        batch = original(self, step, **settings)
        read.append(batch[0])
        return batch

    monkeypatch.setattr(Corpus, "batch_at", recorded)
    arms = []
    for name in ("gradient_descent", "nesterov"):
        made, _ = definite(override(config, {"model.rule": name}), corpus)
        run = Run.create(tmp_path / name, made, corpus)
        read.clear()
        train(run, Stop())
        arms.append(np.stack(read))
    assert arms[0].shape == (12, 4, 16)
    assert (arms[0] == arms[1]).all()


def test_killed_comparison_goes_on(corpus, comparison, tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "yuriiformer", *map(str, command(corpus, out))]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    while len(list(out.glob("runs/*/summary.json"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    untouched = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/summary.json")}
    assert len(untouched) < 6
    assert subprocess.run(arguments, stderr=subprocess.DEVNULL).returncode == 0
    assert all(p.stat().st_mtime_ns == at for p, at in untouched.items())

    def losses(folder):
        arms = json.loads((folder / "comparison.json").read_text())["arms"]
        return {arm["name"]: arm["final_validation"] for arm in arms}

    assert losses(out) == losses(comparison[0])


def test_another_comparison_in_the_same_place_is_refused(corpus, comparison, cli):
    out, _, _ = comparison
    done = cli(*command(corpus, out, seeds=3))
    assert done.returncode == 2
    assert "holds a comparison with another seeds" in done.stderr


@pytest.mark.parametrize(("kind", "amount"), [("flops", 2e8), ("seconds", 0.3)])
def test_other_budgets(corpus, tmp_path, cli, kind, amount):
    arguments = command(corpus, tmp_path / "out", arms=["gradient_descent", "verlet"], seeds=1)
    at = arguments.index("--tokens")
    arguments[at : at + 2] = [f"--{kind}", amount]
    done = cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    plain, verlet = json.loads(done.stdout)["arms"]
    assert not (tmp_path / "out" / "calibration").exists()
    if kind == "flops":
        assert verlet["steps"] < plain["steps"], "a rule that asks attention twice gets fewer steps"
        for arm in (plain, verlet):
            assert arm["tokens"] * arm["flops_per_token"] == pytest.approx(amount, rel=0.05)


def test_another_order_or_another_rule_is_another_comparison(corpus, tmp_path, cli):
    rule = tmp_path / "mine.py"
    rule.write_text(
        "from yuriiformer.rule import Oracle, Stream, rule\n"
        '@rule(source="here")\ndef mine(x: Stream, oracle: Oracle) -> Stream:\n    """Mine."""\n    return x + oracle(x)\n'
    )
    arms = ["gradient_descent", rule]
    assert cli(*command(corpus, "out", arms=arms, seeds=1, steps=3)).returncode == 0
    same = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "mine.py ends exactly where gradient_descent ends" in same["verdict"][0]
    done = cli(*command(corpus, "out", arms=arms[::-1], seeds=1, steps=3))
    assert "holds a comparison with another arms" in done.stderr
    rule.write_text(rule.read_text().replace("x + oracle(x)", "x - oracle(x)"))
    done = cli(*command(corpus, "out", arms=arms, seeds=1, steps=3))
    assert "holds a comparison with another rules" in done.stderr


def test_the_same_arm_twice_is_refused(corpus, cli):
    done = cli(*command(corpus, "out", arms=["nesterov", "nesterov:lie_trotter"]))
    assert (done.returncode, "are the same" in done.stderr) == (2, True)


def test_a_diverging_arm_is_told_and_left_out(corpus, tmp_path, cli):
    """Learning rates of 1e30 end in numbers that are none; the other arm still gets its report."""
    wild = "gradient_descent,adamw_lr=1e30,optimizer=adamw,clip=0"
    for _ in range(2):  # and the second time, too
        done = cli(*command(corpus, "out", arms=["gradient_descent", "nesterov", wild], seeds=1), "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert [arm["name"] for arm in result["arms"]] == ["gradient_descent", "nesterov"]
        assert f"{wild} diverged with seed 0: it is left out." in result["verdict"]


def test_two_processes_in_one_place(corpus, tmp_path, cli):
    with lock(tmp_path, "comparison"):
        done = cli(*command(corpus, tmp_path))
    assert (done.returncode, f"is in use by process {os.getpid()} on " in done.stderr) == (2, True)


def test_interrupted_comparison_says_how_to_go_on(corpus, tmp_path):
    arguments = [sys.executable, "-m", "yuriiformer", *map(str, command(corpus, tmp_path / "out", steps=100000))]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("runs/*/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "saved. The same command goes on." in error


PROBE = """<script>window.onerror = m => document.title = "ERROR " + m; addEventListener("load", () => {
 const seen = e => { const b = e.getBoundingClientRect(); return b.width > 300 && b.height > 100; };
 document.title = JSON.stringify({ svgs: [...document.querySelectorAll("figure svg")].map(seen),
  marks: [...document.querySelectorAll("figure svg")].map(s => s.querySelectorAll("path").length),
  wide: document.documentElement.scrollWidth > innerWidth,
  rows: document.querySelectorAll("#numbers tr").length }); });</script>"""


@pytest.mark.parametrize("width", [1200, 400])
def test_report_opens_in_a_browser(comparison, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium is installed")
    page = (comparison[0] / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page), "nothing is fetched"
    probed = tmp_path / "report.html"
    probed.write_text(page.replace("<title>", PROBE + "<title>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [browser, *flags.split(), f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1))
    assert seen["rows"] == 4
    assert len(seen["svgs"]) == 5, "three curves, the differences, the coefficients of the momentum arm"
    assert all(seen["svgs"])
    assert min(seen["marks"]) > 10
    assert not seen["wide"], "the page scrolls sideways"


def test_controls_are_offered(comparison):
    out, printed, shown = comparison
    assert "--controls adds them" in shown
    assert printed["controls_not_run"] == ["gradient_descent,x0_scale=30", "nesterov,velocity_start=zeros,x0_scale=30"]
    assert "nesterov,velocity_start=zeros,x0_scale=30" in (out / "report.html").read_text()
    assert controls([*ARMS, *printed["controls_not_run"]]) == []
    assert controls(["gradient_descent", "gradient_descent:strang"]) == [], "no momentum, nothing to control for"


def test_help_is_fast_and_needs_no_torch():
    code = "import sys, yuriiformer.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
