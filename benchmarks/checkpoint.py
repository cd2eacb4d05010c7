"""What a checkpoint costs at GPT-2's small size: how long training waits for it, and how long the thread beside it writes.

    python benchmarks/checkpoint.py --out results/checkpoint.json

The share of wall time is for a checkpoint every `--interval` steps of 491,520 tokens at `--speed` tokens/s: the speed is
an assumption, the seconds are measured here. On a GPU the copy goes over its bus instead; run it there, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from yuriiformer.config import ModelConfig, TrainingConfig
from yuriiformer.model import LanguageModel
from yuriiformer.training.checkpoint import Progress, Writer, snapshot
from yuriiformer.training.device import describe
from yuriiformer.training.optimizer import make_optimizers

TOKENS_PER_STEP = 480 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interval", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--speed", type=float, default=450_000, help="tokens/s of training, assumed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    config = ModelConfig(rule="nesterov", layers=12, heads=12, width=768, context=1024, vocabulary=50304)
    model = LanguageModel(config).to(options.device)
    optimizers = make_optimizers(model, TrainingConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

    waits, writes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, Writer(Path(folder), 2, True, print) as writer:
        for step in range(1, options.rounds + 1):
            started = time.perf_counter()
            writer.submit(Progress(step), None, snapshot(model, optimizers))
            waits.append(time.perf_counter() - started)
            writer.finish()
            writes.append(time.perf_counter() - started)
        size = sum(f.stat().st_size for f in (Path(folder) / f"step_{step}").iterdir())

    between = options.interval * TOKENS_PER_STEP / options.speed
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "training_waits_seconds": [round(s, 3) for s in waits],
        "written_after_seconds": [round(s, 3) for s in writes],
        "assumed": {"interval": options.interval, "tokens_per_second": options.speed, "seconds_between": between},
        "share_of_wall_time": statistics.median(waits) / between,
        **describe(options.device),
    }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
