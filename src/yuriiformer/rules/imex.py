"""Implicit-explicit step: attention explicit, MLP implicit."""

from typing import Literal

from ..rule import Norm, Oracle, Positive, Stream, Unit, Velocity, rule


@rule(source="arXiv:2601.23236, supplement (IMEX k = 1, 2); the formula is ours, see docs/fidelity.md")
def imex(
    x: Stream, v: Velocity, attn: Oracle, mlp: Oracle, norm: Norm, *,
    mu: Unit = 0.9, beta: Unit = 0.9, gamma: Positive = 1.0, k: Literal[1, 2] = 1,
) -> tuple[Stream, Velocity]:  # fmt: skip
    r"""Ask the MLP at the end point, found by k fixed-point corrections of an explicit guess.

    $$ p = \beta v + \gamma A(x + \mu v), \quad v^0 = \mathrm{LN}(p + \gamma M(x + p)), \quad
       v^{j+1} = \mathrm{LN}(p + \gamma M(x + v^j)), \quad x^+ = x + v^k $$

    `mu` is the look-ahead, `beta` the momentum, `gamma` the step size. One attention, k + 1 MLP calls.
    """
    v = p = beta * v + gamma * attn(x + mu * v)
    for _ in range(k + 1):
        v = norm(p + gamma * mlp(x + v))
    return x + v, v
