"""Keys and values of past tokens, kept in call order.

Streams are token-wise along depth, so attention's keys and values are all that decoding must remember.
A slot belongs to a *call*, not to a layer: Strang and Verlet ask attention twice a layer.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Room for `room` tokens in each of `slots` attention calls of a forward pass."""

    def __init__(self, slots: int, room: int) -> None:
        self.slots, self.room = slots, room
        self.length = 0  # tokens held
        self._memory: list[tuple[Tensor, Tensor]] = []  # per slot, each (batch, heads, room, head width)
        self._slot = 0  # the next call's

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values of the new tokens; return those of all tokens so far."""
        batch, heads, new, head_width = k.shape
        if len(self._memory) == self._slot:
            shape = (batch, heads, self.room, head_width)
            self._memory.append((k.new_empty(shape), v.new_empty(shape)))
        end = self.length + new
        if end > self.room:
            raise ValueError(f"{end} tokens do not fit a cache with room for {self.room}")
        keys, values = (memory[:, :, :end] for memory in self._memory[self._slot])
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        self._slot += 1
        return keys, values

    def advance(self, tokens: int) -> None:
        """End of a forward pass: its tokens count as held, and the next call is the first again."""
        if self._slot != self.slots:
            raise RuntimeError(f"a pass made {self._slot} attention calls; the cache has {self.slots} slots")
        self.length += tokens
        self._slot = 0
