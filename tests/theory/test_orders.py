"""The orders of the splittings and of the whole-layer methods, by the fitted slope of the error."""

import math

import numpy as np
import pytest
import torch

from yuriiformer.rule import all_rules
from yuriiformer.splitting import COMPOSING, Splitting

STEPS = (8, 16, 32, 64)
generator = torch.Generator().manual_seed(3)
W1, W2 = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) / 2
START = torch.randn(6, generator=generator, dtype=torch.float64)


def attention(x):
    return torch.tanh(W1 @ x)


def mlp(x):
    return torch.sin(W2 @ x)


def flow(direction, x, steps=20):
    """Follow dx/dt = direction(x) for one unit of time, by classical Runge-Kutta: exact beside the errors we fit."""
    h = 1 / steps
    for _ in range(steps):
        k1 = direction(x)
        k2 = direction(x + h / 2 * k1)
        k3 = direction(x + h / 2 * k2)
        k4 = direction(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def integrate(splitting: Splitting, substep, n: int):
    """n layers of step 1/n, each stage of the table by `substep(direction, x)`."""
    oracles = {"attn": lambda x: attention(x) / n, "mlp": lambda x: mlp(x) / n}
    x = START
    for _ in range(n):
        for stage in splitting.stages:
            x = substep(stage.direction(oracles), x)
    return x


def slope(errors):
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


EXACT = flow(lambda x: attention(x) + mlp(x), START, steps=2000)


def gradient_step(direction, x):
    return all_rules()["gradient_descent"](x, direction)


@pytest.mark.parametrize(
    ("name", "substep", "order"),
    [("euler", gradient_step, 1), ("lie_trotter", flow, 1), ("strang", flow, 2)],
)
def test_order_of_the_splitting(name, substep, order):
    """Euler's sum by an explicit step; Lie-Trotter and Strang by exact sub-flows, which leaves the splitting error alone."""
    errors = [(integrate(COMPOSING[name], substep, n) - EXACT).norm().item() for n in STEPS]
    assert abs(slope(errors) - order) < 0.1


@pytest.mark.parametrize("name", COMPOSING)
def test_with_gradient_descent_inside_every_splitting_has_order_one(name):
    """What a real layer does: the explicit Euler step inside a stage limits Strang, too."""
    errors = [(integrate(COMPOSING[name], gradient_step, n) - EXACT).norm().item() for n in STEPS]
    assert abs(slope(errors) - 1) < 0.1


@pytest.mark.parametrize(("name", "order"), [("symplectic_euler", 1), ("verlet", 2)])
def test_order_of_the_whole_layer_methods(name, order):
    """On dv = A(x), dx = M(v), without damping and norm."""

    def run(n):
        x, v = START, START.flip(0)
        for _ in range(n):
            x, v = all_rules()[name](x, v, attention, mlp, lambda y: y, beta=1.0, gamma=1 / n, eta=1 / n)
        return torch.cat([x, v])

    both = flow(lambda z: torch.cat([mlp(z[6:]), attention(z[:6])]), torch.cat([START, START.flip(0)]), steps=2000)
    errors = [(run(n) - both).norm().item() for n in STEPS]
    assert abs(slope(errors) - order) < 0.1


def test_imex_corrections_contract_towards_the_implicit_solution():
    """Each correction shrinks the residual of v = p + gamma M(x + v) by about gamma Lip(M)."""
    gamma, x, v = 0.1, START, START.flip(0)

    def residual(k):
        moved, new = all_rules()["imex"](x, v, attention, mlp, lambda y: y, mu=0.5, beta=0.9, gamma=gamma, k=k)
        p = 0.9 * v + gamma * attention(x + 0.5 * v)
        torch.testing.assert_close(moved, x + new)
        return (new - p - gamma * mlp(x + new)).norm().item()

    rate = gamma * torch.linalg.matrix_norm(W2, 2).item()
    assert residual(2) <= rate * residual(1)
    assert residual(1) < rate**2 * math.sqrt(6) * 2
