"""Every rule as an optimiser: the very function that is a layer, run on functions whose rates are in the textbooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rule import UNIT, Rule, as_streams
from .statement import Line, Plot, Row, Statement
from .subject import Field, Subject

KAPPAS = (10.0, 100.0, 1e3, 1e4, 1e5)
POWER = 0.05  # the weight of curvature l in the convex function's start, l^(POWER - 1): near the worst case, POWER = 0


def optimise(
    rule: Rule, descent: Field, x: Tensor, values: Mapping[str, Any], momentum: int = 0
) -> Generator[Tensor, bool | None, None]:
    """The iterates x_0, x_1, ... of a rule whose oracle is the descent direction, without the norm, from v = 0.

    values: coefficients over the rule's own. momentum: if not 0, those in (0, 1) are t/(t+3) from t = momentum on; a
    caller who sends True into the generator restarts them, with v = 0.
    """
    v = torch.zeros_like(x)
    oracles = as_oracles(rule, descent)
    norm = [lambda z: z] if rule.normed else []
    coefficients = {name: c.default for name, c in rule.coefficients.items()} | dict(values)
    scheduled = [name for name, c in rule.coefficients.items() if c.range is UNIT] if momentum else []
    t = momentum
    while True:
        if (yield x):
            v, t = torch.zeros_like(x), momentum
        for name in scheduled:
            coefficients[name] = t / (t + 3)
        t += 1
        x, *rest = as_streams(rule(*(x, v)[: len(rule.streams)], *oracles, *norm, **coefficients))
        v = rest[0] if rest else v


def as_oracles(rule: Rule, descent: Field) -> list[Field]:
    """What a rule asks. A whole-layer rule with a textbook's order is a Hamiltonian one: attention is its force, and the
    MLP of the velocity is the velocity. Any other takes half of the descent direction from each."""
    if not rule.whole_layer:
        return [descent]
    return [descent, lambda v: v] if rule.textbook else [lambda z: descent(z) / 2] * 2


UNCLAIMED = (
    "A rule that declares no rate runs with its own initial coefficients: measured, and nothing is claimed. Whole-layer rules "
    "that declare an order read attention as the force and the MLP of the velocity as the velocity; others take half of the "
    "gradient from each oracle."
)


def textbook(rule: Rule, kappa: float) -> tuple[float | None, Mapping[str, float]]:
    """The promised factor a step and its coefficients; without a promise, the rule's own initial values."""
    if rule.textbook is None or rule.whole_layer:
        return None, {}
    return rule.textbook(kappa**-0.5)


def slope(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.polyfit(x, y, 1)[0])


def thinned(count: int) -> list[int]:
    """About 150 indices below count, dense at the start."""
    return sorted({0, *np.unique(np.geomspace(1, count, 150).astype(int) - 1).tolist(), count - 1})


