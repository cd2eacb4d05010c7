"""How a run or a comparison stands, from its directory alone: nothing is asked of the process that trains it."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import Config, from_dict
from ..errors import UserError
from ..files import locked_by, read_json, sha256
from ..progress import duration, size

RECENT = 5  # lines of the log that the speed is taken from
SILENT = 300.0, 20  # seconds, and usual times between two lines, without a line before a running run is called silent


def status(directory: Path, verify: bool = False) -> dict[str, Any]:
    """A run, or a comparison with its runs. `verify` reads the checkpoints and compares their checksums.

    Raises UserError when the directory is neither.
    """
    if (directory / "plan.json").is_file():
        return _comparison(directory, verify)
    if (directory / "config.json").is_file():
        return _run(directory, verify)
    raise UserError(f"{directory} is no run (it has no config.json) and no comparison (it has no plan.json).")


def _run(path: Path, verify: bool) -> dict[str, Any]:
    config = from_dict(Config, read_json(path / "config.json"))
    steps, holder = config.training.steps, locked_by(path)
    records, damage = _log(path)
    last = records[-1] if records else {}
    measured = [r for r in records if "validation" in r]
    best = min(measured, key=lambda r: r["validation"], default=None)
    checkpoints = _checkpoints(path / "checkpoints", verify)
    whole = [c["step"] for c in checkpoints if not c["damage"]]
    speed = _speed(records[-RECENT:])
    tokens_per_step = config.training.batch * config.model.context
    left = (steps - last.get("step", 0)) * tokens_per_step / speed if speed else None
    log = path / "metrics.jsonl"
    found = {
        "run": str(path),
        "rule": config.model.rule,
        "splitting": config.model.splitting,
        "seed": config.training.seed,
        "held_by": holder,
        "step": last.get("step", 0),
        "steps": steps,
        "silent_seconds": round(time.time() - (log if log.is_file() else path / "config.json").stat().st_mtime, 1),
        "tokens_per_second": speed,
        "seconds_left": left if holder else None,
        "loss": last.get("loss"),
        "validation": measured[-1]["validation"] if measured else None,
        "best_validation": best and best["validation"],
        "best_step": best and best["step"],
        "skipped": last.get("skipped", 0),
        "memory": last.get("memory"),
        "mfu": last.get("mfu"),
        "checkpoints": checkpoints,
        "goes_on_from": max(whole, default=0),
        "damage": [*damage, *(c["damage"] for c in checkpoints if c["damage"])],
    }
    usual = (records[-1]["seconds"] - records[-2]["seconds"]) if len(records) > 1 else 0
    silent = found["silent_seconds"] > max(SILENT[0], SILENT[1] * usual)
    words = _state(path, found, silent, lost=bool(checkpoints) and not whole)
    return found | dict(zip(("state", "means", "next"), words, strict=True))


def _state(path: Path, found: dict[str, Any], silent: bool, lost: bool) -> tuple[str, str, str]:
    """In a word, in a sentence, and what to do."""
    resume = shlex.join(["yuriiformer", "train", "--resume", str(path)])
    at = f"step {found['step']} of {found['steps']}"
    if (path / "summary.json").is_file():
        return "complete", "", shlex.join(["yuriiformer", "generate", str(path)])
    if (path / "diverged.json").is_file():
        return "diverged", read_json(path / "diverged.json")["message"], "lower the learning rates and start again"
    if "imported_from" in read_json(path / "env.json"):
        return "imported", "", shlex.join(["yuriiformer", "compare", "--from", str(path)])
    if found["held_by"]:
        return (
            "silent" if silent else "running",
            f"{at}, by {found['held_by']}",
            "look at that process" if silent else "",
        )
    if lost:
        return "lost", "nobody trains it, and no checkpoint is whole", "start it again in another directory"
    again = found["step"] - found["goes_on_from"]
    if again > 0:
        return "dead", f"at {at}, nobody trains it; {again} steps since its checkpoint are done again", resume
    return "stopped", f"at {at}, nobody trains it; all is saved", resume


def _log(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The whole lines of the log that say a validation loss or are among the last, and what is wrong with it."""
    log = path / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.is_file() else []
    try:
        late = len(lines) - RECENT
        return [json.loads(line) for i, line in enumerate(lines) if i >= late or b'"validation"' in line], []
    except ValueError as error:
        return [], [f"{log} is damaged: {error}"]


def _speed(records: list[dict[str, Any]]) -> float | None:
    """Tokens per second of training between the first and the last of these records."""
    if len(records) < 2 or (seconds := records[-1]["seconds"] - records[0]["seconds"]) <= 0:
        return None
    return float((records[-1]["tokens"] - records[0]["tokens"]) / seconds)


def _checkpoints(folder: Path, verify: bool) -> list[dict[str, Any]]:
    """Newest first, each with its bytes and what is wrong with it (sizes; with `verify`, checksums, too)."""
    found = []
    for path in folder.glob("step_*"):
        number = path.name.removeprefix("step_")
        with suppress(FileNotFoundError):  # the trainer deletes old ones
            if number.isdigit():
                damage, files = _damage(path, verify), [file.stat().st_size for file in path.iterdir()]
                found.append({"step": int(number), "bytes": sum(files), "damage": damage})
    return sorted(found, key=lambda c: -c["step"])


