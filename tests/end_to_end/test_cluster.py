"""The files of cluster/ are run: two processes of gloo on this machine, stopped as the scheduler does, and gone on with."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yuriiformer.training.run import Run

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra: dev)")
CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
TRAIN = "train nesterov --set training.steps=150 model.layers=2 model.width=16 model.heads=2 model.context=16 training.batch=4 training.evaluate_every=100 training.checkpoint_every=40 training.compile=no training.precision=fp32"

# What Slurm's commands do for a job of one machine: srun starts the tasks, hands them its signals and ends with their
# highest exit code.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
echo $$ >srun.pid
worst=0
for pid in "${pids[@]}"; do
  while :; do wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null || break; done
  wait "$pid" 2>/dev/null; code=$?
  ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = '#!/usr/bin/env bash\nif [[ $1 == show ]]; then echo localhost; else echo "$@" >>scontrol.log; fi\n'


@pytest.fixture
def start(tmp_path, corpus):
    """Start a command with stubs of the scheduler's commands, in an empty folder."""
    programs = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "yuriiformer": f'#!/bin/sh\nexec {sys.executable} -m yuriiformer "$@"\n',
        "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    started = []

    def start(*command, **env):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PORT": str(port), **env}
        log = (tmp_path / f"log{len(started)}").open("w+")
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            os.killpg(process.pid, signal.SIGKILL)


def in_the_middle(run, process, tmp_path):
    while not (run / "metrics.jsonl").is_file() or not Run(run).records():
        assert process.poll() is None, "".join(p.read_text() for p in tmp_path.glob("log*"))
        time.sleep(0.01)


def check(process, code, tmp_path):
    assert process.wait(timeout=200) == code, "".join(p.read_text() for p in sorted(tmp_path.glob("log*")))


def scripts():
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    return {
        "slurm": (CLUSTER / "slurm.sbatch").read_text(),
        "kubernetes": job["spec"]["template"]["spec"]["containers"][0]["command"][2],
        "skypilot": task["run"],
    }


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "skypilot"])
def test_the_scripts_are_sound(name):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (extra: dev)")
    words = ["--exclude=SC2086"] if name == "skypilot" else []  # ARGUMENTS is several words
    done = subprocess.run(
        [shellcheck, "--shell=bash", *words, "-"], input=scripts()[name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_slurm(start, tmp_path, corpus):
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    command = ["bash", CLUSTER / "slurm.sbatch", *TRAIN.split(), "--corpus", corpus.path, "--out", "run"]
    process = start(*command, **job)
    in_the_middle(tmp_path / "run", process, tmp_path)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    check(process, 0, tmp_path)
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    run = Run(tmp_path / "run")
    assert 0 < run.step < 150
    assert run.step >= run.records()[-1]["step"], "all is saved"
    check(start(*command, **job), 0, tmp_path)
    assert run.complete
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"


def test_kubernetes_then_skypilot(start, tmp_path, corpus):
    """A pod of the one is evicted; the script of the other goes on with its run."""
    _, manifest = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    rules = manifest["spec"]["podFailurePolicy"]["rules"]
    assert {
        "action": "Ignore",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [75]},
    } in rules
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    env |= {"NODES": "1", "MASTER": "localhost", "JOB_COMPLETION_INDEX": "0", "PROCESSES": "2"}
    arguments = [*TRAIN.split(), "--corpus", str(corpus.path)]
    process = start(*container["command"], *arguments, "--out", "runs/one", **env)
    run = tmp_path / "runs" / "one"
    in_the_middle(run, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    check(process, 75, tmp_path)
    run = Run(run)
    assert 0 < run.step < 150
    assert run.step >= run.records()[-1]["step"], "all is saved"

    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    sky = {"SKYPILOT_NODE_IPS": "localhost", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
    env = {**sky, **task["envs"], "SKYPILOT_NUM_GPUS_PER_NODE": "2", "RUNS": "runs", "ARGUMENTS": " ".join(arguments)}
    check(start("bash", "-c", task["run"], **env), 0, tmp_path)
    assert run.complete
