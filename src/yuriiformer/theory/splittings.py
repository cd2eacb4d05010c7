"""Splittings of the flow dx/dt = A(x) + M(x): orders of accuracy, the commutator, and the whole-layer integrators."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..splitting import COMPOSING, Splitting
from .statement import Line, Plot, Row, Statement
from .subject import Field, Subject

ORDERS = {"euler": 1, "lie_trotter": 1, "strang": 2}  # with the flows of A and M solved exactly
LAYERS = 3  # looked at, of a model that has more
STEPS = (8, 16, 32, 64)
Substep = Callable[[Field, Tensor], Tensor]


def flow(direction: Field, x: Tensor, steps: int = 2) -> Tensor:
    """Follow dx/dt = direction(x) for one unit of time, by classical Runge-Kutta."""
    h = 1 / steps
    for _ in range(steps):
        k1 = direction(x)
        k2 = direction(x + h / 2 * k1)
        k3 = direction(x + h / 2 * k2)
        k4 = direction(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def step(direction: Field, x: Tensor) -> Tensor:
    """What a layer does: one explicit step."""
    return x + direction(x)


def layers(splitting: Splitting, substep: Substep, oracles: Mapping[str, Field], x: Tensor, h: float, n: int) -> Tensor:
    """n layers of step h, each stage of the splitting's table by `substep`."""
    scaled = {name: lambda z, oracle=oracle: h * oracle(z) for name, oracle in oracles.items()}
    for _ in range(n):
        for stage in splitting.stages:
            x = substep(stage.direction(scaled), x)
    return x


def rate_of_change(oracles: Mapping[str, Field], x: Tensor) -> float:
    """The largest |P' Q| / |Q| for P, Q of the two oracles: in 1 / this much time a direction is another one."""
    asked = oracles.values()
    return max((torch.func.jvp(p, (x,), (q(x),))[1].norm() / q(x).norm()).item() for p in asked for q in asked)


def horizon(oracles: Mapping[str, Field], x: Tensor) -> float:
    """The time to follow, in layers: at most one, and so short that the errors are those of small steps."""
    return min(1.0, 0.5 / rate_of_change(oracles, x))


def fitted_order(steps: tuple[int, ...], errors: list[float]) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def errors_of(
    oracles: Mapping[str, Field], x: Tensor, sub: Mapping[str, Substep], local: bool
) -> dict[str, list[float]]:
    """Relative to the way, the error after one n-th of the horizon (local) or all of it (global), for n in STEPS."""
    time = horizon(oracles, x)

    def both(z: Tensor) -> Tensor:
        return time * (oracles["attn"](z) + oracles["mlp"](z))

    exact = flow(both, x, 2 * STEPS[-1])
    way = (exact - x).norm()
    found: dict[str, list[float]] = {name: [] for name in sub}
    for n in STEPS:
        target = flow(lambda z, n=n: both(z) / n, x, 4) if local else exact  # type: ignore[misc]
        for name, substep in sub.items():
            end = layers(COMPOSING[name], substep, oracles, x, time / n, 1 if local else n)
            found[name].append(((end - target).norm() / way).item())
    return found


EXACT_FLOWS: dict[str, Substep] = {"euler": step, "lie_trotter": flow, "strang": flow}


