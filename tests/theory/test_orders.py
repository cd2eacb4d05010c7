"""The orders of the splittings on two simple fields, and what imex's corrections do. Real oracles: test_statements."""

import math

import pytest
import torch

from yuriiformer.rule import all_rules
from yuriiformer.splitting import COMPOSING
from yuriiformer.theory.splittings import fitted_order, flow, layers, step

STEPS = (8, 16, 32, 64)
generator = torch.Generator().manual_seed(3)
W1, W2 = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64) / 2
START = torch.randn(6, generator=generator, dtype=torch.float64)


def attention(x):
    return torch.tanh(W1 @ x)


def mlp(x):
    return torch.sin(W2 @ x)


ORACLES = {"attn": attention, "mlp": mlp}
EXACT = flow(lambda x: attention(x) + mlp(x), START, steps=2000)


def rule_step(direction, x):
    return all_rules()["gradient_descent"](x, direction)


def test_the_reference_is_a_flow():
    """Against the closed solution of a linear field, and order 4 in the number of steps."""
    exact = torch.linalg.matrix_exp(W1) @ START
    errors = [(flow(lambda x: W1 @ x, START, n) - exact).norm().item() for n in (4, 8, 16)]
    assert fitted_order((4, 8, 16), errors) == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize(
    ("name", "substep", "order"),
    [("euler", step, 1), ("lie_trotter", flow, 1), ("strang", flow, 2), *((name, rule_step, 1) for name in COMPOSING)],
)
def test_order_of_the_splitting(name, substep, order):
    """With exact sub-flows the splitting error alone is left; a rule's explicit step inside a stage limits Strang, too."""
    ends = [layers(COMPOSING[name], substep, ORACLES, START, 1 / n, n) for n in STEPS]
    assert fitted_order(STEPS, [(end - EXACT).norm().item() for end in ends]) == pytest.approx(order, abs=0.1)


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
