"""Peak memory of training steps beside `training.memory.estimate`, each case in a fresh process.

    python benchmarks/memory.py                       # on a CPU: growth of resident memory
    python benchmarks/memory.py --device cuda         # torch's own count; 124M parameters

Two micro-batches a step, so that gradients stand beside activations. Writes results/memory.json (memory_cuda.json).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from yuriiformer.config import Config, ModelConfig, TrainingConfig, override
from yuriiformer.model import LanguageModel
from yuriiformer.signals import Stop
from yuriiformer.training.device import describe, resolve
from yuriiformer.training.distributed import World
from yuriiformer.training.kernels import attention, fastest_attention
from yuriiformer.training.memory import estimate
from yuriiformer.training.step import Stepper

SIZES = {  # layers, heads, width, context, vocabulary, micro-batch
    "cpu": {"narrow": (4, 3, 96, 128, 1024, 64), "wide": (4, 6, 384, 256, 4096, 8), "head": (2, 4, 128, 128, 50304, 8)},
    "cuda": {"small": (12, 12, 768, 1024, 50304, 16), "larger": (12, 12, 768, 1024, 50304, 48)},
}
VARIANTS = [
    {"training.precision": "fp32", "training.compile": "no"},
    {"training.precision": "bf16", "training.compile": "no"},
    {"training.precision": "bf16", "training.compile": "yes"},
    {"training.precision": "bf16", "training.compile": "yes", "training.streams": "bf16"},
    {"training.precision": "bf16", "training.compile": "yes", "training.loss_chunk": 256},
]


def cases(device: str) -> list[tuple[str, Config]]:
    found = []
    for name, (layers, heads, width, context, vocabulary, micro) in SIZES[device].items():
        for rule in ("gradient_descent", "nesterov"):
            model = ModelConfig(
                rule=rule, layers=layers, heads=heads, width=width, context=context, vocabulary=vocabulary
            )
            training = TrainingConfig(device=device, batch=2 * micro, micro_batch=micro)
            for changes in VARIANTS:
                label = ", ".join(f"{key.split('.')[1]}={value}" for key, value in changes.items())
                found.append((f"{name}, {rule}, {label}", override(Config(model=model, training=training), changes)))
    return found


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(config: Config) -> int:
    """Peak bytes of a step: the weights and optimiser states, counted, and what a step needs beside them, measured."""
    training, _ = resolve(config.training)
    model = LanguageModel(config.model)
    stepper = Stepper(model, training, World(), Stop(), print)
    ids = torch.randint(config.model.vocabulary, (training.batch, config.model.context), device=stepper.device)
    with attention(fastest_attention(config)[0]):
        for step in range(2):  # compiles, makes the states
            stepper(step, (ids, ids))
        stepper.clear()
        gc.collect()
        if training.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            stepper(2, (ids, ids))
            return torch.cuda.max_memory_allocated()
        states = [t for o in stepper.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
        standing = sum(t.nbytes for t in [*states, *model.parameters()])
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        stepper(2, (ids, ids))
        return standing + resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--out", help="- prints; default results/memory.json, or memory_cuda.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = dict(cases(options.device))
    if options.case:
        print(measure(found[options.case]))
        return
    rows = []
    # Large blocks go back to the system at once, so that resident memory is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name, config in found.items():
        if options.only not in name:
            continue
        command = [sys.executable, __file__, "--device", options.device, "--case", name]
        out = subprocess.run(command, env=env, capture_output=True, text=True)
        if out.returncode:
            print(name, out.stderr[-500:])
            continue
        training, _ = resolve(config.training)
        parts = estimate(Config(model=config.model, training=training), training.micro_batch)
        peak, estimated = int(out.stdout.split()[-1]), sum(parts.values())
        rows.append(
            {"case": name, "peak": peak, "estimate": estimated, "ratio": round(estimated / peak, 3), "parts": parts}
        )
        print(f"{name}: peak {peak / 1e6:.0f} MB, {estimated / peak:.3f}", file=sys.stderr, flush=True)
    command = " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]])
    text = json.dumps({"machine": describe(options.device), "command": command, "rows": rows}, indent=1)
    if options.out == "-":
        print(text)
    else:
        default = "results/memory.json" if options.device == "cpu" else "results/memory_cuda.json"
        Path(options.out or default).write_text(text + "\n")


if __name__ == "__main__":
    main()
