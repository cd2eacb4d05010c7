"""Each case as often as asked, with the seed that repeats what failed."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import unknown
from ..files import disk_errors, lock, write_json, write_text
from ..progress import Meter
from ..training.device import describe
from . import disk, power, processes, world
from .subject import Bench, Broken

Trial = Callable[[Bench, int], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A promise; a trial of it, as a function of a seed, raises Broken or returns what it has counted."""

    promise: str
    trial: Trial
    count: int | Callable[[Bench], int]


# Some trials of kill, term and rank fall after the end of the run they mean; so many that more than 100 and 10 do not.
CASES = {
    "kill": Case("killed at any instant, then resumed: the same end, bit for bit", processes.kill, 130),
    "term": Case("told to stop: saved, exit code 75, then the same end, bit for bit", processes.stop, 180),
    "disk": Case(
        "every call that changes the disk refused: it goes on, or stops with exit code 3; then the same end",
        disk.refusal,
        lambda bench: len(disk.REFUSALS) * disk.calls(bench),
    ),
    "flip": Case("files damaged: refused by name, or the checkpoint before is used", disk.flip, 10_000),
    "power": Case(
        "the power fails at any instant of saving: the old checkpoint or the new one, never a mix",
        power.power,
        power.instants,
    ),
    "rank": Case("one of two processes killed: both are started again, the same end, bit for bit", world.rank, 12),
    "world": Case("1, 2, then 1 process: the same samples at every step, losses equal to 1e-5", world.world, 2),
}
TENTH = 10


def torture(
    out: Path,
    names: Sequence[str] = (),
    *,
    count: int | None = None,
    seed: int = 0,
    tenth: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Try cases and return what is written to out/torture.json; what failed keeps its folder in out/failed.

    count: trials of each case in place of its own number. tenth: every tenth of them.
    Raises UserError for a case that is not known, or when another process uses the folder.
    """
    for name in names:
        if name not in CASES:
            raise unknown("case", name, CASES)
    work = out / "work"
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock(out, "torture"):
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        try:
            bench = Bench(work)
            cases = [_case(name, bench, out, count, seed, tenth) for name in names or CASES]
        finally:
            shutil.rmtree(work, ignore_errors=True)
    found = {"command": command, "cases": cases, "machine": describe("cpu")}
    write_json(out / "torture.json", found)
    write_text(out / "table.md", table(found))
    return found


def _case(name: str, bench: Bench, out: Path, count: int | None, seed: int, tenth: bool) -> dict[str, Any]:
    case = CASES[name]
    whole = case.count(bench) if callable(case.count) else case.count
    seeds = range(seed, seed + (count or whole), TENTH if tenth else 1)
    failed: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    began = time.monotonic()
    with Meter(name, len(seeds)) as meter:
        for number in seeds:
            before = set(bench.folder.iterdir())
            try:
                notes.append(case.trial(bench, number))
            except Broken as broken:
                failed.append({"seed": number, "why": str(broken)})
                meter.line(f"{name}: {broken}. Once more: yuriiformer torture --only {name} --seed {number} --count 1")
            for folder in set(bench.folder.iterdir()) - before:
                if folder.name.startswith(f"{name}-"):
                    if failed and failed[-1]["seed"] == number:
                        shutil.copytree(folder, out / "failed" / folder.name, dirs_exist_ok=True)
                    shutil.rmtree(folder)
            meter.advance(1, f"{len(notes)} kept, {len(failed)} broken")
        seconds = time.monotonic() - began
        meter.line(f"{name}: {len(notes)} of {len(seeds)}")
    return {
        "case": name, "promise": case.promise, "kept": len(notes), "of": len(seeds), "seed": seed, "every": seeds.step,
        "seconds": round(seconds, 1), "found": _together(notes), "failed": failed,
    }  # fmt: skip


def _together(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Whole numbers are added up; of measured ones the median, what 99 of 100 do not pass, and the largest."""
    found: dict[str, Any] = {}
    for key in sorted({key for note in notes for key in note}):
        values = sorted(note[key] for note in notes if key in note)
        if isinstance(values[0], int):
            found[key] = sum(values)
        else:
            middle, high = statistics.median(values), values[min(len(values) - 1, round(0.99 * len(values)))]
            found[key] = {"median": middle, "p99": high, "largest": values[-1]}
    return found


def table(found: dict[str, Any]) -> str:
    """For the documents: a row for each case."""
    rows = ["| case | what must hold | kept | seeds | what happened |", "| --- | --- | --- | --- | --- |"]
    for case in found["cases"]:
        last = case["seed"] + (case["of"] - 1) * case["every"]
        seeds = f"{case['seed']} to {last:,}" + (f", every {case['every']}th" if case["every"] > 1 else "")
        rows.append(
            f"| `{case['case']}` | {case['promise']} | {case['kept']:,} of {case['of']:,} | {seeds} "
            f"| {', '.join(_text(key, value) for key, value in case['found'].items())} |"
        )
    return "\n".join(rows) + "\n"


def _text(key: str, value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,} {key}"
    return f"{key}: median {value['median']:.3g}, 99 % below {value['p99']:.3g}, at most {value['largest']:.3g}"
