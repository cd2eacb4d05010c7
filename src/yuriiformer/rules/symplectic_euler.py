"""Symplectic Euler on the damped system dv = -a v + A(x), dx = M(v)."""

from ..rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule


@rule(
    source="arXiv:2601.23236, supplement (Hamiltonian symplectic Euler); the formula is ours, see docs/fidelity.md",
    textbook=lambda h: (1, {"beta": 1.0, "gamma": h, "eta": h}),
)
def symplectic_euler(
    x: Stream, v: Velocity, attn: Oracle, mlp: Oracle, norm: Norm, *,
    beta: Unit = 0.9, gamma: Positive = 1.0, eta: Positive = 1.0,
) -> tuple[Stream, Velocity]:  # fmt: skip
    r"""Attention kicks the momentum, the MLP of the new momentum drifts the position.

    $$ v^+ = \mathrm{LN}(\beta v + \gamma\,A(x)), \qquad x^+ = x + \eta\,M(v^+) $$

    `beta` is the damping, `gamma` the kick, `eta` the drift. One call of each oracle.
    """
    v = norm(beta * v + gamma * attn(x))
    return x + eta * mlp(v), v
