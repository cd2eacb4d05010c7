"""Tokens a second of greedy decoding: ours, transformers' generate on the same weights, and recomputing the prefix.

    python benchmarks/generation.py                              # the demo's size, on a CPU
    python benchmarks/generation.py --size small --device cuda   # 124M, bf16

All ways in one process, by turns; medians of `--rounds`. Writes results/generation.json (or generation_SIZE.json).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers

from yuriiformer.config import ModelConfig, as_dict
from yuriiformer.generate import generate_batch
from yuriiformer.huggingface import YuriiFormerConfig, YuriiFormerForCausalLM
from yuriiformer.model import LanguageModel
from yuriiformer.presets import BASELINE
from yuriiformer.training.device import describe

SIZES = {
    "demo": {"layers": 4, "heads": 3, "width": 96, "context": 320, "vocabulary": 1024},
    "small": {"layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50304},
}
PROMPT, TOKENS = 192, 128  # so that the text has 256 tokens in the middle


def ways(rule: str, size: dict[str, int], batch: int, device: str) -> dict[str, Callable[[], list[list[int]]]]:
    core = LanguageModel(ModelConfig(rule=rule, **size))
    hf = YuriiFormerForCausalLM(YuriiFormerConfig(model=as_dict(core.config))).eval()
    hf.model.core.load_state_dict(core.state_dict())
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    core, hf = core.to(device, dtype), hf.to(device, dtype)
    prompts = torch.randint(size["vocabulary"], (batch, PROMPT), generator=torch.Generator().manual_seed(0))

    def ours(**how: bool) -> Callable[[], list[list[int]]]:
        steps = lambda: generate_batch(core, prompts.tolist(), tokens=TOKENS, temperature=0, **how)  # noqa: E731
        return lambda: [list(row) for row in zip(*steps(), strict=True)]

    def theirs() -> list[list[int]]:
        ids = prompts.to(device)
        out = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        return out[:, PROMPT:].tolist()

    return {
        "recomputed": ours(use_cache=False),
        "cached": ours(),
        "compiled": ours(compiled=True),
        "transformers": theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args()
    rows = []
    for batch in options.batches:
        timed = {(rule, way): run for rule in (BASELINE, "nesterov")
                 for way, run in ways(rule, SIZES[options.size], batch, options.device).items()}  # fmt: skip
        speeds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
        texts = {key: run() for key, run in timed.items()}  # compiles and warms up
        for _ in range(options.rounds):
            for key, run in timed.items():
                if key[1] == "recomputed" and batch > 1 and speeds[key]:
                    continue  # a minute each, and far from any limit
                started = time.perf_counter()
                run()
                speeds[key].append(batch * TOKENS / (time.perf_counter() - started))
        for (rule, way), values in speeds.items():
            values.sort()
            rows.append({
                "batch": batch, "rule": rule, "way": way, "tokens_per_second": round(values[len(values) // 2], 1),
                "lowest": round(values[0], 1), "highest": round(values[-1], 1),
                "same_tokens_as_cached": texts[rule, way] == texts[rule, "cached"],
            })  # fmt: skip
            print(rows[-1], flush=True)
    result = {
        "size": SIZES[options.size], "prompt": PROMPT, "tokens": TOKENS, "rounds": options.rounds,
        "machine": describe(options.device) | {"transformers": transformers.__version__}, "rows": rows,
    }  # fmt: skip
    name = "generation" if options.size == "demo" else f"generation_{options.size}"
    Path(f"results/{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
