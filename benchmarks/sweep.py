"""The learning rates of the demo: the same grid for every arm, on a seed that the comparison does not use.

    python benchmarks/sweep.py --out runs/sweep [--corpus DIR] [further arguments of `yuriiformer compare`]

Writes results/sweep.json and prints a table for each arm.
"""

import itertools
import json
import sys
from pathlib import Path

from yuriiformer.cli import main
from yuriiformer.presets import DEMO_ARMS

MUON, ADAMW = (0.01, 0.02, 0.04), (0.01, 0.02, 0.04)
SEED = 100


def sweep(arguments: list[str]) -> int:
    out = Path(arguments[arguments.index("--out") + 1])
    arms = [f"{a},muon_lr={m},adamw_lr={w}" for a, m, w in itertools.product(DEMO_ARMS, MUON, ADAMW)]
    if code := main(["compare", *arms, *arguments, "--seeds", "1", "--set", f"training.seed={SEED}"]):
        return code
    comparison = json.loads((out / "comparison.json").read_text())
    loss = {arm["name"]: arm["final_validation"][str(SEED)] for arm in comparison["arms"]}
    record = {key: comparison[key] for key in ("seeds", "budget", "corpus", "machine", "command")}
    Path("results/sweep.json").write_text(json.dumps(record | {"final_validation": loss}, indent=1) + "\n")
    for arm in DEMO_ARMS:
        print(
            f"\n| {arm}: Muon | " + " | ".join(f"AdamW {w}" for w in ADAMW) + " |\n" + "|---" * (len(ADAMW) + 1) + "|"
        )
        for m in MUON:
            print(f"| {m} | " + " | ".join(f"{loss[f'{arm},muon_lr={m},adamw_lr={w}']:.4f}" for w in ADAMW) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(sweep(sys.argv[1:]))
