"""What `yuriiformer status` says of real runs: one that trains, a killed one, a stopped one, a finished, a damaged one."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from yuriiformer.cli import main
from yuriiformer.config import override
from yuriiformer.errors import UserError
from yuriiformer.report.status import status
from yuriiformer.signals import Stop
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite


@contextmanager
def trained(path):
    """A process that trains the run, once it has written a checkpoint."""
    command = [sys.executable, "-m", "yuriiformer", "train", "--resume", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not Run(path).step:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_running_killed_stopped(tmp_path, config, corpus, capsys):
    """Long enough never to end here; a second process trains it, and is killed, then stopped."""
    long = override(config, {"training.steps": 10**6, "training.checkpoint_every": 15, "training.evaluate_every": 20})
    run = Run.create(tmp_path / "run", definite(long, corpus)[0], corpus)
    assert status(run.path)["state"] == "stopped", "nothing is lost where nothing is begun"
    with trained(run.path) as process:
        found = status(run.path)
        assert (found["state"], found["steps"], found["damage"]) == ("running", 10**6, [])
        assert found["held_by"].startswith(f"process {process.pid} on ")
        while status(run.path)["best_step"] is None or not status(run.path)["tokens_per_second"]:
            time.sleep(0.01)
        for _ in range(20):  # whatever the trainer is writing or deleting now
            found = status(run.path, verify=True)
            assert (found["state"], found["damage"]) == ("running", [])
        assert found["seconds_left"] > 0
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    found, records = status(run.path), Run(run.path).records()
    assert (found["step"], found["loss"]) == (records[-1]["step"], records[-1]["loss"])
    newest = Run(run.path).step
    assert found["goes_on_from"] == newest == found["checkpoints"][0]["step"]
    assert found["state"] == ("dead" if found["step"] > newest else "stopped")
    assert (found["held_by"], found["seconds_left"]) == (None, None)
    assert found["next"] == f"yuriiformer train --resume {run.path}"
    best = min((r for r in records if "validation" in r), key=lambda r: r["validation"])
    assert (found["best_validation"], found["best_step"]) == (best["validation"], best["step"])

    with trained(run.path) as process:
        while not status(run.path)["held_by"]:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert status(run.path)["state"] == "stopped"
    assert main(["status", str(run.path)]) == 0
    assert "nobody trains it; all is saved" in capsys.readouterr().out


def test_complete_and_damaged(tmp_path, config, corpus, capsys):
    run = Run.create(tmp_path / "run", definite(config, corpus)[0], corpus)
    summary = train(run, Stop())
    assert main(["status", str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["validation"]) == ("complete", 12, summary["final_validation"])
    assert found["checkpoints"][0]["step"] == 12
    assert found["checkpoints"][0]["bytes"] == sum(f.stat().st_size for f in (run.checkpoints / "step_12").iterdir())

    (run.path / "summary.json").unlink()
    weights = run.checkpoints / "step_12" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert status(run.path)["damage"] == [], "the sizes are right"
    found = status(run.path, verify=True)
    assert found["goes_on_from"] < 12
    assert found["state"] == "dead"
    assert found["damage"] == [f"{weights} is damaged: its sha256 is not the one it was written with."]
    for checkpoint in run.checkpoints.iterdir():
        os.truncate(checkpoint / "model.safetensors", 100)
    found = status(run.path)
    assert found["state"] == "lost"
    assert all("is cut short or missing" in text for text in found["damage"])
    assert main(["status", str(run.path)]) == 0
    assert "DAMAGED" in capsys.readouterr().out
    (run.path / "metrics.jsonl").write_text("{no json\n" + (run.path / "metrics.jsonl").read_text())
    (run.path / "metrics.jsonl").open("a").write("{also none\n")
    assert "metrics.jsonl is damaged" in status(run.path)["damage"][0]
    with pytest.raises(UserError, match=r"is no run .* and no comparison"):
        status(tmp_path)


def test_a_comparison_is_a_table(tmp_path, config, corpus, capsys):
    """One run done, one begun, one to come: planned as `compare` plans, trained by hand."""
    steps, arms = {"a": 12, "b": 12, "c": 12}, {"a": {}, "b": {}, "c": {}}
    plan = {"arms": arms, "steps": steps, "slugs": dict(zip("abc", "abc", strict=True)), "seeds": [0]}
    (tmp_path / "runs").mkdir()
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"command": "yuriiformer compare a b c"}))
    runs = [Run.create(tmp_path / "runs" / f"{name}-seed0", definite(config, corpus)[0], corpus) for name in "ab"]
    train(runs[0], Stop())
    found = status(tmp_path)
    assert [run["state"] for run in found["runs"]] == ["complete", "stopped", "waiting"]
    assert (found["state"], found["done"], found["next"]) == ("stopped", 1, "yuriiformer compare a b c")
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "stopped: 1 of 3 runs done" in shown
    assert "next: yuriiformer compare a b c" in shown
    (runs[1].path / "config.json").write_text("{}")
    assert main(["status", str(tmp_path)]) == 0
    assert "b, seed 0: config key" in capsys.readouterr().out


def test_it_needs_no_torch(tmp_path, config, corpus):
    run = Run.create(tmp_path / "run", definite(config, corpus)[0], corpus)
    code = (
        "import sys, yuriiformer.cli as c\n"
        f"assert c.main(['status', {str(run.path)!r}, '--verify']) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
