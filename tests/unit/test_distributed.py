"""How a batch is split over passes and processes does not change what is learned; half a world is refused."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

from yuriiformer.config import override
from yuriiformer.errors import EnvironmentFault, UserError
from yuriiformer.signals import Stop
from yuriiformer.training import distributed
from yuriiformer.training.loop import train
from yuriiformer.training.run import Run, definite

ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def start(path, config, corpus, **changes):
    gentle = {
        "adamw_lr": 1e-3,
        "muon_lr": 1e-3,
    } | changes  # Muon's bf16 iteration magnifies the last bits of a gradient
    config = override(config, {f"training.{key}": value for key, value in gentle.items()})
    return Run.create(path, definite(config, corpus)[0], corpus)


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, "-m", "yuriiformer", *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, timeout=100):
    _, error = process.communicate(timeout=timeout)
    assert process.returncode == 0, error


def losses(run):
    return [record["validation"] for record in run.records() if "validation" in record]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(tmp_path, config, corpus, parallel):
    """In passes of another size, and going on alone from what the two have saved."""
    alone = start(tmp_path / "alone", config, corpus)
    train(alone, Stop())
    together = start(tmp_path / "together", config, corpus, parallel=parallel, micro_batch=1)
    finish(torchrun("train", "--resume", together.path))
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)

    newest = together.checkpoints / "step_12"
    (together.path / "summary.json").unlink()
    newest.rename(tmp_path / "step_12")
    end = train(together, Stop())["final_validation"]
    assert end == pytest.approx(losses(alone)[-1], rel=1e-5)


def test_passes_of_uneven_size_learn_the_same(tmp_path, config, corpus):
    found = [
        train(start(tmp_path / f"micro{micro}", config, corpus, micro_batch=micro), Stop())["final_validation"]
        for micro in (0, 3, 2, 1)
    ]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


def test_a_signal_to_one_process_stops_and_saves_all(tmp_path, config, corpus):
    run = start(tmp_path / "run", config, corpus, steps=100000, checkpoint_every=0, keep_best=False)
    process = torchrun("train", "--resume", run.path)
    while not run.records() and process.poll() is None:
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "yuriiformer train"], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGUSR1)
    _, error = process.communicate(timeout=60)
    assert f"yuriiformer train --resume {run.path}" in error
    assert error.count("saved.") == 1
    assert "exitcode  : 75" in error
    assert run.step > 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is '' in a world of 2"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is '2' in a world of 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set: a world without a rendezvous"),
    ],
)
def test_half_a_world_is_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.from_environment()


def test_no_rendezvous_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    for name, value in {
        "WORLD_SIZE": 2,
        "RANK": 1,
        "LOCAL_RANK": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 9,
    }.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(EnvironmentFault, match=r"rank 1 of 2 found no rendezvous at 127.0.0.1:9"),
        distributed.joined("cpu"),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, config, corpus):
    run = start(tmp_path / "run", config, corpus, batch=3)
    process = torchrun("train", "--resume", run.path)
    _, error = process.communicate(timeout=60)
    assert error.count("training.batch is 3; 2 processes cannot share it evenly") == 1
    assert "cli.py" not in error, "no traceback of ours"
