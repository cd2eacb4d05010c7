"""The step guard: a batch that would do harm is left out, decided on the device so that the host never waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 100  # steps that the running mean of the gradient norm looks back on; below as many nothing is a spike


class Guard:
    """Refuses a step whose loss or gradient norm is no number, or whose norm is above `spike` times its running mean."""

    def __init__(self, spike: float, mean: float, count: int, skipped: int, device: torch.device) -> None:
        self.spike = spike
        # Steps counted for the mean, the mean, steps refused in all, in a row until now, and in the longest row.
        self.count, self.mean, self.skipped, self.row, self.longest = (
            torch.tensor(float(value), device=device) for value in (count, mean, skipped, 0, 0)
        )

    def refuses(self, loss: Tensor, norm: Tensor) -> Tensor:
        """1 or 0, as a tensor."""
        bad = ~(loss.isfinite() & norm.isfinite())
        if self.spike:
            bad |= (self.count >= WINDOW) & (norm > self.spike * self.mean)
        good = (~bad).float()
        self.count = (self.count + good).clamp(max=WINDOW)
        self.mean = torch.where(bad, self.mean, self.mean + (norm - self.mean) / self.count)
        self.skipped = self.skipped + bad
        self.row = (self.row + 1) * bad
        self.longest = torch.maximum(self.longest, self.row)
        return bad.float()

    def numbers(self) -> tuple[float, int, int]:
        """What a checkpoint keeps of it: mean, count and the steps refused."""
        return self.mean.item(), int(self.count.item()), int(self.skipped.item())


def apply(optimizers: Sequence[torch.optim.Optimizer], refused: Tensor, sharded: bool) -> None:
    """One step of every optimiser, or none, and no gradients afterwards.

    `found_inf` is the protocol that fused optimisers have for loss scaling. They do not take it beside shards: there
    the host looks.
    """
    for optimizer in optimizers:
        if not sharded:
            optimizer.found_inf = refused  # type: ignore[attr-defined]
        if not (sharded and refused.item()):
            optimizer.step()
        optimizer.zero_grad()