def splitting_order(subject: Subject) -> Statement:
    rows, curves = [], {}
    for place in subject.one_in(LAYERS).places:
        rows.append(
            Row(f"{place.name}: rate at which the directions change", rate_of_change(place.fields(), place.state))
        )
        for local in (False, True):
            errors = errors_of(place.fields(), place.state, EXACT_FLOWS, local)
            curves[local] = errors
            for name, order in ORDERS.items():
                what = f"{place.name}, {name}: fitted order of the {'local' if local else 'global'} error"
                rows.append(Row(what, fitted_order(STEPS, errors[name]), order + local, 0.1))
    h = [horizon(place.fields(), place.state) / n for n in STEPS]
    return Statement(
        name="splitting_order",
        title="Euler and Lie–Trotter have order 1, Strang has order 2",
        equation="dX/dt = A(X) + M(X), n layers of step h = 1/n;   global error O(hᵖ), local error O(hᵖ⁺¹);   "
        "\nEuler 1 + h(A+M): p = 1,   Lie–Trotter exp(hM) exp(hA): p = 1,   Strang exp(hA/2) exp(hM) exp(hA/2): p = 2",
        claim=f"On real oracles ({subject.title}), with the flow of each part solved exactly, the splittings have their textbook "
        "orders. (Euler has no sub-flows: it is the explicit step along the sum.)",
        notes=[
            "The time followed is one layer, or half of 1 / rate where the directions change faster. A rate above 1 says "
            "that a real layer, h = 1, is a longer step than this theory speaks of."
        ],
        rows=rows,
        plots=[
            Plot(
                f"Last layer looked at. {'One step' if local else 'The whole time in ever smaller steps'}: a straight line of slope "
                f"{'2, 2 and 3' if local else '1, 1 and 2'}; Strang falls away from the other two as the step shrinks.",
                "step h", f"{'local' if local else 'global'} error / length of the way",
                [Line(name, h, curves[local][name], color=i) for i, name in enumerate(ORDERS)], "xy",
            )
            for local in (False, True)
        ],
    )  # fmt: skip


def explicit_substeps(subject: Subject) -> Statement:
    place = subject.places[0]
    errors = errors_of(place.fields(), place.state, dict.fromkeys(ORDERS, step), False)
    rows = [
        Row(f"{place.name}, {name}: fitted order of the global error", fitted_order(STEPS, errors[name]), order, 0.1, should=order == 1)
        for name, order in ORDERS.items()
    ]  # fmt: skip
    h = [horizon(place.fields(), place.state) / n for n in STEPS]
    return Statement(
        name="explicit_substeps",
        title="In a layer, Strang's second order is gone",
        equation="a stage of a layer is x ← x + h O(x), not exp(hO) x: each stage adds an error O(h²) of its own",
        claim="A real layer steps explicitly inside each stage. All three splittings then have order 1: Strang keeps its "
        "symmetry and its price, not its order.",
        rows=rows,
        plots=[
            Plot(
                "The same layer with explicit steps inside the stages: three lines of slope 1. What Strang wins here is at most a constant.",
                "step h", "global error / length of the way",
                [Line(name, h, errors[name], color=i) for i, name in enumerate(ORDERS)], "xy",
            )
        ],
    )  # fmt: skip


def commutator(subject: Subject) -> Statement:
    rows, halves, swaps = [], [], []
    for place in subject.places:
        oracles, x = place.fields(), place.state
        a, m = oracles["attn"], oracles["mlp"]
        bracket = (torch.func.jvp(m, (x,), (a(x),))[1] - torch.func.jvp(a, (x,), (m(x),))[1]) / 2
        h = horizon(oracles, x) / 128
        target = flow(lambda z, a=a, m=m, h=h: h * (a(z) + m(z)), x, 4)  # type: ignore[misc]
        local = (layers(COMPOSING["lie_trotter"], flow, oracles, x, h, 1) - target) / h**2
        rows.append(Row(f"{place.name}: local error of Lie–Trotter / h² against ½ [A, M], relative distance",
                        ((local - bracket).norm() / bracket.norm()).item(), 0, 0.05))  # fmt: skip
        way = (a(x) + m(x)).norm()
        halves.append((bracket.norm() / way).item())
        swapped = step(a, step(m, x))
        swaps.append(((step(m, step(a, x)) - swapped).norm() / way).item())
        rows.append(Row(f"{place.name}: ‖½ [A, M]‖ / ‖A + M‖", halves[-1]))
        rows.append(Row(f"{place.name}: attention first or MLP first, difference / ‖A + M‖", swaps[-1]))
    depth = [float(i + 1) for i in range(len(subject.places))]
    return Statement(
        name="commutator",
        title="What splitting costs: the commutator of attention and MLP",
        equation="exp(hM) exp(hA) x − exp(h(A+M)) x = (h²/2) [A, M](x) + O(h³),   [A, M] = M′A − A′M",
        claim="The leading error of Lie–Trotter is half the commutator. Its size beside the step itself says how much it "
        "matters in a layer that attention comes first.",
        rows=rows,
        plots=[
            Plot(
                f"{subject.title}. Half the commutator beside the step, layer by layer, and what a whole layer (h = 1) changes when "
                "MLP comes first. Far below 1, the splittings hardly differ; near 1 or above, the order of the oracles is part "
                "of the architecture and the small-step picture is only a picture.",
                "layer", "share of the step ‖A + M‖",
                [Line("½ [A, M]", depth, halves), Line("attention first − MLP first", depth, swaps)],
            )
        ],
    )  # fmt: skip


