"""One optimiser step: a batch in micro-batches over the processes of a world, clipped, guarded, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..errors import EnvironmentFault, UserError
from ..model import LanguageModel
from ..signals import Stop
from .checkpoint import Progress
from .distributed import Parallel, World, whole
from .guard import Guard, apply
from .kernels import equip
from .optimizer import lr_factor, make_optimizers

Batch = tuple[Tensor, Tensor]  # inputs and targets, each (sequences, context)


class Stepper:
    """A model with its optimisers. How a batch is split, over passes and processes, does not change what is learned."""

    def __init__(
        self, model: LanguageModel, config: TrainingConfig, world: World, stop: Stop, warn: Callable[[str], None]
    ) -> None:
        if config.batch % world.size:
            raise UserError(
                f"training.batch is {config.batch}; {world.size} processes cannot share it evenly, start a number that divides it."
            )
        self.config, self.world, self.stop, self.warn = config, world, stop, warn
        self.device = world.device(config.device)
        self.model = model.to(self.device)
        equip(model, config)
        self.parallel = Parallel(model, world, config.parallel, self.device)
        self.optimizers = make_optimizers(model, config)
        self.rows = config.batch // world.size  # of a batch, on this process
        self.micro = min(config.micro_batch or self.rows, self.rows)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self.remember(Progress())

    def remember(self, progress: Progress) -> None:
        """Take the guard's knowledge from a checkpoint."""
        self.guard = Guard(self.config.spike, progress.norm_mean, progress.norm_count, progress.skipped, self.device)

    def __call__(self, step: int, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Train on the batch of a step (from 0): its mean loss and gradient norm, not waited for; None when a stop was
        asked for before the end of it, and nothing was changed."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor(step, self.config)
        loss = self.gradient(batch)
        if loss is None:
            return None
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf))
        apply(self.optimizers, self.guard.refuses(loss, norm), self.parallel.sharded)
        return loss, norm

    def gradient(self, batch: Batch) -> Tensor | None:
        """Leave the gradient of the batch's mean loss, and return that; None when a stop was asked for meanwhile.

        Out of memory, it begins again with half the sequences in a pass.
        """
        while True:
            try:
                return self._accumulate(batch)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if self.micro == 1 or self.world.size > 1:
                raise EnvironmentFault(
                    f"out of memory with {self.micro} sequences a pass; lower training.micro_batch, model.context, "
                    "model.width or model.layers."
                )
            self.micro = -(-self.micro // 2)
            self.warn(f"out of memory: going on with {self.micro} sequences a pass, the same mathematics")
            self.clear()
            torch.cuda.empty_cache()

    def _accumulate(self, batch: Batch) -> Tensor | None:
        total, parts = torch.zeros((), device=self.device), self._parts(batch)
        for n, (inputs, targets) in enumerate(parts, 1):
            if self.world.any(self.stop.requested):
                self.clear()
                return None
            share = len(inputs) / self.config.batch
            total += self.parallel.backward(share, inputs, targets, n == len(parts), self.autocast)
        return self.world.sum(total)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Micro-batches, as even as can be: their sizes differ by one at most."""
        count = -(-len(batch[0]) // self.micro)
        return list(zip(batch[0].tensor_split(count), batch[1].tensor_split(count), strict=True))

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def validate(self, batches: Sequence[Batch]) -> float:
        """The mean loss of batches. With the training graph: the same numbers, and nothing more to compile."""
        losses = []
        for batch in batches:
            for inputs, targets in self._parts(batch):
                with self.autocast():
                    loss = self.parallel.loss(inputs, targets).detach()
                losses.append(loss * (len(inputs) / (self.config.batch * len(batches))))
        return self.world.sum(torch.stack(losses).sum()).item()

    def to_device(self, batch: Any) -> Batch:
        """This process's rows of a batch of numpy arrays."""
        inputs, targets = map(torch.from_numpy, batch)
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


def out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it, the CPU's allocator only words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
