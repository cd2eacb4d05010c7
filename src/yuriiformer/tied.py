"""Oracles that are exact gradients: the output map is the transpose of an input map, and the energy stands beside it.

Both energies are functions of y = LN(x), and the direction is the gradient with respect to y times a learned step
size. With respect to x the gradient is LN's Jacobian, transposed, times that: LayerNorm preconditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tied(nn.Module):
    """What both share: the norm, and a positive step size where a free oracle has its own output matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.raw = nn.Parameter(
            torch.zeros(1)
        )  # the step's logarithm; starts at nanoGPT's residual scale, 1 / sqrt(2 layers)

    def scaled(self, gradient: Tensor) -> Tensor:
        return self.raw.exp().unbind()[0] * gradient


class TiedAttention(Tied):
    """Attention whose values are its keys and whose output map is its query matrix, transposed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)

    def split(self, matrix: nn.Linear, y: Tensor) -> Tensor:
        """(batch, time, width) to (batch, heads, time, head width)."""
        return matrix(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        y = self.norm(x)
        q, k = self.split(self.query, y), self.split(self.key, y)
        met = attend(q, k, k).transpose(1, 2).flatten(2).to(q.dtype)
        return self.scaled(F.linear(met, self.query.weight.T))

    def energy(self, y: Tensor, others: Tensor, mask: Tensor) -> Tensor:
        """The energy of every token among `others`, which are held fixed where the gradient is to be the direction.

        sum over heads of 1/c log sum_j exp(c <Q y_i, K y_j>), c = 1/sqrt(head width), over the j that token i sees.
        y, others: (batch, time, width), after the norm. mask: (time, time), true where i sees j. Returns (batch, time).
        """
        c = (y.shape[-1] / self.heads) ** -0.5
        scores = c * self.split(self.query, y) @ self.split(self.key, others).mT
        return scores.masked_fill(~mask, -math.inf).logsumexp(-1).sum(1) / c


class TiedMLP(Tied):
    """An MLP whose second matrix is its first, transposed, with the sign of half the hidden units turned.

    With one sign alone every unit would push a token outwards; with both, some draw it back, and it trains better.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.up = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out, back = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        return self.scaled(F.linear(torch.cat([out, -back], -1), self.up.weight.T))

    def energy(self, y: Tensor) -> Tensor:
        """U(y) = sum_k s_k G(<w_k, y>), s = 1 for the first half and -1 for the second. (..., width) to (...)."""
        out, back = gelu_integral(self.up(y)).chunk(2, -1)
        return (out - back).sum(-1)


def gelu_integral(z: Tensor) -> Tensor:
    """An antiderivative of GELU: ((z^2 - 1) Phi(z) + z phi(z)) / 2."""
    below, density = (1 + torch.erf(z / math.sqrt(2))) / 2, torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return ((z**2 - 1) * below + z * density) / 2
