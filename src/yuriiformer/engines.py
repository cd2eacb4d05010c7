"""Where the runs of a comparison are trained: here, one after another, or many at once on a Ray cluster.

An engine is a function of the runs. A run is a directory, so each engine goes on with what another one began.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .config import Config, as_dict
from .data.corpus import Corpus
from .errors import EnvironmentFault, Interrupted, UserError, unknown
from .files import locked_by, write_json
from .model import training_flops_per_token
from .progress import Meter, RunProgress
from .signals import SIGNALS, Stop
from .tracking import Tracking
from .training.checkpoint import newest_first
from .training.distributed import World
from .training.loop import Diverged, Observer, train
from .training.run import Run

DIVERGED = "diverged.json"
LIVES = 3  # workers that may die on a run without a checkpoint between them
POLL = 0.5  # seconds between two looks at the logs of a cluster's runs
PATIENCE = 60.0  # seconds that a run may still be held by a worker whose driver died


@dataclass(frozen=True)
class Job:
    """One run: its directory, the config for when there is none yet, and its name on the meter."""

    path: Path
    config: Config
    label: str

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").is_file() or (self.path / DIVERGED).is_file()

    @property
    def step_flops(self) -> float:
        """What a step counts on the meter."""
        model = self.config.model
        return self.config.training.batch * model.context * training_flops_per_token(model)

    @property
    def flops(self) -> float:
        return self.config.training.steps * self.step_flops

    def train(self, stop: Stop, observe: Observer, world: World) -> str:
        """To its end, which is told; a divergence is a result, too. Raises what `training.loop.train` does."""
        world.lead(self._create)
        try:
            return told(train(Run(self.path), stop, observe, world))
        except Diverged as error:
            if world.leads:
                write_json(self.path / DIVERGED, {"message": str(error)})
            return str(error)

    def _create(self) -> None:
        if not self.path.exists():
            Run.create(self.path, self.config, Corpus(Path(self.config.corpus)))


Engine = Callable[[Sequence[Job], Meter, Stop, World], None]


def find_engine(name: str, workers: int | None = None, track: Sequence[str] = ()) -> Engine:
    """`local` or `ray`; `workers` runs at once, each watched by the tools of `track`.

    Raises UserError for another name, EnvironmentFault when Ray is not installed.
    """
    if name not in ("local", "ray"):
        raise unknown("engine", name, ("local", "ray"))
    if workers is not None and (name == "local" or workers < 1):
        raise UserError(f"--workers is the number of runs at once of --engine ray, at least 1; got {workers}.")
    if name == "local":
        return partial(local, track=track)
    try:
        import ray  # noqa: F401
    except ImportError:
        raise EnvironmentFault("this needs ray, which is not installed: pip install 'yuriiformer[ray]'") from None
    return partial(on_ray, workers=workers, track=track)


def told(summary: dict[str, Any]) -> str:
    return (
        f"validation {summary['final_validation']:.4f} after {summary['steps']} steps, "
        f"{summary['seconds']:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s"
    )


class Follower:
    """Shows and tracks a run, by its records as they come or by its log."""

    def __init__(self, job: Job, meter: Meter, track: Sequence[str]) -> None:
        at = max((step for step, _ in newest_first(job.path / "checkpoints")), default=0)
        steps = job.config.training.steps
        self.job = job
        self.shown = RunProgress(meter, job.label, at=at, steps=steps, work=job.step_flops)
        self.tracking = Tracking(track, job.path, as_dict(job.config))
        self._file, self._read = 0, 0

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tracking.close()

    def observe(self, record: dict[str, Any]) -> None:
        self.shown(record)
        self.tracking(record)

    def read(self) -> None:
        """Observe what another process has logged. One that goes on writes a shorter log anew; its steps come twice."""
        log = self.job.path / "metrics.jsonl"
        if not log.is_file():
            return
        with log.open("rb") as file:
            if os.fstat(file.fileno()).st_ino != self._file:
                self._file, self._read = os.fstat(file.fileno()).st_ino, 0
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")
        self._read += len(whole[0]) + len(whole[1])
        for record in map(json.loads, whole[0].splitlines()):
            if record["step"] > self.shown.at:
                self.observe(record)


def local(jobs: Sequence[Job], meter: Meter, stop: Stop, world: World, track: Sequence[str] = ()) -> None:
    """One after another, in this process, or together with the others of its world."""
    for job in jobs:
        with Follower(job, meter, track) as follower:
            follower.shown.finish(job.train(stop, follower.observe, world))


def on_ray(
    jobs: Sequence[Job], meter: Meter, stop: Stop, world: World, workers: int | None = None, track: Sequence[str] = ()
) -> None:
    """Many at once: each run is a task of a Ray cluster, the one of RAY_ADDRESS or one on this machine alone.

    The cluster's machines have this package and see the same folders under the same paths. When a worker dies, its run
    goes on from its newest checkpoint in another one. This process reads the logs and shows how all of them go.

    Raises Interrupted (everything saved) when asked to stop, EnvironmentFault when workers die again and again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError

    if world.size > 1:
        raise UserError("--engine ray starts processes of its own; start it without torchrun.")
    with _cluster(workers):
        workers, resources = _shares(jobs[0].config.training.device, workers)
        meter.line(f"Ray: {workers} runs at once, each with {', '.join(f'{k}={v}' for k, v in resources.items())}")
        threads = int(os.environ.get("OMP_NUM_THREADS") or resources.get("num_cpus", 0))
        work = ray.remote(_work).options(max_retries=0, **resources)
        waiting = [Follower(job, meter, track) for job in jobs]
        running: dict[Any, Follower] = {}
        deaths: dict[str, list[int]] = {job.label: [] for job in jobs}
        failure: UserError | None = None
        stopped = False
        while running or (waiting and not stopped):
            if (stop.requested or failure) and not stopped:
                stopped = True
                for task in running:
                    ray.cancel(task)  # an interrupt, as by Ctrl-C: the worker saves
            while waiting and len(running) < workers and not stopped:
                follower = waiting.pop(0)
                running[work.remote(follower.job, threads)] = follower
            done = ray.wait(list(running), timeout=POLL)[0] if running else []
            for follower in running.values():
                follower.read()
            for task in done:
                follower = running.pop(task)
                job = follower.job
                try:
                    code, text, warnings = ray.get(task)
                except TaskCancelledError:
                    code, text, warnings = Interrupted.exit_code, "", []
                except RayTaskError:  # a bug
                    raise
                except RayError as error:
                    code, text, warnings = Interrupted.exit_code, "", []
                    deaths[job.label].append(max((s for s, _ in newest_first(job.path / "checkpoints")), default=0))
                    meter.line(f"{job.label}: its worker died after step {deaths[job.label][-1]}; the run goes on.")
                    if deaths[job.label][-LIVES:] == [deaths[job.label][-1]] * LIVES:
                        reason = str(error).strip().split("\n")[0]
                        failure = EnvironmentFault(f"{job.label}: {LIVES} workers died on it without a step: {reason}")
                for warning in warnings:
                    follower.observe({"warning": warning})
                if code == 0:
                    follower.read()
                    follower.shown.finish(text)
                    follower.tracking.close()
                elif code == Interrupted.exit_code:
                    waiting.insert(0, follower)
                else:
                    failure = UserError(f"{job.label}: {text}")
                    failure.exit_code = code
        for follower in waiting:
            follower.tracking.close()
    if failure:
        raise failure
    if waiting:
        raise Interrupted(f"stopped with {len(waiting)} of {len(jobs)} runs to go; saved.")


