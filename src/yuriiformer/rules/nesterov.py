"""Nesterov's accelerated gradient."""

from ..rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule


@rule(
    source="arXiv:2601.23236 (Nesterov template); Nesterov 1983", reduces_to={"heavy_ball": {"mu": 0.0}},
    textbook=lambda s: (1 - s, {"mu": (1 - s) / (1 + s), "beta": (1 - s) / (1 + s), "gamma": 1.0}),
)  # fmt: skip
def nesterov(
    x: Stream, v: Velocity, oracle: Oracle, norm: Norm, *,
    mu: Unit = 0.9, beta: Unit = 0.9, gamma: Positive = 1.0,
) -> tuple[Stream, Velocity]:  # fmt: skip
    r"""Look ahead along the velocity, ask the oracle there, then move.

    $$ v^+ = \mathrm{LN}(\beta v + \gamma\,O(x + \mu v)), \qquad x^+ = x + v^+ $$

    `mu` is the look-ahead, `beta` the momentum, `gamma` the step size. One oracle call.
    """
    v = norm(beta * v + gamma * oracle(x + mu * v))
    return x + v, v
