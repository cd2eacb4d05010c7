"""The two oracles of a layer: attention and MLP, each asked at a stream and answering a direction.

Both normalise what they are given themselves (pre-norm), so a rule may ask anywhere. No biases, exact GELU,
as in nanoGPT's GPT-2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import KVCache


class Attention(nn.Module):
    """Causal multi-head self-attention, A(X) = Attn(LN X): the interaction energy's direction."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # (batch, time, 3, heads, head width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head width)
        y = attend(q, k, v, cache)
        return self.out(y.transpose(1, 2).flatten(2).to(qkv.dtype))


def attend(q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None) -> Tensor:
    """Scaled dot-product attention of each token to itself and its past."""
    if q.device.type == "cpu":  # the bf16 backward of SDPA is ten times slower than fp32 there
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        if cache is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        past = cache.length
        k, v = cache.extend(k, v)
        if q.shape[2] == 1:
            return F.scaled_dot_product_attention(q, k, v)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class MLP(nn.Module):
    """Two linear maps with a GELU between, M(X) = MLP(LN X): the potential energy's direction, token by token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(self.norm(x))))
