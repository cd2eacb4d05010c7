"""Keys and values of past tokens, kept in call order.

Streams are token-wise along depth, so attention's keys and values are all that decoding must remember.
A slot belongs to a *call*, not to a layer: Strang and Verlet ask attention twice a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import Attend, attention


class KVCache:
    """Room for `room` tokens of every row of a batch in each attention call of a forward pass.

    padding: how many tokens at the start of each row, (batch), mean nothing; by default none.

    The shapes never change and the length is a tensor, so one compiled graph serves every step of decoding.
    """

    def __init__(self, room: int, device: torch.device, padding: Tensor | None = None) -> None:
        self.length = torch.zeros((), dtype=torch.long, device=device)  # tokens held
        self.padding = padding
        self.memory: list[tuple[Tensor, Tensor]] = []  # a slot each call, (batch, heads, room, head width)
        self._places = torch.arange(room, device=device)

    def read(self, time: int) -> tuple[Tensor, Attend]:
        """For the next `time` tokens: their positions, and the attention that stores their keys and values first."""
        new = self.length + self._places[:time]
        own, seen = self._places == new[:, None], self._places <= new[:, None]  # (time, room)
        positions = new
        if self.padding is not None:
            # Padding sees itself alone: no row of a softmax may be empty.
            seen = (seen & (self._places >= self.padding[:, None, None]) | own)[:, None]
            positions = (new - self.padding[:, None]).clamp(min=0)
        call = 0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal call
            if len(self.memory) == call:
                batch, heads, _, _ = k.shape
                self.memory.append(tuple(t.new_zeros(batch, heads, len(self._places), t.shape[-1]) for t in (k, v)))  # type: ignore[arg-type]
            keys, values = self.memory[call]
            call += 1
            return attention(q, keys.index_copy_(2, new, k), values.index_copy_(2, new, v), seen)

        return positions, attend

    def advance(self, time: int) -> None:
        """End of a forward pass: its tokens count as held."""
        self.length += time
