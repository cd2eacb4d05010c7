"""Tokens as particles on the sphere that attract each other: under which rule they cluster, and how fast."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rule import Rule, as_streams
from .acceleration import as_oracles
from .statement import Line, Plot, Row, Spheres, Statement, finite
from .subject import Subject

COUNT, SEEDS, BETA = 32, 5, 2.0
NEAR = math.cos(0.1)  # two particles closer than 0.1 rad are linked; all within it of their mean are gathered
STEP = 0.1  # the equal step of all rules
GRID = tuple(0.1 * 2.0**i for i in range(14))  # the steps that each rule may choose from; 0.1 to 819
MOST = 2000


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def attraction(x: Tensor) -> Tensor:
    """The gradient of the energy times a constant: mean_j exp(beta (<x_i, x_j> - 1)) x_j, attention without its Z.

    x: (..., particles, 3) near the unit sphere. Nothing is projected: as in a layer, the norm afterwards does that.
    """
    x = unit(x)
    return (BETA * (x @ x.mT - 1)).exp() @ x / x.shape[-2]


def energy(x: Tensor) -> Tensor:
    """(..., particles, 3) to (...): mean_ij exp(beta (<x_i, x_j> - 1)), 1 when all are one point."""
    return (BETA * (x @ x.mT - 1)).exp().mean((-2, -1))


def clusters(x: Tensor) -> Tensor:
    """(..., particles, 3) to (...): the connected components of near particles. A component of k members counts k times 1/k."""
    reach = (x @ x.mT > NEAR).float()
    for _ in range(math.ceil(math.log2(x.shape[-2]))):
        reach = (reach @ reach > 0).float()
    return (1 / reach.sum(-1)).sum(-1).round()


def start() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return unit(torch.randn(SEEDS, COUNT, 3, generator=generator, dtype=torch.float64))


def move(rule: Rule, x: Tensor, v: Tensor, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """One step with the rule's own initial coefficients, then back to the sphere; the velocity is kept tangent."""
    values = {name: c.default for name, c in rule.coefficients.items()}
    norm = [lambda z: z] if rule.normed else []
    oracles = as_oracles(rule, lambda z: step * attraction(z))
    x, *rest = as_streams(rule(*(x, v)[: len(rule.streams)], *oracles, *norm, **values))
    x = unit(x)
    v = rest[0] if rest else v
    return x, v - (v * x).sum(-1, keepdim=True) * x


def steps_to_one(rule: Rule) -> Tensor:
    """(steps of GRID, seeds): the steps until all particles are gathered, and stay so for ten; inf when not in MOST."""
    steps = torch.tensor(GRID, dtype=torch.float64)[:, None, None, None]
    x = start().expand(len(GRID), -1, -1, -1)
    v = torch.zeros_like(x)
    since = done = torch.full((len(GRID), SEEDS), math.inf)
    for t in range(1, MOST + 11):
        x, v = move(rule, x, v, steps)
        gathered = ((x * unit(x.sum(-2, keepdim=True))).sum(-1) > NEAR).all(-1)
        since = torch.where(gathered, since.clamp(max=t), math.inf)
        done = torch.where(t - since >= 10, done.minimum(since), done)
        if done.isfinite().all():
            break
    return done


def told(steps: Tensor) -> str:
    """Mean and spread of the seeds."""
    return f"{steps.mean():.0f} ± {steps.std():.0f}" if steps.isfinite().all() else f"more than {MOST} in some seed"


@torch.inference_mode()
def clustering(subject: Subject) -> Statement:
    rules = subject.rules
    shown, last = [0, 20, 40, 80, 160, 320], 480
    times = list(range(0, last + 1, 4))
    pictures, energies, counts, curves, rows, notes = [], [], [], [], [], []
    plain = next(name for name, rule in rules.items() if len(rule.streams) == 1)
    steps = {name: steps_to_one(rule) for name, rule in rules.items()}
    for index, (name, rule) in enumerate(rules.items()):
        x = start()
        v, path = torch.zeros_like(x), [x]
        for _ in range(last):
            x, v = move(rule, x, v, STEP)
            path.append(x)
        pictures.append([[[round(c, 3) for c in point] for point in path[t][0].tolist()] for t in shown])
        energies.append(
            Line(name, [float(t) for t in times], [energy(path[t]).mean().item() for t in times], color=index)
        )
        counts.append(
            Line(name, [float(t) for t in times], [clusters(path[t]).mean().item() for t in times], color=index)
        )
        found = steps[name]
        mean = [m if math.isfinite(m) else math.nan for m in found.mean(1).tolist()]
        curves.append(
            Line(name, [g for g, m in zip(GRID, mean, strict=True) if m == m], [m for m in mean if m == m], color=index)
        )
        best = int(found.mean(1).argmin())
        for at, how in ((GRID.index(STEP), "the equal step"), (best, "its best step")):
            rows.append(Row(f"{name}, {how} {GRID[at]:g}: steps to one cluster", finite(found[at].mean().item())))
        notes.append(
            f"{name}: {told(found[GRID.index(STEP)])} steps at {STEP:g}, {told(found[best])} at {GRID[best]:g}, its best"
        )
        if len(rule.streams) > 1:
            gain = (steps[plain][GRID.index(STEP)].mean() / found[GRID.index(STEP)].mean()).item()
            claim: dict[str, Any] = {"expected": 2.0, "relation": ">="} if rule.textbook else {}
            rows.append(Row(f"{name}: steps of {plain} / its own, at the equal step", finite(gain), **claim))
            gain = (steps[plain].mean(1).min() / found[best].mean()).item()
            rows.append(Row(f"{name}: steps of {plain} / its own, each at its best step", finite(gain)))
    return Statement(
        name="clustering",
        title="Tokens cluster, and with momentum in fewer steps",
        equation=f"E(X) = mean exp(β(⟨xᵢ, xⱼ⟩ − 1)) on the sphere, β = {BETA:g}, {COUNT} particles; a step of the rule along η ∇E, then x / |x|",
        claim=f"Particles that attract each other as tokens do end in one cluster (Geshkovski et al. 2023). At one small step, {STEP:g}, momentum gets "
        f"there in less than half of the steps. With the best step for each the gap nearly closes: {plain} with a huge step "
        "is the power method. Those numbers are measured; no theory claims them.",
        rows=rows,
        plots=[
            Spheres(
                f"The same particles (seed 0, η = {STEP:g}) under each rule after the same number of steps; pale ones are behind. The rules with "
                f"momentum have gathered where {plain} has hardly begun.",
                list(rules), shown, pictures,
            ),
            Plot(f"Energy at η = {STEP:g}, mean of the seeds; 1 is one point.", "step", "E", energies),
            Plot("Clusters, mean of the seeds: first many single particles, at the end one.", "step", "clusters", counts, "y"),
            Plot(
                "Steps to one cluster against the step size. On the left, where steps are small as in the theory, the curves stand far apart; on the right "
                "the norm after each step lets any step be huge, and the gap closes.",
                "step η", "steps to one cluster", curves, "xy",
            ),
        ],
        notes=[
            "; ".join(notes) + ".",
            f"Mean ± standard deviation of {SEEDS} seeds. One cluster: all within 0.1 rad of their mean, to stay for ten steps; in the plot clusters "
            f"are what links of at most 0.1 rad join. Steps tried: {', '.join(f'{step:g}' for step in GRID)}. Coefficients are each rule's initial "
            "ones, without the norm of the velocity.",
        ],
    )  # fmt: skip


STATEMENTS = (clustering,)
