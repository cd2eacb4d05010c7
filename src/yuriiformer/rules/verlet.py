"""PRK-Verlet: Stoermer-Verlet as a partitioned Runge-Kutta method."""

from ..rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule


@rule(
    source="arXiv:2601.23236, supplement (PRK-Verlet); the formula is ours, see docs/fidelity.md",
    readout=("x", "v"),  # the layer ends with a kick: the state alone would never read it
    textbook=lambda h: (2, {"beta": 1.0, "gamma": h, "eta": h}),
)
def verlet(
    x: Stream, v: Velocity, attn: Oracle, mlp: Oracle, norm: Norm, *,
    beta: Unit = 0.9, gamma: Positive = 1.0, eta: Positive = 1.0,
) -> tuple[Stream, Velocity]:  # fmt: skip
    r"""Half a kick, a drift, half a kick.

    $$ v_{1/2} = \beta v + \tfrac12\gamma A(x), \quad x^+ = x + \eta M(v_{1/2}), \quad
       v^+ = \mathrm{LN}(v_{1/2} + \tfrac12\gamma A(x^+)) $$

    `beta` is the damping, `gamma` the kick, `eta` the drift. Two attention calls, one MLP call.
    """
    v = beta * v + gamma / 2 * attn(x)
    x = x + eta * mlp(v)
    return x, norm(v + gamma / 2 * attn(x))
