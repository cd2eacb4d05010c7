"""A finished comparison as one dictionary: what `comparison.json` holds and the page shows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json
from .statistics import holm, mean, paired


def collect(out: Path) -> dict[str, Any]:
    """Read a comparison's runs. Raises UserError when one is missing or not complete."""
    plan = read_json(out / "plan.json")
    names, diverged = [], {}
    for name in plan["arms"]:
        seeds = [
            s for s in plan["seeds"] if (out / "runs" / f"{plan['slugs'][name]}-seed{s}" / "diverged.json").is_file()
        ]
        if seeds:
            diverged[name] = seeds
        else:
            names.append(name)
    if next(iter(plan["arms"])) in diverged:
        raise UserError(f"the baseline of {out} diverged: there is nothing to compare with. Lower the learning rates.")
    runs = {
        name: [_read_run(out / "runs" / f"{plan['slugs'][name]}-seed{seed}") for seed in plan["seeds"]]
        for name in names
    }
    arms = [
        _arm(name, plan["arms"][name], plan["steps"][name], dict(zip(plan["seeds"], runs[name], strict=True)))
        for name in names
    ]
    final = {arm["name"]: list(arm["final_validation"].values()) for arm in arms}

    against = [paired(final[name], final[names[0]]) for name in names[1:]]
    for test, p in zip(against, holm([test["p_value"] for test in against]), strict=True):
        test["p_value_holm"] = p
    arms[0]["against_baseline"] = None
    for arm, test in zip(arms[1:], against, strict=True):
        arm["against_baseline"] = test

    equal_seconds = min(mean(arm["seconds"]) for arm in arms)
    for arm, name in zip(arms, names, strict=True):
        curves = [run["curve"] for run in runs[name]]
        arm["curves"] = {
            key: [[r[key] for r in curve] for curve in curves] for key in ("tokens", "seconds", "validation")
        }
        arm["validation_at_equal_seconds"] = float(
            np.mean([np.interp(equal_seconds, [r["seconds"] for r in c], [r["validation"] for r in c]) for c in curves])
        )
    pairs = [{"arm": b, "against": a, **paired(final[b], final[a])} for a, b in itertools.combinations(names, 2)]
    return {
        "baseline": names[0],
        "seeds": plan["seeds"],
        "budget": plan["budget"],
        "equal_seconds": equal_seconds,
        "corpus": plan["corpus"],
        "start": plan.get("start"),
        "machine": runs[names[0]][0]["env"],
        "command": plan["command"],
        "verdict": [_verdict(arm, names[0]) for arm in arms[1:]]
        + _against_equal_parameters(arms, pairs)
        + [
            f"{name} diverged with seed {', '.join(map(str, seeds))}: it is left out."
            for name, seeds in diverged.items()
        ],
        "diverged": diverged,
        "arms": arms,
        "pairs": pairs,
    }


def _read_run(path: Path) -> dict[str, Any]:
    if not (path / "summary.json").is_file():
        raise UserError(f"{path} is not complete; run the comparison again to go on.")
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "summary": read_json(path / "summary.json"),
        "env": read_json(path / "env.json"),
        "curve": [r for r in map(json.loads, lines) if "validation" in r],
    }


def _arm(name: str, config: dict[str, Any], steps: int, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One arm; `runs` by seed."""
    model, summaries = config["model"], {str(seed): run["summary"] for seed, run in runs.items()}
    first = next(iter(summaries.values()))
    return {
        "name": name,
        "rule": model["rule"],
        "splitting": model["splitting"],
        "start": model["velocity_start"] if len(first["streams"]) > 1 else None,
        "x0_scale": model["x0_scale"],
        "second_table": model["second_table"],
        "parameters": sum(first["parameters"].values()),
        "parameters_by_part": first["parameters"],
        "flops_per_token": 3 * sum(first["forward_flops_per_token"].values()),
        "forward_flops_by_part": first["forward_flops_per_token"],
        "tokens_per_second": float(np.median([s["tokens_per_second"] for s in summaries.values()])),
        "steps": first["steps"],
        "tokens": first["tokens"],
        "seconds": [s["seconds"] for s in summaries.values()],
        "final_validation": {seed: s["final_validation"] for seed, s in summaries.items()},
        "best_validation": {seed: s["best_validation"] for seed, s in summaries.items()},
        "training_loss": {seed: s["training_loss"] for seed, s in summaries.items()},
        "coefficients": [s["coefficients"] for s in summaries.values()],
        "sample": first["sample"],
        "config": {"model": model, "training": config["training"] | {"steps": steps}},
    }


def _against_equal_parameters(arms: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> list[str]:
    """Momentum from its own tables beside the baseline that has such tables, too: what momentum is worth without them."""
    control = [arm["name"] for arm in arms if arm["second_table"] and arm["start"] is None]
    own = [arm["name"] for arm in arms if arm["start"] == "own" and not arm["second_table"]]
    texts = []
    for pair in pairs:
        for sign, a, b in ((1, pair["arm"], pair["against"]), (-1, pair["against"], pair["arm"])):
            if a in own and b in control:
                text = f"Beside {b}, which has as many input tables: {a} {sign * pair['mean_difference']:+.4f} nats"
                if pair["low"] is not None:
                    low, high = sorted((sign * pair["low"], sign * pair["high"]))
                    text += f" (95 % interval {low:+.4f} to {high:+.4f}, p = {pair['p_value']:.2g}, not adjusted)"
                texts.append(text + ".")
    return texts


def _verdict(arm: dict[str, Any], baseline: str) -> str:
    test = arm["against_baseline"]
    gap, differences = test["mean_difference"], test["differences"]
    side = "below" if gap < 0 else "above"
    same_sign = sum((d < 0) == (gap < 0) for d in differences)
    text = f"{arm['name']} ends {abs(gap):.4f} nats {side} {baseline}, in {same_sign} of {len(differences)} seeds"
    if gap == 0 and not any(differences):
        return f"{arm['name']} ends exactly where {baseline} ends, in every seed."
    if test["p_value"] is None:
        return f"{text}. One seed says nothing about the spread; run more seeds for an interval."
    text += f" (95 % interval {test['low']:+.4f} to {test['high']:+.4f}, p = {test['p_value_holm']:.2g} after Holm)"
    if test["p_value_holm"] < 0.05:
        return f"{text}: a significant {'improvement' if gap < 0 else 'loss'}."
    return f"{text}: not significant."
