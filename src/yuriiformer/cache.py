"""Keys and values of past tokens, kept in call order.

Streams are token-wise along depth, so attention's keys and values are all that decoding must remember.
A slot belongs to a *call*, not to a layer: Strang and Verlet ask attention twice a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import attention


class KVCache:
    """Room for `room` tokens in each of `slots` attention calls of a forward pass."""

    def __init__(self, slots: int, room: int) -> None:
        self.slots, self.room = slots, room
        self.length = 0  # tokens held
        self._memory: list[tuple[Tensor, Tensor]] = []  # per slot, each (batch, heads, room, head width)
        self._slot = 0  # the next call's

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The new tokens' attention to themselves and to all that the slot holds; their keys and values are stored."""
        batch, heads, new, _ = k.shape
        if len(self._memory) == self._slot:
            self._memory.append(tuple(t.new_empty(batch, heads, self.room, t.shape[-1]) for t in (k, v)))  # type: ignore[arg-type]
        end = self.length + new
        if end > self.room:
            raise ValueError(f"{end} tokens do not fit a cache with room for {self.room}")
        keys, values = (memory[:, :, :end] for memory in self._memory[self._slot])
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        self._slot += 1
        seen = torch.ones(new, end, dtype=torch.bool, device=q.device).tril(self.length)
        return attention(q, keys, values, seen)

    def advance(self, tokens: int) -> None:
        """End of a forward pass: its tokens count as held, and the next call is the first again."""
        if self._slot != self.slots:
            raise RuntimeError(f"a pass made {self._slot} attention calls; the cache has {self.slots} slots")
        self.length += tokens
        self._slot = 0
