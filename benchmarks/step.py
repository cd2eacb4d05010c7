"""Seconds of a training step at the demo's size: our arms, compiled and eager, beside transformers' GPT-2.

    python benchmarks/step.py [--steps 60] [--out results/step.json]

All contestants take turns in one process, so what else the machine does hits them alike. GPT-2 from transformers
is trained as its users do: fp32, AdamW (fused), the same clipping, no compilation.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from yuriiformer import presets
from yuriiformer.config import override
from yuriiformer.model import LanguageModel, flops_per_token
from yuriiformer.training.device import describe, resolve
from yuriiformer.training.optimizer import make_optimizers

VOCABULARY = 1024
ARMS = (presets.BASELINE, presets.DEMO_ARMS[-1])


def ours(arm, compiled, precision):
    config = override(presets.demo(arm), {"model.vocabulary": VOCABULARY})
    model = LanguageModel(config.model)
    if compiled:
        model.compile_parts()

    def loss(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model.loss(ids[:, :-1], ids[:, 1:])

    return stepper(model, make_optimizers(model, config.training), loss), sum(
        flops_per_token(config.model).values()
    ) * 3


def transformers_gpt2():
    m = presets.demo().model
    sizes = {
        "n_embd": m.width,
        "n_layer": m.layers,
        "n_head": m.heads,
        "n_positions": m.context,
        "vocab_size": VOCABULARY,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def loss(ids):
        return model(ids[:, :-1], labels=ids[:, :-1]).loss

    return stepper(model, [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)], loss), None


def stepper(model, optimizers, loss):
    def step(ids):
        started = time.perf_counter()
        loss(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("results/step.json"))
    options = parser.parse_args()
    demo = presets.demo()
    chosen, line = resolve(demo.training)
    contestants = {"transformers GPT-2, fp32, AdamW, eager": transformers_gpt2()}
    for arm in ARMS:
        contestants[f"{arm}, {chosen.precision}, {'compiled' if chosen.compile == 'yes' else 'eager'} (default)"] = (
            ours(arm, chosen.compile == "yes", chosen.precision)
        )
    for arm in ARMS:
        contestants[f"{arm}, {chosen.precision}, eager"] = ours(arm, False, chosen.precision)
        contestants[f"{arm}, fp32, eager"] = ours(arm, False, "fp32")
    ids = torch.randint(0, VOCABULARY, (demo.training.batch, demo.model.context + 1))
    times = {name: [] for name in contestants}
    for step, _ in contestants.values():
        for _ in range(5):
            step(ids)
    for _ in range(options.steps):
        for name, (step, _) in contestants.items():
            times[name].append(step(ids))
    tokens = demo.training.batch * demo.model.context
    reference = np.median(times[next(iter(times))])
    rows = {}
    print(f"{line}; {options.steps} interleaved steps of {tokens} tokens\n")
    print("| contestant | median step (ms) | 10 % to 90 % | tokens/s | against transformers |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        low, middle, high = np.quantile(seconds, [0.1, 0.5, 0.9]) * 1000
        rows[name] = {"ms": middle, "ms_10": low, "ms_90": high, "tokens_per_second": tokens / middle * 1000}
        print(
            f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {tokens / middle * 1000:,.0f} | {reference * 1000 / middle:.2f}x |"
        )
    ratio = {kind: np.median(times[f"{ARMS[1]}, {kind}"]) / np.median(times[f"{ARMS[0]}, {kind}"]) for kind in
             (name.split(", ", 1)[1] for name in times if name.startswith(ARMS[0]))}  # fmt: skip
    for kind, value in ratio.items():
        print(f"\n{ARMS[1]} / {ARMS[0]}, {kind}: {value:.3f}")
    options.out.write_text(
        json.dumps({"machine": describe("cpu"), "steps": options.steps, "rows": rows, "ratio": ratio}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
