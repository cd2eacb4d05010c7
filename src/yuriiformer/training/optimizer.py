"""Parameter groups, Muon, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..errors import UserError
from ..model import LanguageModel, Substep, Tables
from ..tied import Tied
from .distributed import placed_like, whole

# The quintic of Muon (Jordan et al. 2024): five steps bring singular values near 1, and it need not be exact.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by its nearest orthogonal matrix (Jordan et al. 2024).

    The same mathematics as torch.optim.Muon with its "original" learning-rate adjustment, but all matrices of one
    shape go through the Newton-Schulz iteration as a batch: half the time of a step at the sizes of the demo.
    Shards (DTensors) are put together for it. Like torch's fused optimisers it leaves everything as it is where its
    `found_inf`, set from outside, is 1: on the device, so that nobody waits.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, steps: int = 5) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp(p.grad, 1 - group["momentum"])
                update = whole(p.grad.lerp(momentum, group["momentum"]))
                state["momentum"] = self._unless_refused(momentum, state["momentum"])
                tall = p.shape[0] > p.shape[1]
                update = update.T if tall else update
                batches[update.shape[0], update.shape[1]].append((p, update))
            for batch in batches.values():
                matrices = orthogonalise(torch.stack([update for _, update in batch]), group["steps"])
                for (p, _), matrix in zip(batch, matrices, strict=True):
                    rows, columns = p.shape
                    matrix = placed_like(matrix.T if rows > columns else matrix, p)
                    matrix = self._unless_refused(matrix, matrix.new_zeros(()))
                    p.add_(matrix, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _unless_refused(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf > 0, old, new)


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    """(batch, rows <= columns, columns) to about the nearest matrices with orthonormal rows, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def make_optimizers(model: LanguageModel, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """Every parameter in exactly one group: matrices of the layers, tables, vectors (norms, biases), learned scalars."""
    matrices, tables, vectors, scalars = [], [], [], []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        match module:
            case nn.Linear():
                matrices.append(module.weight)
                vectors += own[1:]
            case nn.LayerNorm():
                vectors += own
            case nn.Embedding() | Tables():
                tables += own
            case Substep() | Tied() | LanguageModel():
                scalars += own
            case _ if own:
                raise UserError(f"module {type(module).__name__} has parameters that belong to no optimiser group.")
    grouped = {id(p) for group in (matrices, tables, vectors, scalars) for p in group}
    assert grouped == {id(p) for p in model.parameters()}

    decay = config.weight_decay
    groups = [
        {"params": tables, "lr": config.adamw_lr, "weight_decay": decay},
        {"params": vectors, "lr": config.adamw_lr, "weight_decay": 0.0},
        {"params": scalars, "lr": config.adamw_lr * config.coefficient_lr, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        groups.append({"params": matrices, "lr": config.adamw_lr, "weight_decay": decay})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), fused=True)
    ]
    if config.optimizer == "muon":
        optimizers.append(Muon(matrices, lr=config.muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, config: TrainingConfig) -> float:
    """The learning rate of a step (from 0) as a share of the peak."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, config.steps - warmup)
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    decay = max(1, round(config.decay * config.steps))  # wsd: flat, then linear to the last
    progress = max(0, step - (config.steps - decay)) / decay
    return 1 - (1 - config.final_lr) * progress