def _work(job: Job, threads: int) -> tuple[int, str, list[str]]:
    """What a worker does: train a run. Returns an exit code as of a process, what is to be told, and warnings."""
    if threads:
        torch.set_num_threads(threads)
    deadline = time.monotonic() + PATIENCE
    while locked_by(job.path) and time.monotonic() < deadline:
        time.sleep(POLL)
    warnings: list[str] = []

    def observe(record: dict[str, Any]) -> None:
        warnings.extend([record["warning"]] if "warning" in record else [])

    with Stop().on_signals() as stop:
        try:
            return 0, job.train(stop, observe, World()), warnings
        except UserError as error:
            return error.exit_code, str(error), warnings


def _shares(device: str, workers: int | None) -> tuple[int, dict[str, int]]:
    """How many runs at once, and what each asks of the cluster: a GPU, or its share of the cores."""
    import ray

    if device == "cuda":
        workers = workers or int(ray.cluster_resources().get("GPU", 0))
        resources = {"num_gpus": 1}
    else:
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        workers = workers or sum(cores)
        resources = {"num_cpus": max(1, min(sum(cores) // max(1, workers), *(n for n in cores if n)))}
    if workers < 1:
        raise EnvironmentFault("the Ray cluster has nothing to train on yet; say how many runs at once: --workers N")
    return workers, resources


@contextmanager
def _cluster(workers: int | None) -> Iterator[None]:
    """Ray without its noise: no statistics sent, no dashboard, nothing on the terminal, nothing left behind."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address, handlers = os.environ.get("RAY_ADDRESS"), {s: signal.getsignal(s) for s in SIGNALS}
    with ExitStack() as held:
        held.enter_context(redirect_stdout(held.enter_context(open(os.devnull, "w"))))  # its messages; ours say more
        own: dict[str, Any] = {}
        if address:
            _require_answer(address)
        else:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            cores = max(workers or 1, os.cpu_count() or 1)
            own = {"num_cpus": cores, "include_dashboard": False, "_temp_dir": folder, "object_store_memory": 100 << 20}
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
            held.callback(ray.shutdown)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"at RAY_ADDRESS={address}" if address else "on this machine"
            raise EnvironmentFault(f"no Ray cluster {where}: {str(error).strip().splitlines()[0]}") from None
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray has set its own
        yield


def _require_answer(address: str) -> None:
    """Ray itself would try for many minutes. Raises EnvironmentFault."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise EnvironmentFault(f"no Ray cluster at RAY_ADDRESS={address}: {error.strerror or error}") from None
