"""The page's plots, as SVG text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ["#444444", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442"]  # Okabe and Ito
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "yuriiformer", "font.family": "sans-serif", "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
AXES: dict[str, tuple[str, str]] = {
    "tokens": ("training tokens (millions)", "The same data: what each step is worth."),
    "flops": ("training FLOPs (10¹²)", "The same arithmetic: a rule that asks its oracles more often pays here."),
    "seconds": ("training time (s)", "The same patience: the cost of the second stream shows here."),
}


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _legend_above(axes: Axes, columns: int = 1) -> None:
    """Where no curve can hide it, nor be hidden."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), borderaxespad=0, ncols=columns)


def _svg(size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=size)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'width="[^"]+pt" height="[^"]+pt"', "", svg, count=1)  # the page scales it


def loss_curves(arms: list[dict[str, Any]], against: str) -> str:
    """Validation loss of every run (thin) and of each arm's mean (thick) against tokens, FLOPs or seconds."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, arm in enumerate(arms):
            xs = np.array(
                [
                    _x(arm, tokens, seconds, against)
                    for tokens, seconds in zip(arm["curves"]["tokens"], arm["curves"]["seconds"], strict=True)
                ]
            )
            ys = np.array(arm["curves"]["validation"])
            axes.plot(xs.T, ys.T, color=color(index), lw=0.6, alpha=0.45)
            axes.plot(xs.mean(0), ys.mean(0), color=color(index), lw=2, marker="o", ms=3, label=arm["name"])
        axes.set_xlabel(AXES[against][0])
        axes.set_ylabel("validation loss (nats per token)")
        every = np.concatenate([np.ravel(arm["curves"]["validation"]) for arm in arms])
        last = max(curve[-1] for arm in arms for curve in arm["curves"]["validation"])
        lowest, top = (
            every.min(),
            max(np.quantile(every, 0.9), last + 0.05 * (last - every.min()) + 1e-6),
        )  # the fall at the start would flatten the rest
        axes.set_ylim(lowest - 0.04 * (top - lowest), top)
        _legend_above(axes)

    return _svg((7, 3.8 + 0.22 * len(arms)), draw)


def _x(arm: dict[str, Any], tokens: list[float], seconds: list[float], against: str) -> np.ndarray:
    match against:
        case "tokens":
            return np.array(tokens) / 1e6
        case "flops":
            return np.array(tokens) * arm["flops_per_token"] / 1e12
        case _:
            return np.array(seconds)


def differences(arms: list[dict[str, Any]], baseline: str) -> str:
    """Final loss minus the baseline's: each seed, the mean, the 95 % interval."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        others = [(i, arm) for i, arm in enumerate(arms) if arm["against_baseline"]]
        for row, (index, arm) in enumerate(others):
            test = arm["against_baseline"]
            axes.plot(
                test["differences"], [row + 0.2] * len(test["differences"]), "o", color=color(index), alpha=0.6, ms=5
            )
            axes.plot(test["mean_difference"], row, "D", color=color(index), ms=8)
            if test["low"] is not None:
                axes.plot([test["low"], test["high"]], [row, row], color=color(index), lw=2)
        axes.axvline(0, color="#444444", lw=1)
        axes.set_yticks(range(len(others)), [arm["name"].replace(",", ",\n") for _, arm in others])
        axes.set_ylim(len(others) - 0.4, -0.4)
        axes.set_xlabel(f"final validation loss minus {baseline}'s (nats)")

    return _svg((7, 1.2 + 0.7 * len(arms)), draw)


def gaps(rows: list[dict[str, Any]]) -> str:
    """What each arm's best loss is below the baseline's: ours (filled) and as published (hollow)."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        others = [(i, row) for i, row in enumerate(rows) if row["best_minus_baseline"] is not None]
        for place, (index, row) in enumerate(others):
            said = [p["best_minus_baseline"] for p in row["published"] if p["best_minus_baseline"] is not None]
            axes.plot(said, [place] * len(said), "o", color=color(index), mfc="none", ms=9, mew=1.5)
            axes.plot(row["best_minus_baseline"], place, "D", color=color(index), ms=8)
        axes.plot([], [], "D", color="#444444", label="ours")
        axes.plot([], [], "o", color="#444444", mfc="none", label="published, one for each source")
        axes.axvline(0, color="#444444", lw=1)
        axes.set_yticks(range(len(others)), [row["arm"].replace(",", ",\n") for _, row in others])
        axes.set_ylim(len(others) - 0.4, -0.6)
        axes.set_xlabel("best validation loss minus the baseline's (nats)")
        _legend_above(axes, 2)

    return _svg((7, 1.5 + 0.6 * len(rows)), draw)


def coefficients(arm: dict[str, Any]) -> str:
    """Learned coefficients along depth, a panel for each substep, a line for each seed."""
    layers = np.array([[[list(s.values()) for s in layer] for layer in run] for run in arm["coefficients"]])
    names = list(arm["coefficients"][0][0][0])
    substeps = layers.shape[2]

    def draw(figure: Figure) -> None:
        panels: list[Axes] = list(np.ravel(figure.subplots(1, substeps, sharey=True, squeeze=False)))
        depth = np.arange(1, layers.shape[1] + 1)
        for substep, axes in enumerate(panels):
            for index, name in enumerate(names):
                values = layers[:, :, substep, index]
                axes.plot(depth, values.T, color=color(index + 1), lw=0.6, alpha=0.5)
                axes.plot(depth, values.mean(0), color=color(index + 1), lw=2, marker="o", ms=4, label=name)
            axes.set_xlabel("layer")
            axes.set_xticks(depth)
            axes.annotate(f"substep {substep + 1}", (0.98, 0.02), xycoords="axes fraction", ha="right", color="#777777")
        _legend_above(panels[0], len(names))

    return _svg((7, 3.2), draw)