def integrators(subject: Subject) -> Statement:
    """Whole-layer rules on dv = A(x), dx = M(v), by the textbook's claims that they declare."""
    generator = torch.Generator().manual_seed(3)
    w1, w2 = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) / 2
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    steps = (8, 16, 32, 64)

    def kick(x: Tensor) -> Tensor:
        return torch.tanh(w1 @ x)

    def drift(v: Tensor) -> Tensor:
        return torch.sin(w2 @ v)

    both = flow(lambda z: torch.cat([drift(z[6:]), kick(z[:6])]), torch.cat([start, start.flip(0)]), 500)
    rows, lines, skipped = [], [], []
    time, h = 200.0, 0.1
    times = [i * h for i in range(int(time / h))]
    for rule in subject.rules.values():
        if not rule.whole_layer:
            continue
        if rule.textbook is None:
            skipped.append(rule.name)
            continue
        errors = []
        for n in steps:
            order, values = rule.textbook(1 / n)
            x, v = start, start.flip(0)
            for _ in range(n):
                x, v = rule(x, v, kick, drift, lambda y: y, **values)
            errors.append((torch.cat([x, v]) - both).norm().item())
        rows.append(Row(f"{rule.name}: fitted order", fitted_order(steps, errors), order, 0.1))
        # A pendulum: A(x) = -sin x, M(v) = v, energy v^2 / 2 - cos x.
        x, v, energies = torch.tensor(2.0).double(), torch.tensor(0.0).double(), []
        for _ in times:
            energies.append((v**2 / 2 - torch.cos(x)).item())
            x, v = rule(x, v, lambda y: -torch.sin(y), lambda y: y, lambda y: y, **rule.textbook(h)[1])
        off = np.abs(np.array(energies) - energies[0])
        half = len(off) // 2
        rows.append(
            Row(
                f"{rule.name}: energy error in the second half of {time:g} s / in the first",
                off[half:].max() / off[:half].max(),
                1,
                0.1,
            )
        )
        lines.append(Line(rule.name, times[::5], off[::5].clip(1e-9).tolist()))
    z, energies = np.array([2.0, 0.0]), []
    for _ in times:
        energies.append(z[1] ** 2 / 2 - np.cos(z[0]))
        z = z + h * np.array([z[1], -np.sin(z[0])])
    off = np.abs(np.array(energies) - energies[0])
    rows.append(
        Row(
            "an explicit Euler step of both: the same ratio",
            off[len(off) // 2 :].max() / off[: len(off) // 2].max(),
            1,
            0.1,
            should=False,
        )
    )
    lines.append(Line("explicit Euler", times[::5], off[::5].clip(1e-9).tolist(), "dashed"))
    return Statement(
        name="integrators",
        title="The Hamiltonian rules are symplectic integrators of order 1 and 2",
        equation="dv/dt = A(x), dx/dt = M(v) with β = 1, γ = η = h and no norm;   H = v²/2 − cos x",
        claim="Without damping and norm the whole-layer rules solve a Hamiltonian system to their order, and their energy error does not grow.",
        rows=rows,
        plots=[
            Plot(
                f"A pendulum at step {h:g}: the energy errors of the Hamiltonian rules swing and stay where they are; explicit Euler gains energy until the pendulum goes over the top.",
                "time", "energy error", lines, "y",
            )
        ],
        notes=[
            "In a layer β < 1 and the norm is on: the claim is about the rule, not about a trained model.",
            *(f"{name} declares no textbook order (its MLP acts on the position, not the velocity) and is not run here." for name in skipped),
        ],
    )  # fmt: skip


STATEMENTS = (splitting_order, explicit_substeps, commutator, integrators)
