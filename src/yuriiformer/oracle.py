"""The two oracles of a layer: attention and MLP, each asked at a stream and answering a direction.

Both normalise what they are given themselves (pre-norm), so a rule may ask anywhere. Which attention is computed
(causal, with a cache, by another library's kernel) is the caller's choice: a function of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tied import TiedAttention, TiedMLP

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values; each (batch, heads, time, head width)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention where the mask is true."""
    return _attention(q, k, v, attn_mask=mask)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of each token to itself and its past."""
    return _attention(q, k, v, is_causal=True)


def _attention(q: Tensor, k: Tensor, v: Tensor, **which: object) -> Tensor:
    if q.device.type == "cpu":  # the bf16 backward of SDPA is ten times slower than fp32 there
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, **which)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Multi-head self-attention, A(X) = Attn(LN X): the interaction energy's direction."""

    def __init__(self, width: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, attend: Attend = causal) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # (batch, time, 3, heads, head width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head width)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2).to(qkv.dtype))


class MLP(nn.Module):
    """Two linear maps with a GELU between, M(X) = MLP(LN X): the potential energy's direction, token by token."""

    def __init__(self, width: int, bias: bool = False, gelu: str = "none") -> None:
        super().__init__()
        self.gelu = gelu  # torch's name of the approximation
        self.norm = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.out = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x)), approximate=self.gelu))


class Oracles(NamedTuple):
    """What the layers of a model are built of."""

    attn: Callable[[int, int], nn.Module]  # of width and heads
    mlp: Callable[[int], nn.Module]  # of width
    bias: bool = False  # in the final norm
    projections: int = 4  # width x width products of an attention call: q, k, v, out


# The first is nanoGPT's from scratch; the next two are nanoGPT's with bias=True and OpenAI's GPT-2, whose weights they read.
ORACLES = {
    "plain": Oracles(Attention, MLP),
    "biased": Oracles(partial(Attention, bias=True), partial(MLP, bias=True), bias=True),
    "gpt2": Oracles(partial(Attention, bias=True), partial(MLP, bias=True, gelu="tanh"), bias=True),
    "tied": Oracles(TiedAttention, TiedMLP, projections=3),
}
