"""The runs behind a published table: what they cost before they start, and what sets them apart from the published ones."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .compare import Arm, parse_arm, speeds
from .config import Config, ModelConfig, flat
from .data.corpus import Corpus
from .engines import DIVERGED
from .files import disk_errors, lock, read_json
from .model import LanguageModel, flops_per_token, training_flops_per_token
from .presets import Preset, Table
from .signals import Stop
from .training.device import PEAKS
from .training.run import Run, definite, padded_vocabulary

# What the estimate assumes; docs/performance.md says what was measured.
H100, PEAK, MFU = "NVIDIA H100 SXM", dict(PEAKS)["H100"]["bf16"], 0.40
# What changes the time a run takes, or which draw it is, and not what is measured.
HARMLESS = {
    "corpus", "training.micro_batch", "training.checkpoint_every", "training.keep", "training.keep_best",
    "training.parallel", "training.device", "training.compile", "training.attention", "training.loss_chunk",
    "training.seed",
}  # fmt: skip


def arms_of(table: Table, base: Config, controls: bool) -> list[Arm]:
    return [parse_arm(name, base) for name in (*table.rows, *(table.controls if controls else ()))]


def with_vocabulary(base: Config, tokens: int) -> Config:
    """The config with the vocabulary of its text, where it leaves it open."""
    vocabulary = base.model.vocabulary or padded_vocabulary(tokens)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, vocabulary=vocabulary))


def deviations(config: Config, preset: Preset, source: str, tokenizer: str) -> list[str]:
    """What differs from the published runs, key by key; nothing when the numbers can stand beside each other."""
    ours, theirs = flat(config), flat(preset.config())
    found = [
        f"{key} {_shown(ours[key])} instead of {_shown(value)}"
        for key, value in theirs.items()
        if key not in HARMLESS and ours[key] != value
    ]
    if source != preset.source:
        found.append(f"text {source} instead of {preset.source}")
    if tokenizer.partition(":")[0] != preset.tokenizer:
        found.append(f"tokenizer {tokenizer} instead of {preset.tokenizer}")
    return found


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def parameters(config: ModelConfig) -> int:
    """Counted without memory for a single one."""
    with torch.device("meta"):
        return sum(LanguageModel(config, seed=None).parameter_counts().values())


def flops(config: Config) -> float:
    """Of a whole run: training, and the forward passes of its validations."""
    training, context = config.training, config.model.context
    validations = math.ceil(training.steps / training.evaluate_every)
    read = validations * training.evaluate_sequences * context
    trained = training.steps * training.batch * context
    return float(trained * training_flops_per_token(config.model) + read * sum(flops_per_token(config.model).values()))


def plan(arms: Sequence[Arm], seeds: Sequence[int], out: Path, measured: Mapping[str, float]) -> dict[str, Any]:
    """What the runs cost, and what is left of it in the folder `out`.

    measured: tokens per second of arms on this device; finished runs in `out` tell theirs by themselves.
    """
    rows: list[dict[str, Any]] = []
    rates = []  # FLOP/s on this device
    for arm in arms:
        config = arm.config
        training_flops = training_flops_per_token(config.model)
        done, speeds = _done(arm, seeds, out)
        speed = statistics.median(speeds) if speeds else measured.get(arm.name)
        rates.append(speed and speed * training_flops)
        rows.append(
            {
                "arm": arm.name,
                "runs": len(seeds),
                "done": done,
                "parameters": parameters(config.model),
                "flops_per_token": training_flops,
                "steps": config.training.steps,
                "tokens": config.training.steps * config.training.batch * config.model.context,
                "flops": flops(config),
                "tokens_per_second_here": speed,
            }
        )
    known = [rate for rate in rates if rate]
    for row, rate in zip(rows, rates, strict=True):
        rate = rate or (statistics.median(known) if known else None)
        row["h100_hours"] = row["flops"] / (PEAK * MFU) / 3600
        row["hours_here"] = row["flops"] / rate / 3600 if rate else None

    def total(key: str, left: bool = False) -> float:
        return sum(row[key] * (row["runs"] - row["done"] if left else row["runs"]) for row in rows)

    costs = ("flops", "h100_hours", *(["hours_here"] if known else []))
    return {
        "estimate": {"device": H100, "peak_flops": PEAK, "mfu": MFU},
        "arms": rows,
        "total": {key: total(key) for key in ("tokens", *costs)},
        "left": {key: total(key, left=True) for key in costs},
    }


def _done(arm: Arm, seeds: Sequence[int], out: Path) -> tuple[float, list[float]]:
    """How many of an arm's runs are done, with the share of unfinished ones; and the tokens per second of finished ones."""
    done, speeds = 0.0, []
    for seed in seeds:
        path = arm.path(out, seed)
        if not path.exists():
            continue
        run = Run(path)
        if run.complete:
            speeds.append(read_json(path / "summary.json")["tokens_per_second"])
        finished = run.complete or (path / DIVERGED).is_file()
        done += 1.0 if finished else run.step / run.config.training.steps
    return done, speeds


def measure(arms: Sequence[Arm], corpus: Corpus, out: Path, stop: Stop) -> dict[str, float]:
    """Tokens per second of each arm on this device, by ten steps of each; nothing is left of them."""
    arms = [dataclasses.replace(arm, config=definite(arm.config, corpus)[0]) for arm in arms]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock(out, "comparison"):
        return speeds(arms, corpus, out, stop, steps=10, rounds=1)
