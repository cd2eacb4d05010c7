"""The processes that train one run together: what the environment says, and the few things they tell each other.

Whoever starts them (torchrun, srun, Kubernetes) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
nothing else is asked. Without them there is one process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import EnvironmentFault, UserError
from ..model import LanguageModel

TIMEOUT = timedelta(minutes=10)  # for the others to appear, and for each collective


class Elsewhere(UserError):
    """Another process has failed and told it; this one ends with the same exit code, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the leading process has failed.")
        self.exit_code = exit_code


@dataclass(frozen=True)
class World:
    """The processes of a run; a single one needs no environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        if kind == "cuda" and self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK is {self.local_rank}; this machine has {torch.cuda.device_count()} GPUs: start as many processes."
            )
        return torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so. On the host: no GPU is waited for."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def lead(self, action: Callable[[], Any]) -> Any:
        """What the leading process's action returns (a JSON value), for all. Its error ends all of them."""
        if self.size == 1:
            return action()
        message: list[Any] = [None, None]
        if self.leads:
            try:
                message = [0, action()]
            except UserError as error:
                self._broadcast(json.dumps([error.exit_code, None]))
                raise
        code, value = json.loads(self._broadcast(json.dumps(message)))
        if code:
            raise Elsewhere(code)
        return value

    def _broadcast(self, text: str) -> str:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        length = torch.tensor(len(data))
        dist.broadcast(length, 0)
        if not self.leads:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of this process; its group lasts as long as the block.

    device: training.device. Raises UserError where the environment is half a world, EnvironmentFault where the
    others do not come, or go.
    """
    world = from_environment()
    if world.size == 1:
        yield world
        return
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.device("cuda"))
    try:
        # Two backends: tensors on a GPU go by NCCL, flags and messages on the host by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise EnvironmentFault(
            f"rank {world.rank} of {world.size} found no rendezvous at {where}: {_first_line(error)}"
        ) from None
    try:
        yield world
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise EnvironmentFault(
                f"rank {world.rank} of {world.size}: another process of this run has gone: {_first_line(error)}"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


def from_environment() -> World:
    """Raises UserError naming the variable that is missing or wrong."""
    numbers: dict[str, int] = {}
    for name, default in (("WORLD_SIZE", "1"), ("RANK", ""), ("LOCAL_RANK", "")):
        text = os.environ.get(name, default)
        if numbers.get("WORLD_SIZE") == 1:
            return World()
        if not text.isdigit() or int(text) >= numbers.get("WORLD_SIZE", int(text) + 1):
            raise UserError(
                f"{name} is {text!r} in a world of {os.environ['WORLD_SIZE']}; start the processes with torchrun, or set "
                "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each."
            )
        numbers[name] = int(text)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"WORLD_SIZE is {numbers['WORLD_SIZE']} and {name} is not set: a world without a rendezvous."
            )
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class Loss(nn.Module):
    """The loss as the forward pass, as the wrappers below want it."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(ids, targets)


class Parallel:
    """A model spread over a world: whole on every process (DDP) or in shards (FSDP2)."""

    def __init__(self, model: LanguageModel, world: World, kind: str, device: torch.device) -> None:
        self.world, self.plain = world, Loss(model)
        self.sharded = world.size > 1 and kind == "fsdp"
        self.module: nn.Module = self.plain
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (world.size,))
            for part in (*model.layers, self.plain):
                fully_shard(part, mesh=mesh)
        elif world.size > 1:
            self.module = nn.parallel.DistributedDataParallel(
                self.plain,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Without a backward pass to come."""
        loss = self.plain(ids, targets)
        if self.sharded:
            self.plain.reshard()  # type: ignore[operator]  # which else the backward pass does
        return loss

    def backward(self, share: float, ids: Tensor, targets: Tensor, last: bool, autocast: Any) -> Tensor:
        """Add the gradient of `share` times the loss; after the last one of a step it is summed over the world."""
        with self._synchronised(last):
            with autocast():
                loss = self.module(ids, targets) * share
            (loss * self.world.size).backward()  # both wrappers average over the processes
        return loss.detach()

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        if self.sharded:
            self.plain.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif not last and self.world.size > 1:
            return self.module.no_sync()  # type: ignore[operator]
        return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together (all processes must ask), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, known to every process, on the device and in the shards of the other of the same shape."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = other.device_mesh, other.placements  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, placements)