def _damage(checkpoint: Path, verify: bool) -> str:
    try:
        for name, entry in read_json(checkpoint / "state.json")["files"].items():
            file = checkpoint / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return f"{file} is cut short or missing."
            if verify and sha256(file) != entry["sha256"]:
                return f"{file} is damaged: its sha256 is not the one it was written with."
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return str(error) if isinstance(error, UserError) else f"{checkpoint / 'state.json'} is damaged: {error!r}"
    return ""


def _comparison(out: Path, verify: bool) -> dict[str, Any]:
    plan, holder = read_json(out / "plan.json"), locked_by(out)
    runs = []
    for seed in plan["seeds"]:
        for arm in plan["arms"]:
            path = out / "runs" / f"{plan['slugs'][arm]}-seed{seed}"
            found = {"run": str(path), "state": "waiting", "step": 0, "steps": plan["steps"][arm]}
            try:
                found = _run(path, verify) if (path / "config.json").is_file() else found
            except UserError as error:
                found |= {"state": "damaged", "means": str(error)}
            runs.append({"arm": arm, "seed": seed} | found)
    done = sum(run["state"] in ("complete", "diverged") for run in runs)
    state = "complete" if done == len(runs) else "running" if holder else "stopped"
    return {
        "comparison": str(out),
        "state": state,
        "held_by": holder,
        "done": done,
        "runs": runs,
        "seconds_left": _left(runs),
        "next": plan["command"] if state == "stopped" else "",
    }


def _left(runs: list[dict[str, Any]]) -> float | None:
    """Seconds to the end of the last run, if those that wait run as fast as the others; None when nothing runs."""
    running = [run for run in runs if run.get("seconds_left")]
    steps = [run["seconds_left"] / (run["steps"] - run["step"]) for run in running]
    if not running:
        return None
    to_do = sum(run["steps"] - run["step"] for run in runs if run["state"] not in ("complete", "diverged"))
    return to_do * statistics.median(steps) / len(running)


def show(found: dict[str, Any], console: Console) -> None:
    if "runs" in found:
        _show_comparison(found, console)
    else:
        _show_run(found, console)


def _show_run(run: dict[str, Any], console: Console) -> None:
    lines = [
        ("state", f"{run['state']}: {run['means']}" if run["means"] else run["state"]),
        ("model", f"{run['rule']}, {run['splitting']}, seed {run['seed']}"),
        ("step", f"{run['step']:,} of {run['steps']:,}, {duration(run['silent_seconds'])} since the last line of the log"),
        ("speed", _speed_text(run)),
        ("loss", _number(run["loss"])),
        ("validation", f"{_number(run['validation'])}, best {_number(run['best_validation'])} at step {run['best_step']}"),
        ("skipped", f"{run['skipped']} steps by the guard" if run["skipped"] else ""),
        *(("checkpoint", f"step {c['step']:,}, {size(c['bytes'])}{', DAMAGED' * bool(c['damage'])}") for c in run["checkpoints"]),
        *(("damage", text) for text in run["damage"]),
        ("next", run["next"]),
    ]  # fmt: skip
    for name, text in lines:
        if text and (name != "validation" or run["best_step"] is not None):
            console.print(f"{name:<11}{text}", soft_wrap=True, markup=False, highlight=False)


def _speed_text(run: dict[str, Any]) -> str:
    if not run["tokens_per_second"]:
        return ""
    text = f"{run['tokens_per_second']:,.0f} tokens/s"
    text += f", {run['mfu']:.0%} MFU" if run["mfu"] else ""
    text += f", {size(run['memory'])}" if run["memory"] else ""
    if run["seconds_left"] is not None:
        done = datetime.fromtimestamp(time.time() + run["seconds_left"])
        text += f"; {duration(run['seconds_left'])} left, done {done:%a %d %b %H:%M}"
    return text


def _show_comparison(found: dict[str, Any], console: Console) -> None:
    losses = ("loss", "validation", "best_validation") if console.width >= 110 else ("validation",)
    table = Table("arm", "seed", "state", "step", *(key.split("_")[0] for key in losses), "tokens/s", "left")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap = True
    for run in found["runs"]:
        left, speed = run.get("seconds_left"), run.get("tokens_per_second")
        table.add_row(
            run["arm"].replace(",", ",\n"), f"{run['seed']}", run["state"], f"{run['step']:,}/{run['steps']:,}",
            *(_number(run.get(key)) for key in losses),
            f"{speed:,.0f}" if speed else "–", duration(left) if left else "–",
        )  # fmt: skip
    console.print(table)
    by = f" by {found['held_by']}" if found["held_by"] else ""
    left = f"; about {duration(found['seconds_left'])} left" if found["seconds_left"] else ""
    lines = [f"{found['state']}{by}: {found['done']} of {len(found['runs'])} runs done{left}"]
    for run in found["runs"]:
        lines += [f"{run['arm']}, seed {run['seed']}: {text}" for text in run.get("damage", [])]
        lines += (
            [f"{run['arm']}, seed {run['seed']}: {run['means']}"]
            if run["state"] in ("silent", "lost", "diverged", "damaged")
            else []
        )
    for line in [*lines, *([f"next: {found['next']}"] if found["next"] else [])]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
