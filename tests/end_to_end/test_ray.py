"""A comparison on a real local Ray cluster of two workers: one is killed, the driver is stopped, nothing changes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from yuriiformer.cli import main
from yuriiformer.files import locked_by
from yuriiformer.training.run import MEASURED, Run

pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
SMALL = "model.layers=2 model.width=16 model.heads=2 model.context=16 training.batch=4 training.evaluate_every=50 training.checkpoint_every=20 training.compile=no training.precision=fp32"
STEPS = 300


@pytest.fixture
def start(corpus, tmp_path, monkeypatch):
    """A comparison of three runs, one thread each: more threads sum in another order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="y") as short:  # the names of sockets in it may have 107 characters
        monkeypatch.setenv("TMPDIR", short)

        yield from _starting(corpus, tmp_path)
        assert not list(Path(short).glob("ray-*")), "its files are gone"


def _starting(corpus, tmp_path):
    def start(out, *more):
        arguments = [
            "gradient_descent",
            "nesterov",
            "heavy_ball",
            "--seeds",
            1,
            "--tokens",
            STEPS * 64,
            "--corpus",
            corpus.path,
        ]
        command = [*arguments, "--out", tmp_path / out, "--set", *SMALL.split(), *more]
        line = [sys.executable, "-m", "yuriiformer", "compare", *map(str, command)]
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    started = []
    yield start
    for process in started:
        process.kill()  # of a test that failed; Ray then ends by itself
        process.communicate()


def ended(process, code):
    printed, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert "raylet" not in printed + error, "Ray is quiet"
    return error


def wait_for(what, process):
    while not (found := what()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    return found


def contents(out):
    """What each run has learned and logged, without what was measured by a clock."""
    found = {}
    for path in sorted((out / "runs").iterdir()):
        run = Run(path)
        records = [{k: v for k, v in r.items() if k not in MEASURED} for r in run.records()]
        found[path.name] = (run.weights["sha256"], records, json.loads((path / "summary.json").read_text())["sample"])
    return found


def test_a_killed_worker_and_a_stopped_driver_change_nothing(start, tmp_path):
    out = tmp_path / "ray"
    driver = start("ray", "--engine", "ray", "--workers", 2)

    def in_the_middle():
        """Two runs in training, the first one past a checkpoint; the process that trains it."""
        runs = [Run(path) for path in sorted((out / "runs").glob("*-seed0")) if (path / "env.json").is_file()]
        if len(runs) == 2 and all(20 <= run.step < STEPS - 100 for run in runs) and locked_by(runs[0].path):
            return runs[0], int(locked_by(runs[0].path).split()[1])
        return None

    run, worker = wait_for(in_the_middle, driver)
    assert worker != driver.pid
    os.kill(worker, signal.SIGKILL)
    assert not run.complete
    at = run.step
    wait_for(lambda: f"process {worker} " not in (locked_by(run.path) or f"process {worker} "), driver)
    wait_for(lambda: run.step > at, driver)
    driver.send_signal(signal.SIGTERM)
    error = ended(driver, 75)
    assert "its worker died after step" in error
    assert "runs to go; saved. The same command goes on." in error
    unfinished = [Run(path) for path in (out / "runs").iterdir() if not Run(path).complete]
    assert unfinished
    for run in unfinished:
        assert locked_by(run.path) is None
        assert run.step >= run.records()[-1]["step"], "the workers saved where they stood"

    ended(start("ray", "--engine", "ray", "--workers", 2), 0)
    ended(start("local"), 0)
    assert contents(out) == contents(tmp_path / "local")


def test_what_ray_cannot_do_is_told(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(*arguments, code=2):
        assert main(["compare", "--corpus", str(corpus.path), "--out", "out", *arguments]) == code
        assert not list(tmp_path.glob("out/runs"))
        return capsys.readouterr().err.splitlines()[-1]

    assert "engine 'rya' is not known; did you mean 'ray'?" in fails("--engine", "rya")
    assert "--workers is the number of runs at once of --engine ray" in fails("--workers", "2")
    assert "at least 1; got 0" in fails("--engine", "ray", "--workers", "0")
    assert "give --tokens or --flops" in fails("--engine", "ray", "--seconds", "3")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "no Ray cluster at RAY_ADDRESS=127.0.0.1:9" in fails("--engine", "ray", code=3)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert "pip install 'yuriiformer[ray]'" in fails("--engine", "ray", code=3)
