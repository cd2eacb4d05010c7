"""Processes that are killed or told to stop, at any instant of a run."""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from ..training.checkpoint import newest_first
from ..training.run import Run
from .subject import INTERVAL, Bench, demand, note_batches, noted

PATIENCE = 0.05  # seconds that a scheduler may wait between SIGTERM and SIGKILL here


def kill(bench: Bench, seed: int) -> dict[str, Any]:
    """SIGKILL at an instant of the whole run, every second time as the end of a SIGTERM's patience; then go on."""
    chance = random.Random(f"kill {seed}")
    run = bench.copy(f"kill-{seed}")
    child = bench.train(run, partial(note_batches, run / "batches.txt"))
    time.sleep(chance.uniform(0, bench.seconds))
    if chance.random() < 0.5:
        child.send(signal.SIGTERM)
        time.sleep(chance.uniform(0, PATIENCE))
    child.send(signal.SIGKILL)
    child.wait()
    saved = max((step for step, _ in newest_first(run / "checkpoints")), default=0)
    begun = max((line["step"] for line in noted(run / "batches.txt")), default=0)
    # One checkpoint may be in work while training goes on to the next.
    demand(begun - saved <= 2 * INTERVAL, f"killed at step {begun}, and the newest checkpoint was of step {saved}")
    when = _when(run, begun)
    bench.finish(run)
    return {when: 1, "steps lost": float(max(0, begun - saved))}


def _when(run: Path, begun: int) -> str:
    """Where in its life a run was killed."""
    if Run(run).complete:
        return "after the end"
    if list(run.rglob("*.partial")):
        return "while saving"
    return "between saves" if begun else "at the start"


def stop(bench: Bench, seed: int) -> dict[str, Any]:
    """SIGTERM, SIGUSR1 or SIGINT at an instant after the process can hear it; then go on."""
    chance = random.Random(f"term {seed}")
    number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    run = bench.copy(f"term-{seed}")
    began = time.monotonic()
    child = bench.train(run)
    while not child.ready:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, max(0.0, bench.seconds - (time.monotonic() - began))))
    sent = time.monotonic()
    child.send(number)
    code = child.wait()
    took = time.monotonic() - sent
    if Run(run).complete:
        demand(code in (0, -number), f"{number.name} after the end: exit code {code}")
        when = "after the end"
    else:
        demand(code == 75, f"{number.name}: exit code {code} in place of 75: {child.said[-300:]}")
        demand(bool(newest_first(run / "checkpoints")), f"{number.name}: exit code 75, and nothing was saved")
        demand(f"Go on with: yuriiformer train --resume {run}" in child.said, f"{number.name}: not said how to go on")
        when = number.name
    bench.finish(run)
    return {when: 1, "seconds": took}
