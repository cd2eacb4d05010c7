"""The tools are fed what the log says, over sessions, and cannot stop a run. Real tools, offline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from yuriiformer.cli import main
from yuriiformer.engines import Follower, Job
from yuriiformer.errors import EnvironmentFault, UserError
from yuriiformer.progress import Meter
from yuriiformer.signals import Stop
from yuriiformer.tracking import TOOLS, chosen
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite

KEYS = {"loss", "validation", "gradient_norm", "lr", "tokens", "seconds"}


@pytest.fixture
def run(tmp_path, config, corpus):
    return Run.create(tmp_path / "run", definite(config, corpus)[0], corpus)


def watched(run, tool, stop_at=None):
    """Train with one tool, or up to a step."""
    with Meter("training", None) as meter, Follower(Job(run.path, run.config, "run"), meter, [tool]) as follower:
        stop = Stop()

        def observe(record):
            follower.observe(record)
            stop.requested |= record["step"] == stop_at

        train(run, stop, observe)


def in_two_sessions(run, tool):
    """Killed after step 10 was logged, so that it is done again from the checkpoint of step 8."""
    with pytest.raises(RuntimeError, match="killed"):
        killed(run, tool)
    assert [r["step"] for r in run.records()][-1] == 10 > run.step
    watched(run, tool)
    return {record["step"]: record for record in run.records()}


def killed(run, tool):
    job = Job(run.path, run.config, "run")
    with Meter("training", None) as meter, Follower(job, meter, [tool]) as follower:

        def observe(record):
            follower.observe(record)
            if record["step"] == 10:
                raise RuntimeError("killed")

        train(run, Stop(), observe)


def test_tensorboard_holds_the_log(run):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: track)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = in_two_sessions(run, "tensorboard")
    assert len(list((run.path / "tensorboard").iterdir())) == 2, "each session has its file"
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    for key in KEYS - {"seconds"}:
        logged = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(key)]
        assert logged == [(step, record[key]) for step, record in records.items() if key in record], key


def test_trackio_holds_the_log(run, tmp_path, monkeypatch):
    """In processes of their own: trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed (extra: track)")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    tests = Path(__file__).parent
    code = "import test_tracking as t\nfrom yuriiformer.training.run import Run\nfrom pathlib import Path\n"
    code += f"t.in_two_sessions(Run(Path({str(run.path)!r})), 'trackio')"
    subprocess.run([sys.executable, "-c", code], cwd=tests, check=True, capture_output=True, text=True)
    read = (
        "import json, trackio\nruns = list(trackio.Api().runs('yuriiformer'))\n"
        "from trackio.sqlite_storage import SQLiteStorage as s\n"
        "print(json.dumps([[r.name, s.get_logs('yuriiformer', r.name)] for r in runs]))"
    )
    done = subprocess.run([sys.executable, "-c", read], check=True, capture_output=True, text=True)
    ((name, logs),) = json.loads(done.stdout.splitlines()[-1])
    assert name.startswith("run-")
    for key in KEYS - {"seconds"}:
        logged = [(entry["step"], entry[key]) for entry in logs if entry.get(key) is not None]
        assert logged == [(r["step"], r[key]) for r in run.records() if key in r], key


def log_records(data):
    """The records of a file of wandb: LevelDB's log format after 7 bytes of its own, in blocks of 32 kB."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the block is padded
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_holds_the_log(run, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra: track)")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    records = in_two_sessions(run, "wandb")
    wandb.teardown()
    sessions = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
    logged, names = {}, set()
    for file in sessions:
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                names.add(record.run.run_id)
            if record.history.item:
                items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                logged[items["_step"]] = items
    assert len(names) == 1, "both sessions are one run"
    for step, record in records.items():
        assert logged[step]["loss"] == record["loss"]


@pytest.mark.parametrize("tool", ["tensorboard"])
def test_a_tool_that_fails_is_dropped_and_the_run_goes_on(run, tool, capsys):
    pytest.importorskip(tool, reason=f"{tool} is not installed (extra: track)")
    (run.path / tool).write_text("a file in its way")
    watched(run, tool)
    assert Run(run.path).complete
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is dropped" in line]
    assert len(warnings) == 1
    assert f"warning: {tool} is dropped: " in warnings[0]


def test_what_is_not_there_is_told_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="tracker 'tensorbord' is not known; did you mean 'tensorboard'"):
        chosen("tensorbord")
    for tool in TOOLS:
        monkeypatch.setitem(sys.modules, tool, None)  # as if it were not installed
        with pytest.raises(EnvironmentFault, match="pip install 'yuriiformer\\[track\\]'"):
            chosen(f" {tool} ,")
    assert main(["train", "nesterov", "--out", "run", "--track", "wandb"]) == 3
    assert "pip install 'yuriiformer[track]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
