"""The momentum rules on a quadratic are the textbook recursions, with the coefficients that their files declare."""

import pytest
import torch

from yuriiformer.rule import all_rules

KAPPA = 50.0
H = torch.diag(torch.linspace(1 / KAPPA, 1, 6, dtype=torch.float64))
START = torch.arange(1.0, 7.0, dtype=torch.float64)
N = 60


def gradient(x):
    return H @ x


def ours(name, **coefficients):
    x, v, path = START, torch.zeros_like(START), []
    for _ in range(N):
        x, v = all_rules()[name](x, v, lambda y: -gradient(y), lambda y: y, **coefficients)
        path.append(x)
    return torch.stack(path)


def two_term(alpha, beta, look):
    """x_{t+1} = x_t + beta (x_t - x_{t-1}) - alpha grad(x_t + look (x_t - x_{t-1})): Polyak (look 0), Nesterov (look beta)."""
    before, x, path = START, START, []
    for _ in range(N):
        difference = x - before
        before, x = x, x + beta * difference - alpha * gradient(x + look * difference)
        path.append(x)
    return torch.stack(path)


def declared(name):
    return all_rules()[name].textbook(KAPPA**-0.5)


def test_heavy_ball_is_polyaks():
    """Polyak (1964): alpha = 4 / (sqrt(L) + sqrt(m))^2, beta = ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^2."""
    alpha, beta = 4 / (1 + KAPPA**-0.5) ** 2, ((KAPPA**0.5 - 1) / (KAPPA**0.5 + 1)) ** 2
    path = ours("heavy_ball", **declared("heavy_ball")[1])
    torch.testing.assert_close(path, two_term(alpha, beta, 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours("heavy_ball", beta=0.7, gamma=0.4), two_term(0.4, 0.7, 0.0), rtol=0, atol=1e-12)


def test_nesterov_is_the_two_sequence_form():
    alpha, beta = 1.0, (KAPPA**0.5 - 1) / (KAPPA**0.5 + 1)
    x, y, path = START, START, []
    for _ in range(N):
        new = y - alpha * gradient(y)
        x, y = new, new + beta * (new - x)
        path.append(x)
    torch.testing.assert_close(ours("nesterov", **declared("nesterov")[1]), torch.stack(path), rtol=0, atol=1e-12)


def test_triple_momentum_has_its_coefficients():
    """Van Scoy, Freeman and Lynch (2018): the recursion in xi."""
    rho = 1 - KAPPA**-0.5
    alpha, beta, look = 1 + rho, rho**2 / (2 - rho), rho**2 / ((1 + rho) * (2 - rho))
    promise, values = declared("triple_momentum")
    path = ours("triple_momentum", **values, nu=1.0)
    torch.testing.assert_close(path, two_term(alpha, beta, look), rtol=0, atol=1e-12)
    assert promise == pytest.approx(rho)


@pytest.mark.parametrize("nu", [0.5, 2.0])
def test_triple_momentums_move_is_a_change_of_variables(nu):
    """(gamma, nu) and (gamma nu, 1) move alike when the look-ahead counts in moved velocity."""
    mu, beta, gamma = 0.6, 0.8, 0.3
    left = ours("triple_momentum", mu=mu * nu, beta=beta, gamma=gamma, nu=nu)
    right = ours("triple_momentum", mu=mu, beta=beta, gamma=gamma * nu, nu=1.0)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
