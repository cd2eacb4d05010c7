"""Polyak's heavy ball."""

from ..rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule


@rule(
    source="arXiv:2601.23236 (Polyak template); Polyak 1964", reduces_to={"gradient_descent": {"beta": 0.0, "gamma": 1.0}},
    textbook=lambda s: ((1 - s) / (1 + s), {"beta": ((1 - s) / (1 + s)) ** 2, "gamma": 4 / (1 + s) ** 2}),
)  # fmt: skip
def heavy_ball(
    x: Stream, v: Velocity, oracle: Oracle, norm: Norm, *, beta: Unit = 0.9, gamma: Positive = 1.0
) -> tuple[Stream, Velocity]:
    r"""Keep a share of the last move, add the direction here, then move.

    $$ v^+ = \mathrm{LN}(\beta v + \gamma\,O(x)), \qquad x^+ = x + v^+ $$

    `beta` is the momentum, `gamma` the step size. One oracle call.
    """
    v = norm(beta * v + gamma * oracle(x))
    return x + v, v
