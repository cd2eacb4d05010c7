"""The triple momentum method."""

from ..rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule


@rule(
    source="Van Scoy, Freeman, Lynch 2018; arXiv:2605.24425", reduces_to={"nesterov": {"nu": 1.0}},
    textbook=lambda s: (1 - s, {"mu": (1 - s) ** 2 / (2 + s - s**2), "beta": (1 - s) ** 2 / (1 + s), "gamma": 2 - s}),
)  # fmt: skip
def triple_momentum(
    x: Stream, v: Velocity, oracle: Oracle, norm: Norm, *,
    mu: Unit = 0.9, beta: Unit = 0.9, gamma: Positive = 1.0, nu: Positive = 1.0,
) -> tuple[Stream, Velocity]:  # fmt: skip
    r"""Nesterov's step with a free factor on the move.

    $$ v^+ = \mathrm{LN}(\beta v + \gamma\,O(x + \mu v)), \qquad x^+ = x + \nu v^+ $$

    `mu` is the look-ahead, `beta` the momentum, `gamma` the step size, `nu` the move. One oracle call.
    """
    v = norm(beta * v + gamma * oracle(x + mu * v))
    return x + nu * v, v
