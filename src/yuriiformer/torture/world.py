"""Several processes that train one run: one of them dies, or there are more or fewer of them when it goes on."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..training.run import Run
from .subject import STEPS, Bench, Broken, demand, fingerprint, note_batches, noted

LIMIT = 180.0  # seconds for two processes to start, to be started again, and to end
# Without it, processes that torchrun starts again look for the dead ones' addresses, and half the time hang.
TORCHRUN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(run: Path, size: int, restarts: int = 0, stop: int = -1) -> subprocess.Popen[bytes]:
    """Go on with a run by `size` processes; at step `stop` one of them gets a SIGTERM."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += [f"--max-restarts={restarts}", "-m", "yuriiformer.torture.subject", str(run / "batches.txt"), str(stop)]
    with (run / "torchrun.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, "train", "--resume", str(run)], stdout=output, stderr=output, env={**os.environ, **TORCHRUN}
        )


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        raise Broken(f"it hung: no end after {LIMIT:.0f} s") from None
    finally:
        if process.poll() is None:
            for pid in [*_ranks(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def _ranks(parent: int) -> list[int]:
    """The processes that torchrun has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
    return found


def _reference(bench: Bench) -> tuple[dict[str, str], float]:
    """What two undisturbed processes come to, and the seconds from their first batch to their summary."""
    run, seconds = bench.folder / "two", bench.folder / "seconds.txt"
    if not run.exists():
        bench.copy("two")
        process = torchrun(run, 2)
        began = _when(process, lambda: bool(noted(run / "batches.txt")))
        seconds.write_text(str(_when(process, lambda: Run(run).complete) - began))
        demand(_wait(process) == 0, f"two processes, undisturbed, failed: {_said(run)}")
    return fingerprint(run), float(seconds.read_text())


def _when(process: subprocess.Popen[bytes], happens: Callable[[], bool]) -> float:
    """The time at which something happens to a run, or its processes end."""
    until = time.monotonic() + LIMIT
    while not happens() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    return time.monotonic()


def _said(run: Path) -> str:
    """The lines of our own, without those of torchrun."""
    lines = [line for file in sorted(run.glob("*.txt")) for line in file.read_text(errors="replace").splitlines()]
    return " ".join([line for line in lines if "yuriiformer: " in line][-3:])


def rank(bench: Bench, seed: int) -> dict[str, Any]:
    """Two processes, one of them killed at any instant from the first batch to the end: torchrun starts both again, and
    they end as two that nobody disturbed."""
    chance = random.Random(f"rank {seed}")
    expected, seconds = _reference(bench)
    run = bench.copy(f"rank-{seed}")
    process = torchrun(run, 2, restarts=2)
    _when(process, lambda: bool(noted(run / "batches.txt")))
    time.sleep(chance.uniform(0, seconds))
    late = Run(run).complete
    for pid in chance.sample(sorted(_ranks(process.pid)), 1 if _ranks(process.pid) else 0):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    code = _wait(process)
    demand(late or code == 0, f"torchrun ended with exit code {code}: {_said(run)}")
    bench.check(run, expected)
    return {"after the end": 1} if late else {"started again": 1, "seconds": time.monotonic() - killed}


def world(bench: Bench, seed: int) -> dict[str, Any]:
    """One process, two, one again, changed at random steps: the same samples at every step, the same losses."""
    chance = random.Random(f"world {seed}")
    run = bench.copy(f"world-{seed}")
    stops = sorted(chance.sample(range(2, STEPS - 2), 2))
    for size, stop in ((1, stops[0]), (2, stops[1]), (1, -1)):
        code = _go_on(bench, run, size, stop)
        demand((code == 0) == (stop < 0), f"{size} processes until step {stop}: exit code {code}: {_said(run)}")
        demand(Run(run).complete == (stop < 0), f"{size} processes did not end at step {stop}: {_said(run)}")
    alone = bench.copy(f"world-{seed}-alone")
    demand(_go_on(bench, alone, 1, -1) == 0, f"alone, it failed: {_said(alone)}")
    demand(_samples(run) == _samples(alone), "other samples were read than by one process")
    pairs = list(zip(Run(run).records(), Run(alone).records(), strict=True))
    error = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs for key in ("loss", "validation") if key in b)
    demand(math.isfinite(error) and error < 1e-5, f"losses differ by {error:.1e}")
    return {"largest difference of a loss": error, "samples compared": sum(map(len, _samples(alone).values()))}


def _go_on(bench: Bench, run: Path, size: int, stop: int) -> int:
    """The exit code; at step `stop` one of the processes gets a SIGTERM."""
    if size > 1:
        return _wait(torchrun(run, size, stop=stop))
    return bench.train(run, partial(note_batches, run / "batches.txt", stop)).wait()


def _samples(run: Path) -> dict[int, list[int]]:
    """The checksums of each step's samples in the order of the whole batch. A step read twice must be read the same."""
    shares: dict[int, dict[tuple[int, int], list[int]]] = {}
    for line in noted(run / "batches.txt"):
        share = shares.setdefault(line["step"], {}).setdefault((line["rank"], line["world"]), line["samples"])
        demand(share == line["samples"], f"step {line['step']} was read twice, and not the same")
    found: dict[int, list[int]] = {}
    for step, of in shares.items():
        for size in {size for _, size in of}:
            parts = [of.get((rank, size)) for rank in range(size)]
            if all(part is not None for part in parts):
                batch = [sample for row in zip(*parts, strict=True) for sample in row]
                demand(found.setdefault(step, batch) == batch, f"step {step} is another batch for {size} processes")
    return found