def rates(subject: Subject) -> Statement:
    steps, size = 20_000, 40
    curvature = torch.stack([torch.linspace(1 / k, 1, size, dtype=torch.float64) for k in KAPPAS])  # L = 1
    rows, plots = [], []
    fitted_lines, paths, path_kappa = [], [], 1e3
    for index, (name, rule) in enumerate(subject.rules.items()):
        promises = [textbook(rule, k) for k in KAPPAS]
        values = {key: torch.tensor([p[1][key] for p in promises]).double()[:, None] for key in promises[0][1]}
        errors = np.empty((steps + 1, len(KAPPAS)))
        iterates = optimise(rule, lambda x: -curvature * x, torch.ones_like(curvature), values)
        with torch.inference_mode():
            for t, x in zip(range(steps + 1), iterates, strict=False):
                errors[t] = x.norm(dim=1).numpy()
        exponents = []
        for column, (kappa, (promise, _)) in enumerate(zip(KAPPAS, promises, strict=True)):
            alive = int((errors[:, column] > 1e-250).cumprod().sum())  # until float64 ends
            late = np.arange(alive // 2, alive)
            exponents.append(-slope(late, np.log(errors[late, column])))
            what = f"{name}, κ = {kappa:g}: −log of the factor a step"
            if promise is None:
                rows.append(Row(what, exponents[-1]))
            else:
                rows.append(Row(what, exponents[-1], -math.log(promise), -0.1 * math.log(promise)))
        fitted_lines.append(Line(name, list(KAPPAS), exponents, color=index))
        if promises[0][0] is not None:
            fitted_lines.append(Line("", list(KAPPAS), [-math.log(p[0]) for p in promises if p[0]], "dots", 0))
        shown = [i for i in thinned(steps) if errors[i, KAPPAS.index(path_kappa)] > 1e-14]
        paths.append(
            Line(
                name,
                [float(i) for i in shown],
                [errors[i, KAPPAS.index(path_kappa)] / size**0.5 for i in shown],
                color=index,
            )
        )
    plots = [
        Plot(
            "The exponent of each rule against the condition number, theory dotted. Gradient descent falls with slope −1, the "
            "momentum rules with slope −½: at κ = 10⁵ that is hundreds of times fewer steps. "
            "Momentum that is not tuned to κ gains a constant and falls with −1 in the end.",
            "condition number κ", "−log of the factor a step", fitted_lines, "xy",
        ),
        Plot(
            f"The error itself at κ = {path_kappa:g}. A bend downwards is where the linear rate takes over: momentum first overshoots.",
            "iteration", "‖x‖ / ‖x₀‖", paths, "xy",
        ),
    ]  # fmt: skip
    return Statement(
        name="rates",
        title="On quadratics the rules have their textbook rates: κ becomes √κ",
        equation="f(x) = ½ xᵀHx, m ≤ H ≤ L, κ = L/m, s = 1/√κ, oracle −∇f/L.   Factor on the error in a step: gradient descent 1 − s²,   "
        "Polyak (1 − s)/(1 + s),   Nesterov 1 − s,   triple momentum 1 − s (on f: (1 − s)²)",
        claim="With the coefficients that its file declares, each rule converges linearly at the rate that its file declares, "
        "from condition number 10 to 100,000.",
        rows=rows, plots=plots,
        notes=[
            UNCLAIMED,
            "Triple momentum is made for the worst strongly convex function, where 1 − s is the best known; on quadratics Polyak's is the best.",
        ],
    )  # fmt: skip


def power_spectrum() -> tuple[Tensor, Tensor]:
    """Curvatures and a start for a convex, not strongly convex quadratic."""
    curvature = torch.logspace(-11, 0, 400, dtype=torch.float64)
    return curvature, curvature ** (POWER / 2)  # squared, times d log l: the weight l^(POWER - 1) dl


def values_along(iterates: Iterator[Tensor], f: Callable[[Tensor], Tensor], steps: int) -> np.ndarray:
    with torch.inference_mode():
        return np.array([f(x).item() for _, x in zip(range(steps + 1), iterates, strict=False)])


def sublinear(subject: Subject) -> Statement:
    steps = 4000
    curvature, start = power_spectrum()

    def f(x: Tensor) -> Tensor:
        return (curvature * x**2).sum() / 2

    rows, lines, failing = [], [], []
    late = np.arange(steps // 20, steps)
    for index, (name, rule) in enumerate(subject.rules.items()):
        found = values_along(optimise(rule, lambda x: -curvature * x, start, {}, momentum=1), f, steps)
        exponent = slope(np.log(late), np.log(found[late]))
        has_momentum = any(c.range is UNIT for c in rule.coefficients.values())
        expected = (-2 if has_momentum else -1) * (1 + POWER)
        what = f"{name}: exponent of f − f* in t"
        if rule.textbook:
            rows.append(Row(what, exponent, expected, 0.1 * abs(expected)))
        else:
            rows.append(Row(what, exponent))
        shown = [i for i in thinned(steps) if i]
        lines.append(Line(name, [float(i) for i in shown], (found[shown] / found[0]).tolist(), color=index))
        promise, values = textbook(rule, 100)
        if promise:
            tuned = values_along(optimise(rule, lambda x: -curvature * x, start, values), f, steps)
            rate = -slope(late[len(late) // 2 :], np.log(tuned[late[len(late) // 2 :]]))
            rows.append(
                Row(f"{name} tuned for κ = 100: −log of the factor on f a step, at least as promised", rate,
                    -2 * math.log(promise), -0.2 * math.log(promise), ">=", should=False)
            )  # fmt: skip
            failing.append(Line(name, [float(i) for i in shown], (tuned[shown] / tuned[0]).tolist(), color=index))
            early = [i for i in shown if promise ** (2 * i) > 1e-9]
            failing.append(Line("", [float(i) for i in early], [promise ** (2 * i) for i in early], "dots", index))
    return Statement(
        name="sublinear",
        title="Without strong convexity: 1/t becomes 1/t²",
        equation=f"f(x) = ½ Σ λ x², λ down to 0, start x₀² ~ λ^(ε−1) dλ, ε = {POWER:g}: gradient descent f − f* ~ t^−(1+ε), "
        "with momentum t/(t+3) f − f* ~ t^−2(1+ε)",
        claim="With Nesterov's schedule the momentum rules reach the exponent 2 of the optimal method, gradient descent 1. The "
        "coefficients tuned for strong convexity keep no promise here: there is no linear rate.",
        rows=rows,
        plots=[
            Plot("Straight lines of slope −1 and −2: momentum squares the time's worth.",
                 "iteration", "(f − f*) / (f₀ − f*)", lines, "xy"),
            Plot("The same function with coefficients tuned for a κ = 100 that it does not have: the promised linear rates (dotted) fall away, "
                 "the real ones stay sublinear.", "iteration", "(f − f*) / (f₀ − f*)", failing, "xy"),
        ],
        notes=[
            "On a spectrum like this Polyak's rule with t/(t+3) has Nesterov's exponent: both follow x″ + (3/t) x′ + ∇f = 0. "
            "The worst-case guarantee over all convex functions is Nesterov's alone.", UNCLAIMED,
        ],
    )  # fmt: skip


def restart(subject: Subject) -> Statement:
    kappa, target, most = 1e4, 1e-10, 30_000
    curvature = torch.logspace(-math.log10(kappa), 0, 40, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (curvature * x**2).sum() / 2

    def until(rule: Rule, values: Mapping[str, float], momentum: int, restarting: bool) -> list[float]:
        iterates = optimise(rule, lambda x: -curvature * x, torch.ones_like(curvature), values, momentum)
        found = [f(next(iterates)).item()]
        again = False
        with torch.inference_mode():
            while found[-1] > target * found[0] and len(found) <= most:
                found.append(f(iterates.send(again or None)).item())
                again = restarting and found[-1] > found[-2]
        return found

    rows, lines, index = [], [], 0
    for name, rule in subject.rules.items():
        if textbook(rule, kappa)[0] is None or len(rule.streams) == 1:
            continue
        paths = {
            "t/(t+3)": until(rule, {}, 1, False),
            "t/(t+3), restarted": until(rule, {}, 1, True),
            "told κ": until(rule, textbook(rule, kappa)[1], 0, False),
        }
        steps = {how: len(path) - 1 for how, path in paths.items()}
        for how, count in steps.items():
            rows.append(Row(f"{name}, {how}: steps to {target:g} of f₀", count))
        rows.append(
            Row(
                f"{name}: restarted / not restarted, in steps",
                steps["t/(t+3), restarted"] / steps["t/(t+3)"],
                0.5,
                0,
                "<=",
            )
        )
        rows.append(
            Row(f"{name}: restarted / told κ, in steps", steps["t/(t+3), restarted"] / steps["told κ"], 4, 0, "<=")
        )
        for how, path in paths.items():
            shown = list(range(0, min(len(path), 2501), 5))
            style: Any = {"t/(t+3)": "dots", "t/(t+3), restarted": "solid", "told κ": "dashed"}[how]
            lines.append(
                Line(
                    name if how == "t/(t+3), restarted" else "",
                    [float(i) for i in shown],
                    [path[i] / path[0] for i in shown],
                    style,
                    index + 1,
                )
            )
        index += 1
    return Statement(
        name="restart",
        title="Adaptive restart finds the linear rate without being told κ",
        equation="momentum t/(t+3); whenever f rises, t ← 1 and v ← 0 (O'Donoghue, Candès 2015)",
        claim=f"On a quadratic of κ = {kappa:g} the schedule alone ripples and is slow; with restarts it is linear and within a small factor "
        "of the rule that knows κ.",
        rows=rows,
        plots=[
            Plot("Dotted: too much momentum goes round the minimum in waves (the first 2,500 steps of them). Solid: every wave is "
                 "cut at its start, nearly a straight line on this axis. Dashed: the rule that was told κ.", "iteration", "f / f₀", lines, "y")
        ],
        notes=["Depth does not restart in the paper's models: a learned μ or β near 0 in some layer would be a restart."],
    )  # fmt: skip


def beyond_quadratics(subject: Subject) -> Statement:
    m, big = 1.0, 25.0

    def slope_of(x: Tensor) -> Tensor:  # Lessard, Recht, Packard (2016), equation 4.11
        return torch.where(x < 1, 25 * x, torch.where(x < 2, x + 24, 25 * x - 24))

    rows, lines, steps = [], [], 300
    for index, (name, rule) in enumerate(subject.rules.items()):
        promise, values = textbook(rule, big / m)
        if promise is None:
            continue
        start = torch.tensor([3.3]).double()
        path = [
            x.item()
            for _, x in zip(range(steps + 1), optimise(rule, lambda x: -slope_of(x) / big, start, values), strict=False)
        ]
        rows.append(Row(f"{name}: |x| after {steps} steps from 3.3", abs(path[-1])))
        lines.append(Line(name, [float(i) for i in range(31)], path[:31], color=index))
    return Statement(
        name="beyond_quadratics",
        title="Tuned on quadratics, a rule can cycle for ever on another convex function",
        equation="f′(x) = 25x for x < 1,   x + 24 for 1 ≤ x < 2,   25x − 24 for x ≥ 2;   1 ≤ f″ ≤ 25 (Lessard, Recht, Packard 2016)",
        claim="A rate on quadratics would hold on every strongly convex function with the same m and L. It does not: a rule that never arrives.",
        rows=[
            *rows,
            Row("number of rules that do not arrive", sum(row.number is not None and row.number > 1e-6 for row in rows), 0, 0, should=False),
        ],
        plots=[
            Plot("Polyak's heavy ball, the fastest on quadratics, comes to cycle through the same three points; the others go to 0.", "iteration", "x", lines)
        ],
    )  # fmt: skip


def other_functions(subject: Subject) -> Statement:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(200, 20, generator=generator, dtype=torch.float64) * torch.logspace(
        -1, 0, 20, dtype=torch.float64
    )
    labels = torch.sign(
        data @ torch.randn(20, generator=generator, dtype=torch.float64)
        + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64)
    )
    m = 1e-4
    big = (torch.linalg.eigvalsh(data.T @ data / 200)[-1] / 4 + m).item()

    def logistic(w: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-labels * (data @ w)).mean() + m / 2 * (w @ w)

    def logistic_descent(w: Tensor) -> Tensor:
        return data.T @ (labels * torch.sigmoid(-labels * (data @ w))) / 200 / big - m / big * w

    def rosenbrock(z: Tensor) -> Tensor:
        return (1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2

    def rosenbrock_descent(z: Tensor) -> Tensor:
        x, y = z.unbind()
        return -torch.stack([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)]) / 4000

    best = torch.zeros(20, dtype=torch.float64)
    for _ in range(12):  # Newton's method knows the minimum to rounding
        hessian = torch.func.hessian(logistic)(best)
        best = best + torch.linalg.solve(hessian, big * logistic_descent(best))
    least = logistic(best).item()

    rows, plots = [], []
    for title, f, descent, start, lowest, steps in (
        ("logistic regression", logistic, logistic_descent, torch.zeros(20).double(), least, 2000),
        ("Rosenbrock's valley", rosenbrock, rosenbrock_descent, torch.tensor([-1.2, 1.0]).double(), 0.0, 4000),
    ):
        lines = []
        for index, (name, rule) in enumerate(subject.rules.items()):
            promise, values = textbook(rule, big / m if lowest else 2500.0)
            found = values_along(optimise(rule, descent, start, values), f, steps) - lowest
            arrived = np.flatnonzero(found < 1e-8)
            rows.append(
                Row(
                    f"{title}, {name}: steps to f − f* < 1e−8, of {steps:,}",
                    float(arrived[0]) if len(arrived) else None,
                )
            )
            if lowest and promise:  # the promise is an upper bound on the factor; Polyak's is one near the minimum only
                late = np.flatnonzero(found > 1e-11)
                late = late[len(late) // 2 :]
                rows.append(
                    Row(
                        f"{title}, {name}: −log of the factor on f a step, at least as promised",
                        -slope(late, np.log(found[late])),
                        -2 * math.log(promise),
                        -0.2 * math.log(promise),
                        ">=",
                    )
                )
            shown = [i for i in thinned(steps) if 1e-14 < found[i] < 1e6]
            lines.append(Line(name, [float(i) for i in shown], found[shown].tolist(), color=index))
        see = (
            "Convex, with a condition number in the thousands, flatter than a quadratic far out: the order of the rules is nearly that of the quadratics."
            if lowest
            else "Not convex: a curved, narrow valley. No theorem covers it; momentum still goes along it in a fraction of the steps."
        )
        plots.append(Plot(f"{title}. {see}", "iteration", "f − f*", lines, "xy"))
    return Statement(
        name="other_functions",
        title="Beyond quadratics: logistic regression and a non-convex valley",
        equation=f"mean log(1 + exp(−y ⟨a, w⟩)) + m/2 |w|², κ = {big / m:,.0f};   (1 − x)² + 100 (y − x²)² with a step of 1/4000",
        claim="On a strongly convex function that is no quadratic each rule is at least as fast as promised; on a non-convex one nothing is "
        "promised, and the steps are counted.",
        rows=rows, plots=plots, notes=[UNCLAIMED],
    )  # fmt: skip


STATEMENTS = (rates, sublinear, restart, beyond_quadratics, other_functions)
